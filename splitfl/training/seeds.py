"""Random draws that a retry repeats: each is seeded by what it is for, never by what came before."""

import hashlib

import torch


def seed_for(*parts: object) -> int:
    """Return a 63-bit seed from the parts' texts, e.g. (run seed, side, client, step, micro-batch)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_dropout(*parts: object) -> None:
    """Seed torch's generators for one micro-batch's dropout."""
    torch.manual_seed(seed_for(*parts))
