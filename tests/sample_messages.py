"""Messages and terms for tests that need some, whatever they carry."""

from typing import Any

from splitfl.protocol.messages import (
    Forward,
    Merged,
    RoundOpened,
    TensorFrames,
    wire_bytes,
)
from splitfl.session.terms import Terms

WIDTH = 4
LAYER_SHAPES = ((2, 3), (5,))


def frames_of(*shape: int, dtype: str = "f32") -> TensorFrames:
    """Describe a tensor of zeros in one frame."""
    return TensorFrames(dtype=dtype, shape=shape, buffers=(bytes(wire_bytes(dtype, shape)),))


def layers() -> tuple[TensorFrames, ...]:
    """Return the client-side layers that `terms` speaks of."""
    return tuple(frames_of(*shape) for shape in LAYER_SHAPES)


def terms(**changed: Any) -> Terms:
    """Return the terms of a small run: two micro-batches of up to 2 x 6 tokens, both under way at once."""
    usual: dict[str, Any] = {
        "hidden_size": WIDTH,
        "dtype": "f32",
        "max_seq_length": 6,
        "max_batch_size": 2,
        "max_in_flight": 2,
        "max_packed_examples": 0,
        "micro_batches": 2,
        "needs_backward": True,
        "num_trainable": len(LAYER_SHAPES),
        "layer_shapes": LAYER_SHAPES,
        "layer_dtypes": ("f32", "f32"),
        "has_controls": False,
        "num_rounds": 9,
        "local_steps": 2,
    }
    return Terms(**{**usual, **changed})


def forward(request_id: int, step: int, micro_batch: int = 0, **changed: Any) -> Forward:
    """Return activations of two rows of three tokens."""
    usual: dict[str, Any] = {
        "hidden_BSD": frames_of(2, 3, WIDTH),
        "lengths_B": (3, 2),
        "left_padded": False,
        "example_lengths": (),
        "adapters_off": False,
    }
    return Forward(request_id=request_id, step=step, micro_batch=micro_batch, **{**usual, **changed})


def opened(round_number: int = 1, first_step: int = 1, num_steps: int = 2, **changed: Any) -> RoundOpened:
    """Return the opening of a round."""
    usual: dict[str, Any] = {"layers": ()}
    return RoundOpened(round_number=round_number, first_step=first_step, num_steps=num_steps, **{**usual, **changed})


def merged(round_number: int = 1, **changed: Any) -> Merged:
    """Return the end of a round."""
    usual: dict[str, Any] = {"accepted": True, "reason": "", "is_last": False, "counted": True, "layers": layers()}
    return Merged(round_number=round_number, **{**usual, **changed})
