"""Messages by their names and fields, as a script writes them: also those that nobody may send."""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from sample_messages import frames_of

from splitfl.protocol.messages import DTYPE_BYTES, KINDS, Message, TensorFrames
from splitfl.session.terms import Terms

_KINDS = {kind.__name__: kind for kind in KINDS.values()}
# What a field holds where the script says nothing of it; whatever is not named here is empty, or 0.
_USUAL: Mapping[str, str] = {
    "request_id": "1",
    "step": "1",
    "hidden_BSD": "2x3xD",
    "gradient_BSD": "2x3xD",
    "lengths_B": "3,2",
    "num_label_tokens": "4",
    "loss": "1.5",
    "clip_coefficient": "1.0",
    "norms_P": "P",
    "round_number": "1",
    "num_examples": "5",
    "num_tokens": "10",
    "cache_id": "1",
    "verdict": "go",
    "accepted": "yes",
    "num_steps": "2",
    "first_step": "1",
    "next_step": "2",
    "commit_number": "1",
    "reason": "late",
    "phase": "round",
    "topic": "evaluated",
}
_USUAL_OF: Mapping[str, Mapping[str, str]] = {
    "Ready": {"round_number": "0"},
    "Upload": {"layers": "all"},
    "Merged": {"layers": "all", "reason": "none", "counted": "yes"},
    "RoundsEnded": {"reason": "none"},
    "Resumed": {"reason": "none"},
}

FROM_A_CLIENT = (
    "Ready",
    "Forward request_id=9 step=1 micro_batch=0",
    "Forward request_id=9 step=1 micro_batch=1",
    "Forward request_id=9 step=0",
    "Backward request_id=1",
    "Commit step=1",
    "Upload",
    "Report",
    "Goodbye",
    "Decode request_id=9",
    "EndCache",
    "Discard",
    "Keep",
    "GoBack",
    "Hello",
    "ForwardDone",
)
FROM_THE_SERVER = (
    "ForwardDone request_id=1",
    "ForwardDone request_id=9",
    "BackwardDone request_id=1",
    "BackwardDone request_id=1 gradient_BSD=none",
    "Committed step=1",
    "Committed step=2",
    "StepRefused step=1 next_step=2",
    "StepRefused step=2 next_step=3",
    "StepRefused step=1 next_step=1",
    "RoundOpened",
    "Merged round_number=1",
    "Merged round_number=2",
    "RoundsEnded round_number=3 layers=all",
    "Resumed",
    "Declined",
    "Kept",
    "Farewell",
    "Pong",
)


def spoken(kind: str, told: Mapping[str, str], terms: Terms) -> Message:
    """Build a message from what a script says, and the usual for the rest."""
    message = _KINDS[kind]
    usual = {**_USUAL, **_USUAL_OF.get(kind, {}), **told}
    return message(**{each.name: _value(each.type, usual.get(each.name), terms) for each in fields(message)})


def line_of(text: str, terms: Terms) -> Message:
    """Build a message from a line: its kind, and `field=value` for what is not the usual."""
    kind, *words = text.split()
    return spoken(kind, dict(word.split("=", 1) for word in words), terms)


def _value(type_: Any, text: str | None, terms: Terms) -> Any:
    if type_ is TensorFrames or type_ == TensorFrames | None:
        return None if text in (None, "none") else _tensor(text, terms)
    if type_ == tuple[TensorFrames, ...]:
        return _layers(text or "none", terms)
    return _PLAIN[type_](text) if text is not None else type_()


def _tensor(text: str, terms: Terms) -> TensorFrames:
    """Read `2x3xD` (D is the run's hidden width, P its number of client-side tensors), `2x3xD:bf16` or `2x3xD:nan`."""
    shape, _, dtype = text.partition(":")
    named = {"D": terms.hidden_size, "P": terms.num_trainable}
    sizes = [named.get(size) if size in named else int(size) for size in shape.split("x")]
    zeros = frames_of(*(size for size in sizes if size is not None), dtype=dtype if dtype in DTYPE_BYTES else "f32")
    if dtype != "nan":
        return zeros
    return replace(zeros, buffers=(struct.pack("<f", math.nan) * math.prod(zeros.shape),))


def _layers(text: str, terms: Terms) -> tuple[TensorFrames, ...]:
    layers = [
        frames_of(*shape, dtype=dtype) for shape, dtype in zip(terms.layer_shapes, terms.layer_dtypes, strict=True)
    ]
    kinds: Mapping[str, Callable[[], list[TensorFrames]]] = {
        "none": list,
        "all": lambda: layers,
        "first": lambda: layers[:1],
        "reversed": lambda: layers[::-1],
        "bf16": lambda: [frames_of(*layer.shape, dtype="bf16") for layer in layers],
        "twice": lambda: layers * 2,
        "with-one-more": lambda: [*layers, frames_of(1)],
    }
    return tuple(kinds[text]())


def _metrics(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in (pair.rsplit(":", 1) for pair in text.split(","))}


_PLAIN: Mapping[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    bool: lambda text: text == "yes",
    str: lambda text: "" if text == "none" else text.replace("_", " "),
    tuple[int, ...]: lambda text: () if text == "none" else tuple(map(int, text.split(","))),
    tuple[str, ...]: lambda text: tuple(text.split(",")),
    dict[str, float]: _metrics,
}
