"""What the server gives a client so that the client needs no copy of the model: description files, weights, adapters.

Files have fixed names; size and SHA-256 are announced in the welcome and every byte is fetched in chunks.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from splitfl.errors import RemoteProtocolError
from splitfl.models import checkpoint
from splitfl.models.cut import Cut
from splitfl.models.origin import DESCRIPTION_FILES
from splitfl.models.source import ADAPTERS_FILE, WEIGHTS_FILE, Weights, write_part
from splitfl.models.trainable import is_adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvidedFile:
    """A file on offer."""

    path: Path
    num_bytes: int
    digest: str
    """SHA-256 (hex) of the content."""


class Provisions:
    """The files on offer, by the names that clients ask for."""

    def __init__(self, files: dict[str, ProvidedFile]) -> None:
        self.files = files

    def read(self, name: str, offset: int, num_bytes: int) -> bytes:
        """Return up to `num_bytes` of a file from `offset` on; raise `RemoteProtocolError` for what is not on offer."""
        file = self.files.get(name)
        if file is None or offset >= file.num_bytes:
            raise RemoteProtocolError(f"no file {name!r:.40} with a byte {offset} is on offer")
        with file.path.open("rb") as content:
            content.seek(offset)
            return content.read(num_bytes)


def prepare(directory: Path, cut: Cut, weights: Weights, *, cache_dir: Path, run_dir: Path) -> Provisions:
    """Collect a client's files; its weights are copied out of the checkpoint once and kept in the cache."""
    files = {name: _provided(directory / name) for name in DESCRIPTION_FILES if (directory / name).is_file()}
    part = cache_dir / "parts" / f"{_key(cut, weights)}.safetensors"
    if not part.exists():
        write_part(part, cut, "client", weights)
    files[WEIGHTS_FILE] = _provided(part)
    adapters = {name: tensor for name, (_, tensor) in cut.tensors_of("client").items() if is_adapter(name)}
    if adapters:
        values = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in adapters.items()}
        for name, tensor in values.items():
            weights.read([name], tensor)
        checkpoint.save_tensors(run_dir / ADAPTERS_FILE, values)
        files[ADAPTERS_FILE] = _provided(run_dir / ADAPTERS_FILE)
    return Provisions(files)


def _provided(path: Path) -> ProvidedFile:
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return ProvidedFile(path=path, num_bytes=path.stat().st_size, digest=digest)


def _key(cut: Cut, weights: Weights) -> str:
    """Name a part by where its tensors lie, so that another checkpoint or cut never gets an old copy."""
    return hashlib.sha256("\n".join(_marks(cut, weights)).encode()).hexdigest()[:32]


def _marks(cut: Cut, weights: Weights) -> Iterator[str]:
    for name, (names, _) in cut.tensors_of("client").items():
        entry = weights.find(names)
        if entry is not None:
            stat = entry.path.stat()
            yield f"{name} {entry.path.resolve()} {entry.start} {entry.num_bytes} {stat.st_size} {stat.st_mtime_ns}"
