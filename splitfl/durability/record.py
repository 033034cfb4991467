"""One record: what happened, and the tensors that belong to it, with a checksum over all of it.

`magic (4) | header bytes (u32) | body bytes (u64) | header: msgpack [kind, fields, [[name, dtype, shape], ...]] |
the tensors' bytes | SHA-256 of everything before (32)`; numbers are little-endian. A record that was torn, cut short or
changed does not decode.
"""

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import msgpack
import torch
from torch import Tensor

from splitfl.errors import StorageError
from splitfl.protocol.messages import Buffer

_MAGIC = b"SFR1"
_LENGTHS = struct.Struct("<4sIQ")
_MAX_HEADER_BYTES = 1 << 24
_DIGEST_BYTES = 32
_DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
    "i64": torch.int64,
    "u8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Damaged(StorageError):  # noqa: N818  # the name is the finding
    """Bytes that are no whole record."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Record:
    """What happened (`kind`), its plain values, and its tensors by name."""

    kind: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def pack(record: Record) -> Iterator[Buffer]:
    """Yield a record's bytes, a tensor at a time; the tensors' memory is used as it is where it can be."""
    tensors = [(name, tensor.detach().cpu().contiguous()) for name, tensor in record.tensors.items()]
    described = [[name, _NAMES[tensor.dtype], list(tensor.shape)] for name, tensor in tensors]
    header = msgpack.packb([record.kind, dict(record.fields), described])
    if len(header) > _MAX_HEADER_BYTES:
        raise StorageError(f"a record of kind {record.kind} has a header of {len(header)} bytes; keep it smaller")
    digest = hashlib.sha256()
    for buffer in _parts(header, tensors):
        digest.update(buffer)
        yield buffer
    yield digest.digest()


def _parts(header: bytes, tensors: list[tuple[str, Tensor]]) -> Iterator[Buffer]:
    yield _LENGTHS.pack(_MAGIC, len(header), sum(tensor.nbytes for _, tensor in tensors)) + header
    for _, tensor in tensors:
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data


def unpack(file: BinaryIO, num_left: int) -> tuple[Record, int]:
    """Read the record at the file's position, of which `num_left` bytes follow; return it and its size in bytes.

    Raises `Damaged`, before anything is allocated that the file is too short for.
    """
    start = file.read(_LENGTHS.size)
    if len(start) < _LENGTHS.size:
        raise Damaged("a record cut off in its first bytes")
    magic, header_bytes, body_bytes = _LENGTHS.unpack(start)
    size = _LENGTHS.size + header_bytes + body_bytes + _DIGEST_BYTES
    if magic != _MAGIC or header_bytes > _MAX_HEADER_BYTES or size > num_left:
        raise Damaged("no record here, or one cut off")
    header = file.read(header_bytes)
    body = bytearray(body_bytes)
    if len(header) < header_bytes or file.readinto(body) < body_bytes:  # type: ignore[attr-defined]
        raise Damaged("a record cut off")
    digest = hashlib.sha256(start)
    digest.update(header)
    digest.update(body)
    if file.read(_DIGEST_BYTES) != digest.digest():
        raise Damaged("a record whose checksum does not fit")
    return _read(header, body), size


def _read(header: bytes, body: bytearray) -> Record:
    kind, fields, described = msgpack.unpackb(header, strict_map_key=False)
    tensors: dict[str, Tensor] = {}
    start = 0
    for name, dtype, shape in described:
        tensor = torch.empty(shape, dtype=_DTYPES[dtype])
        end = start + math.prod(shape) * tensor.itemsize
        if tensor.numel():
            tensor.reshape(-1).view(torch.uint8).numpy().data[:] = memoryview(body)[start:end]
        tensors[name] = tensor
        start = end
    return Record(kind=kind, fields=fields, tensors=tensors)
