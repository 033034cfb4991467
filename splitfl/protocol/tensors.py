"""From real tensors to described ones and back.

Ownership: `describe` does not copy where it can avoid it, so a tensor that is described must never be written to again.
Activations and gradients are not; parameters are, so snapshot them first.
"""

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import TensorFrames

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "u8": torch.uint8}
_NORM_PIECE = 1 << 18
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class OutOfBounds(RemoteProtocolError):  # noqa: N818  # the name is the finding
    """Numbers that are not finite or far too large: the sender's own, or of the layers that it was given."""


def wire_dtype(dtype: torch.dtype) -> str:
    """Return the name under which a dtype travels."""
    return _NAMES[dtype]


def describe(tensor: Tensor, frame_bytes: int) -> TensorFrames:
    """Describe a tensor in frames of at most `frame_bytes`; its memory is used as it is if contiguous on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    return TensorFrames(
        dtype=_NAMES[tensor.dtype],
        shape=tuple(tensor.shape),
        buffers=tuple(raw[start : start + frame_bytes] for start in range(0, len(raw), frame_bytes)),
    )


def realise(frames: TensorFrames, device: torch.device | str = "cpu", *, max_rms: float = math.inf) -> Tensor:
    """Return a tensor of its own, aligned memory.

    Raises `OutOfBounds` when a value is NaN or infinite, or the values' root mean square exceeds `max_rms`.

    The bytes are copied once. Small frames arrive unaligned, and several frames must be put together. One path for all
    sizes costs less than it saves.
    """
    tensor = torch.empty(frames.shape, dtype=DTYPES[frames.dtype])
    if tensor.numel():
        target = tensor.reshape(-1).view(torch.uint8).numpy().data
        start = 0
        for buffer in frames.buffers:
            target[start : start + len(buffer)] = buffer
            start += len(buffer)
    # a norm sees NaN and infinity ten times faster than isfinite().all() does; float64 so that large finite values pass
    if tensor.is_floating_point() and tensor.numel():
        norm = norm_of(tensor)
        if not math.isfinite(norm):
            raise OutOfBounds("a tensor with values that are not finite (NONFINITE_TENSOR)")
        if (rms := norm / math.sqrt(tensor.numel())) > max_rms:
            raise OutOfBounds(f"a tensor whose root mean square is {rms:.3g}, more than max_rms = {max_rms:g}")
    return tensor.to(device)


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
        for buffer in describe(tensor, max(tensor.nbytes, 1)).buffers:
            digest.update(buffer)
    return digest.hexdigest()
