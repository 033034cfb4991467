"""The one place where tensors meet frames.

A codec for some role is a wire type (`messages.DTYPE_BYTES`), an entry in `_CODECS`, and its agreement in the terms
(`Terms.wire_types`): nothing else knows how a tensor travels.

Ownership: `Tensors.pack` does not copy where it can avoid it, so a tensor that is packed must never be written to
again. Activations and gradients are not; parameters are, so snapshot them first.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol.messages import TensorFrames
from splitfl.protocol.roles import Role

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "u8": torch.uint8}
_NORM_PIECE = 1 << 18
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class OutOfBounds(RemoteProtocolError):  # noqa: N818  # the name is the finding
    """Numbers that are not finite or far too large: the sender's own, or of the layers that it was given."""


def wire_dtype(dtype: torch.dtype) -> str:
    """Return the name under which a dtype travels."""
    return _NAMES[dtype]


class _AsItIs:
    """The bytes that a tensor has in memory: little-endian, row-major."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def encode(self, tensor: Tensor) -> Tensor:
        """Return a tensor whose bytes travel; without a copy where it is contiguous on the CPU."""
        return tensor.detach().to("cpu").contiguous()

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor to receive the bytes in, for a tensor of this shape."""
        return torch.empty(shape, dtype=self.dtype)

    def decode(self, received: Tensor) -> Tensor:
        """Return the tensor that these bytes are."""
        return received


_CODECS = {name: _AsItIs(dtype) for name, dtype in DTYPES.items()}


class Tensors:
    """How the tensors of one run become frames, and frames tensors again: by their role, as agreed in the terms."""

    def __init__(self, agreed: Mapping[Role, str], *, frame_bytes: int, max_rms: float = math.inf) -> None:
        """`agreed` are wire types by role (`Terms.wire_types`); tensors of other roles travel in their own type."""
        self._agreed = agreed
        self._frame_bytes = frame_bytes
        self._max_rms = max_rms

    def pack(self, role: Role, tensor: Tensor) -> TensorFrames:
        """Return a tensor in frames of at most `frame_bytes`; its memory is used as it is if contiguous on the CPU.

        Raises `LocalProtocolError` for a tensor of another type than its role travels in.
        """
        wire_type = self._agreed.get(role) or wire_dtype(tensor.dtype)
        codec = _CODECS[wire_type]
        if tensor.dtype != codec.dtype:
            raise LocalProtocolError(f"{role.value} of type {tensor.dtype}, which were agreed on as {wire_type}")
        raw = _bytes_of(codec.encode(tensor))
        return TensorFrames(
            dtype=wire_type,
            shape=tuple(tensor.shape),
            buffers=tuple(raw[start : start + self._frame_bytes] for start in range(0, len(raw), self._frame_bytes)),
        )

    def unpack(self, role: Role, frames: TensorFrames) -> Tensor:
        """Return a tensor of its own, aligned memory on the CPU.

        Raises `RemoteProtocolError` for another type than its role travels in, and `OutOfBounds` when a value is NaN or
        infinite, or the values' root mean square exceeds `max_rms`.

        The bytes are copied once. Small frames arrive unaligned, and several frames must be put together. One path for
        all sizes costs less than it saves.
        """
        wire_type = self._agreed.get(role, frames.dtype)
        if frames.dtype != wire_type:
            raise RemoteProtocolError(f"{role.value} of type {frames.dtype}, which were agreed on as {wire_type}")
        codec = _CODECS[wire_type]
        received = codec.empty(frames.shape)
        target, start = _bytes_of(received), 0
        for buffer in frames.buffers:
            target[start : start + len(buffer)] = buffer
            start += len(buffer)
        tensor = codec.decode(received)
        self._check_values(tensor)
        return tensor

    def _check_values(self, tensor: Tensor) -> None:
        if not (tensor.is_floating_point() and tensor.numel()):
            return
        # a norm sees NaN and infinity ten times faster than isfinite().all() does; float64 so that large finite values
        # pass
        norm = norm_of(tensor)
        if not math.isfinite(norm):
            raise OutOfBounds("a tensor with values that are not finite (NONFINITE_TENSOR)")
        if (rms := norm / math.sqrt(tensor.numel())) > self._max_rms:
            raise OutOfBounds(f"a tensor whose root mean square is {rms:.3g}, more than max_rms = {self._max_rms:g}")


def norm_of(tensor: Tensor) -> float:
    """Return the Euclidean norm in float64; NaN and infinity come through.

    A piece at a time: of a whole tensor torch would make a copy in float64 first, twice as large as itself. And no
    tensor is kept from one piece to the next: it would lie where the last copy was, and the next would not fit there.
    """
    pieces = tensor.detach().reshape(-1).split(_NORM_PIECE)
    return math.hypot(*(float(torch.linalg.vector_norm(piece, dtype=torch.float64)) for piece in pieces))


def digest_of(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 (hex) over the tensors' bytes in order: equal on all sides exactly when the values are."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_bytes_of(tensor.detach().to("cpu").contiguous()))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(bytearray())
