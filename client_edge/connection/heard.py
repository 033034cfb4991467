"""Messages from the server as this side takes them: decoded, and their texts made fit for a terminal and a log."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from splitfl.protocol import codec
from splitfl.protocol.messages import (
    Buffer,
    Declined,
    Merged,
    Message,
    Pong,
    Refusal,
    Resumed,
    RoundsEnded,
    StepRefused,
)
from splitfl.telemetry.units import printable

# The longest reason of a server's own names each client that is waited for.
MOST_CHARACTERS = 500

# Fields that are read by people, and by nobody else.
_TEXTS: Mapping[type[Message], tuple[str, ...]] = {
    Declined: ("reason",),
    Merged: ("reason",),
    Pong: ("waiting_for",),
    Refusal: ("code", "reason"),
    Resumed: ("reason",),
    RoundsEnded: ("reason",),
    StepRefused: ("reason",),
}


def heard(frames: Sequence[Buffer], *, max_frame_bytes: int) -> Message:
    """Decode a server's message, or raise `RemoteProtocolError`; its texts are one short line without control codes."""
    message = codec.decode(frames, max_frame_bytes=max_frame_bytes)
    names = _TEXTS.get(type(message), ())
    if not names:
        return message
    texts: dict[str, Any] = {name: plain(getattr(message, name)) for name in names}
    return replace(message, **texts)


def plain(text: str) -> str:
    """Make a peer's text one line that cannot steer a terminal, and cut it where it is longer than any of ours."""
    shown = printable(text[: MOST_CHARACTERS + 1])
    return shown if len(shown) <= MOST_CHARACTERS else shown[: MOST_CHARACTERS - 3] + "..."
