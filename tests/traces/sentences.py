"""A record in one line: a message, an effect or an event, without the fields that say nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from server_backbone.door.members import Connection
from splitfl.protocol.messages import TensorFrames

# What is the same in every conversation, or of the machine and not of the protocol.
_LEFT_OUT = {
    "Hello": ("wire_version", "software", "client_id"),
    "Welcome": ("session", "run_id", "settings", "fingerprint", "file_names", "file_sizes", "file_hashes", "limits"),
    "Attach": ("session",),
    "Commit": ("loss", "norms_P", "learning_rate", "clip_coefficient"),
    "Applied": ("clip_coefficient",),
    "BackwardDone": ("norms_Q",),
    "GoesOn": ("claim",),
    "Pong": ("bytes_sent", "bytes_received"),
    "Report": ("digest",),
    "step": ("loss", "learning_rate", "clip_coefficient", "bytes_sent", "bytes_received", "compute_seconds", "round"),
    "merged": ("moved", "capped", "num_tensors", "digest", "uploads"),
    "loaded": ("digest",),
    "evaluated": ("perplexity", "num_eval_examples"),
    "federated": ("measures",),
}
# Where 0 means that there is none.
_WITHOUT_ZEROS = ("Resumed", "Applied", "Records", "Declined")
_NAMES = ("client_id", "connection")


def sentence(record: Any) -> str:
    """Say what a dataclass holds: its name, whose it is, and each field that is not empty."""
    name = type(record).__name__
    return _sentence(name, {each.name: getattr(record, each.name) for each in fields(record)})


def event_sentence(event: Mapping[str, Any]) -> str:
    """Say what an event of `metrics.jsonl` holds."""
    values = {name: value for name, value in event.items() if name not in ("event", "time", "elapsed_s")}
    return _sentence(event["event"], values)


def _sentence(kind: str, values: Mapping[str, Any]) -> str:
    left_out = _LEFT_OUT.get(kind, ())
    told = {name: value for name, value in values.items() if name not in left_out and not _is_empty(value)}
    if kind in _WITHOUT_ZEROS:
        told = {name: value for name, value in told.items() if value != 0}
    owner = [_said(told.pop(name)) for name in _NAMES if name in told]
    return " ".join([kind, *owner, *(_named(name, value) for name, value in told.items())])


def _named(name: str, value: Any) -> str:
    is_record = is_dataclass(value) and not isinstance(value, TensorFrames)
    return _said(value) if is_record else f"{name}={_said(value)}"


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | Sequence | Mapping) and not value)


def _said(value: Any) -> str:
    match value:
        case TensorFrames():
            return "x".join(map(str, value.shape)) + ("" if value.dtype == "f32" else f":{value.dtype}")
        case Connection():
            return value.member.client_id
        case True:
            return "yes"
        case float():
            return f"{value:g}"
        case str():
            return f'"{value}"' if " " in value else value
        case [TensorFrames(), *_]:
            return f"{len(value)} tensors"
        case list() | tuple():
            return ",".join(map(_paired, value))
        case Mapping():
            return ",".join(f"{name}:{_said(each)}" for name, each in value.items()) or "none"
        case _ if is_dataclass(value):
            return f"{type(value).__name__}({_said(getattr(value, fields(value)[0].name))})"
        case _:
            return str(value)


def _paired(value: Any) -> str:
    return ":".join(map(_said, value)) if isinstance(value, tuple) else _said(value)
