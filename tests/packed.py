"""Tensors in frames and back, as a peer may make them that keeps to no terms."""

import math

from torch import Tensor

from splitfl.protocol.messages import TensorFrames
from splitfl.protocol.roles import Role
from splitfl.protocol.tensors import Tensors

UNAGREED = Tensors({}, frame_bytes=1 << 10)
"""Takes and gives tensors of any type."""


def packed(tensor: Tensor, frame_bytes: int = 1 << 18) -> TensorFrames:
    return Tensors({}, frame_bytes=frame_bytes).pack(Role.LAYER, tensor)


def unpacked(frames: TensorFrames, *, max_rms: float = math.inf) -> Tensor:
    return Tensors({}, frame_bytes=1, max_rms=max_rms).unpack(Role.LAYER, frames)
