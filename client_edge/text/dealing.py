"""How examples are dealt: into what is trained on and what is held out, into rows, and in which order those come.

Every draw is seeded by what it is for, so that a resumed run repeats it.
"""

import functools
import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TypeVar

import torch

from client_edge.text.examples import Dataset
from splitfl.errors import ConfigError, DataError
from splitfl.telemetry.units import counted

T = TypeVar("T")


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split into what is trained on and what is held out, drawn by `seed`, each in the file's order.

    A fraction above 0 holds out at least one example. The counts of truncated and dropped examples stay with the first.
    Raises `ConfigError` for a fraction outside [0, 1), `DataError` if nothing is left to train on.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"data.eval_fraction must be at least 0 and below 1, got {fraction}")
    order = torch.randperm(len(dataset), generator=_generator("hold-out", seed)).tolist()
    held_out = set(order[: num_held_out(len(dataset), fraction)])
    train = tuple(example for index, example in enumerate(dataset.examples) if index not in held_out)
    evaluation = tuple(dataset.examples[index] for index in sorted(held_out))
    counts = {"num_truncated": dataset.num_truncated, "num_dropped": dataset.num_dropped}
    return Dataset(examples=train, **counts), Dataset(examples=evaluation)


def num_held_out(num_examples: int, fraction: float) -> int:
    """Return how many examples are held out; raise `DataError` if nothing would be left to train on."""
    wanted = max(1, min(round(fraction * num_examples), num_examples - 1)) if fraction > 0 else 0
    if wanted >= num_examples:
        raise DataError(
            f"holding out {fraction} of {counted(num_examples, 'example')} leaves nothing to train on; add examples,"
            " name data.eval_path, or set data.eval_fraction to 0"
        )
    return wanted


def pack(lengths: Sequence[int], *, capacity: int, max_examples: int) -> list[tuple[int, ...]]:
    """Deal examples, by their lengths, into rows of up to `capacity` tokens and `max_examples` examples.

    Best fit decreasing (Johnson 1973): the long ones first, each into the row with the least room that holds it.
    Returns each row's examples by number, rising; rows in the order of their first.
    """
    rows: dict[int, list[list[int]]] = {}  # by the room that is left
    rooms: list[int] = []  # the keys of `rows`, rising
    full: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        at = bisect_left(rooms, lengths[number])
        room = rooms[at] if at < len(rooms) else capacity
        row = rows[room].pop() if at < len(rooms) else []
        if at < len(rooms) and not rows[room]:
            del rooms[at], rows[room]
        row.append(number)
        room -= lengths[number]
        if room <= 0 or len(row) == max_examples:
            full.append(row)
            continue
        if room not in rows:
            rows[room] = []
            insort(rooms, room)
        rows[room].append(row)
    return sorted(tuple(sorted(row)) for row in (*full, *(row for others in rows.values() for row in others)))


@functools.lru_cache(maxsize=2)
def epoch_order(num_examples: int, seed: int, client_id: str, epoch: int) -> tuple[int, ...]:
    """Return the permutation of an epoch, the same in every process."""
    return tuple(torch.randperm(num_examples, generator=_generator("order", seed, client_id, epoch)).tolist())


@functools.lru_cache(maxsize=2)
def grouped_order(
    lengths: tuple[int, ...], size: int, begun: int, seed: int, client_id: str, epoch: int
) -> tuple[int, ...]:
    """Return a permutation of an epoch in which rows of about the same length share a micro-batch of `size` rows.

    As transformers' `LengthGroupedSampler`: shuffled, cut into stretches of up to 50 micro-batches, each sorted by
    length. Beyond it micro-batches are shuffled once more, so that no stretch goes from long to short. The first
    `begun` rows, which fill the micro-batch that the last epoch has begun, are left as they fall, so that micro-batches
    are cut where the sorting meant them to be.
    """
    order = epoch_order(len(lengths), seed, client_id, epoch)
    end = begun + max(0, len(order) - begun) // size * size
    stretch = size * max(1, min(len(lengths) // (4 * size), 50))
    groups = [
        group
        for part in pieces_of(order[begun:end], stretch)
        for group in pieces_of(sorted(part, key=lambda row: lengths[row], reverse=True), size)
    ]
    shuffled = torch.randperm(len(groups), generator=_generator("groups", seed, client_id, epoch)).tolist()
    return (*order[:begun], *(row for number in shuffled for row in groups[number]), *order[end:])


def pieces_of(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Cut into stretches of `size`, the last of them maybe shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _generator(*parts: str | int) -> torch.Generator:
    """Seed a generator from what it is for, so that neither the global seed nor other draws change it."""
    digest = hashlib.sha256("\n".join(str(part) for part in parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
