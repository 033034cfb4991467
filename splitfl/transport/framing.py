"""How large a frame and a message are on the wire: ZMTP's framing, that of keys, and the checksum where there are none.

What counts bytes of a connection counts them here: ZeroMQ's own limit on a frame, the traffic, and the watch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from splitfl.protocol.codec import MAX_HEADER_BYTES
from splitfl.protocol.messages import Buffer

CHECKSUM_BYTES = 4
# ZMTP 3.1 (https://rfc.zeromq.org/spec/37): before each frame flags and a length of 1 or, for larger ones, 8 bytes.
_SMALL_FRAME_BYTES = 255
_SHORT_BYTES, _LONG_BYTES = 2, 9
# CurveZMQ (https://rfc.zeromq.org/spec/26): each frame is a MESSAGE command. It has a name of 8 bytes, a nonce of 8,
# and a box that is 16 longer than its content, with the flags in it. ZeroMQ counts all of it against ZMQ_MAXMSGSIZE.
_CURVE_BYTES = 33


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """What one kind of connection adds to a message."""

    has_keys: bool
    has_checksum: bool

    @classmethod
    def of(cls, address: str, *, has_keys: bool) -> "Framing":
        """Return the framing of an address; within one process nothing is encrypted."""
        return cls(
            has_keys=has_keys and not address.startswith("inproc"),
            has_checksum=address.startswith("tcp") and not has_keys,
        )

    def largest_frame(self, max_frame_bytes: int) -> int:
        """Return what ZMQ_MAXMSGSIZE must be so that frames of `max_frame_bytes`, and any header, pass."""
        return max(max_frame_bytes, MAX_HEADER_BYTES) + self._more_in_a_frame

    def num_bytes(self, frames: Sequence[Buffer]) -> int:
        """Return what frames take on a connection, without the headers of TCP."""
        return sum(map(self._frame_bytes, map(len, frames)))

    def most_bytes(self, message_bytes: int, message_frames: int) -> int:
        """Return the most that a message of so many bytes in so many frames takes, checksum included."""
        checksum = self._frame_bytes(CHECKSUM_BYTES) if self.has_checksum else 0
        return message_bytes + message_frames * (_LONG_BYTES + self._more_in_a_frame) + checksum

    @property
    def _more_in_a_frame(self) -> int:
        return _CURVE_BYTES if self.has_keys else 0

    def _frame_bytes(self, content_bytes: int) -> int:
        body = content_bytes + self._more_in_a_frame
        return body + (_SHORT_BYTES if body <= _SMALL_FRAME_BYTES else _LONG_BYTES)
