"""The only owner of the listener: it knows members and messages, and none of the rules of a run."""

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from server_backbone.door.admission import Admission
from server_backbone.door.members import Connection, Member, Members
from splitfl.errors import LocalProtocolError, PeerGone, RemoteProtocolError
from splitfl.protocol import codec
from splitfl.protocol.messages import Message, Refusal, Why
from splitfl.session.limits import Limits
from splitfl.telemetry.units import printable
from splitfl.transport.watch import Cut
from splitfl.transport.zeromq import Arrived, Listener

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Received:
    arrived: Arrived
    connection: Connection | None
    """None for a peer without a session."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Letter(_Received):
    """A message."""

    message: Message


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Damaged(_Received):
    """A message that was damaged on the way."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LockedOut(_Received):
    """Whatever was sent with a key that is not let in."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Illegal(_Received):
    """What is no message, or too large."""

    rule: str


Received: TypeAlias = Letter | Damaged | LockedOut | Illegal


class Mail:
    """What comes in and goes out. Sending never loses anybody: a lost peer is noted, and met by the loop."""

    def __init__(
        self,
        listener: Listener,
        limits: Limits,
        members: Members,
        admission: Admission,
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        self._listener = listener
        self._limits = limits
        self._members = members
        self._admission = admission
        self.gone: deque[tuple[Connection, str]] = deque()
        """Connections that were found closed, and how."""

    def receive(self, timeout_s: float) -> Received | None:
        """Return the next letter, or why it is none; None if nothing comes within `timeout_s`."""
        arrived = self._listener.recv(timeout_s)
        return None if arrived is None else self.open(arrived, self._clock())

    def wake(self) -> None:
        """Have `receive` return; any thread may call it."""
        self._listener.wake()

    def cut_off(self) -> Iterable[Cut]:
        """Return who was cut off for a message without end, since this was last asked."""
        return self._listener.sweep()

    def open(self, arrived: Arrived, now_s: float) -> Received:
        """Find out who has sent something, take note that it was heard, and decode it."""
        connection = self._members.at(arrived.peer)
        if not arrived.intact:
            return Damaged(arrived=arrived, connection=connection)
        if not self._admission.is_let_in(arrived.user_id):
            return LockedOut(arrived=arrived, connection=connection)
        num_bytes = codec.payload(arrived.frames)
        if connection is not None:
            self._count(connection, arrived, num_bytes, now_s)
        try:
            return Letter(arrived=arrived, connection=connection, message=self._read(arrived, num_bytes))
        except RemoteProtocolError as error:
            return Illegal(arrived=arrived, connection=connection, rule=str(error))

    def _read(self, arrived: Arrived, num_bytes: int) -> Message:
        if len(arrived.frames) > self._limits.message_frames:
            raise RemoteProtocolError(f"a message of more than message_frames = {self._limits.message_frames}")
        if num_bytes > self._limits.message_bytes:
            raise RemoteProtocolError(f"a message of more than message_bytes = {self._limits.message_bytes}")
        return codec.decode(arrived.frames, max_frame_bytes=self._limits.frame_bytes)

    def _count(self, connection: Connection, arrived: Arrived, num_bytes: int, now_s: float) -> None:
        connection.last_heard_s, connection.heard_at = now_s, arrived.peer
        connection.member.received += arrived.num_bytes
        if arrived.peer == connection.peer:
            connection.data_received += num_bytes

    def tell(self, member: Member, message: Message) -> None:
        """Send to a member if it is connected; if not, it learns what it must when it resumes."""
        if member.connection is not None:
            self.send(member.connection, message)

    def send(self, connection: Connection, message: Message, peer: bytes | None = None) -> None:
        """Send on a connection, or on its control connection if that is `peer`."""
        if connection.is_gone:
            return
        peer = peer or connection.peer
        frames = codec.encode(message)
        num_bytes = codec.payload(frames)
        if num_bytes > self._limits.message_bytes:
            raise LocalProtocolError(
                f"{type(message).__name__} of {num_bytes} bytes, more than message_bytes = {self._limits.message_bytes}"
            )
        try:
            connection.member.sent += self._listener.send(peer, frames)
        except PeerGone as error:
            connection.is_gone = True
            self.gone.append((connection, str(error)))
            return
        if peer == connection.peer:
            connection.data_sent += num_bytes

    def refuse(self, peer: bytes, code: Why, reason: str) -> None:
        """Tell a peer why it is sent away."""
        log.info("refused a peer (%s): %s", code, printable(reason))
        self.say_last(peer, Refusal(code=code, reason=reason))

    def say_last(self, peer: bytes, message: Message) -> None:
        """Send what nothing follows; a peer that has gone already misses nothing."""
        try:
            self._listener.send(peer, codec.encode(message))
        except PeerGone:
            log.info("a peer had gone before it was told of %s", type(message).__name__)
