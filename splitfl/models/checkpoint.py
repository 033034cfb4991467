"""Reading some tensors of a safetensors checkpoint without the others, and writing such files.

Bytes go straight from the file into the tensor's memory. Reading through a memory map would count the same tensor twice
in the process's peak, and a client must not need more than its own layers. The format: 8 bytes little-endian length of
a JSON header, the header (name -> dtype, shape, offsets), then the tensors' bytes
(https://github.com/huggingface/safetensors#format).
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from splitfl.durability.disk import sync_dir
from splitfl.errors import ModelError, StorageError

_CHUNK_BYTES = 1 << 22
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where one tensor lies."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    num_bytes: int


def entries_of(path: Path) -> dict[str, Entry]:
    """Read one file's header; raise `ModelError` when it is not safetensors or its offsets leave the file."""
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length)) if length <= _MAX_HEADER_BYTES else None
    except (OSError, struct.error, ValueError, RecursionError) as error:  # the last for brackets thousands deep
        raise ModelError(f"{path}: cannot be read as safetensors: {error}") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path}: cannot be read as safetensors: its header is no object of at most 100 MB")
    size = path.stat().st_size
    return {
        name: _entry(path, name, value, 8 + length, size) for name, value in header.items() if name != "__metadata__"
    }


def _entry(path: Path, name: str, value: object, base: int, size: int) -> Entry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]} if (
            dtype in DTYPES
            and all(type(n) is int and n >= 0 for n in shape)
            and type(start) is type(end) is int  # True is an int to a pattern
            and 0 <= start <= end <= size - base
        ):
            elements = 1
            for n in shape:
                elements *= n
            if elements * DTYPES[dtype].itemsize == end - start:
                return Entry(path=path, dtype=dtype, shape=tuple(shape), start=base + start, num_bytes=end - start)
    raise ModelError(f"{path}: tensor {name} has a dtype, shape or place that safetensors does not allow")


def read_into(entry: Entry, values: Tensor) -> None:
    """Fill `values` (any dtype and device, same shape) from the file, converting where the types differ."""
    if tuple(values.shape) != entry.shape:
        raise ModelError(f"{entry.path}: a tensor has shape {entry.shape} where the model has {tuple(values.shape)}")
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        if values.device.type == "cpu" and values.dtype == DTYPES[entry.dtype] and values.is_contiguous():
            _read_exactly(file, _bytes_of(values), entry.path)
            return
        flat = values.view(-1) if values.is_contiguous() else values.reshape(-1)
        stride = max(1, _CHUNK_BYTES // DTYPES[entry.dtype].itemsize)
        for first in range(0, flat.numel(), stride):
            part = torch.empty(min(stride, flat.numel() - first), dtype=DTYPES[entry.dtype])
            _read_exactly(file, _bytes_of(part), entry.path)
            flat[first : first + part.numel()].copy_(part)


def _bytes_of(values: Tensor) -> memoryview:
    return values.detach().reshape(-1).view(torch.uint8).numpy().data if values.numel() else memoryview(b"")


def _read_exactly(file: FileIO, target: memoryview, path: Path) -> None:
    done = 0
    while done < len(target):
        got = file.readinto(target[done : done + _CHUNK_BYTES])
        if not got:
            raise ModelError(f"{path}: the file ends in the middle of a tensor; it was cut short or is being written")
        done += got


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One tensor to write: its place in the header and a function that yields its bytes."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    chunks: Callable[[], Iterable[bytes | memoryview]]


def piece_of_entry(entry: Entry) -> Piece:
    """Copy a tensor from another file, a few MiB at a time."""

    def chunks() -> Iterable[bytes]:
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            left = entry.num_bytes
            while left:
                chunk = file.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise ModelError(f"{entry.path}: the file ends in the middle of a tensor")
                left -= len(chunk)
                yield chunk

    return Piece(dtype=entry.dtype, shape=entry.shape, num_bytes=entry.num_bytes, chunks=chunks)


def piece_of_tensor(make: Callable[[], Tensor], dtype: torch.dtype, shape: Sequence[int]) -> Piece:
    """Write a tensor that is made only when its turn comes."""
    size = dtype.itemsize
    for n in shape:
        size *= n

    def chunks() -> Iterable[memoryview]:
        yield _bytes_of(make().to("cpu", dtype).contiguous())

    return Piece(dtype=_DTYPE_NAMES[dtype], shape=tuple(shape), num_bytes=size, chunks=chunks)


def write(path: Path, pieces: Mapping[str, Piece], *, mode: int = 0o644) -> str:
    """Write a safetensors file, one tensor in memory at a time; it appears under its name whole or not at all.

    Returns the file's SHA-256 (hex). Raises `StorageError` when the disk does not take it.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, piece in pieces.items():
        header[name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [offset, offset + piece.num_bytes]}
        offset += piece.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    half_done = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(os.open(half_done, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:  # noqa: PTH123
            for chunk in _all_chunks(encoded, pieces.values()):
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
        half_done.replace(path)
        sync_dir(path.parent)
    except OSError as error:
        raise StorageError.at(path, error) from None
    finally:
        half_done.unlink(missing_ok=True)
    return digest.hexdigest()


def _all_chunks(header: bytes, pieces: Iterable[Piece]) -> Iterable[bytes | memoryview]:
    yield struct.pack("<Q", len(header))
    yield header
    for piece in pieces:
        yield from piece.chunks()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, mode: int = 0o600) -> str:
    """Write tensors to a safetensors file; returns its SHA-256 (hex)."""
    return write(
        path,
        {name: piece_of_tensor(tensor.detach, tensor.dtype, tensor.shape) for name, tensor in tensors.items()},
        mode=mode,
    )


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping that reads a tensor each time it is asked for one, and keeps none."""

    def __init__(self, path: Path) -> None:
        self.entries = entries_of(path)

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        values = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        read_into(entry, values)
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)
