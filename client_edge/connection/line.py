"""A data connection and its heartbeat, from the welcome until they are lost: what is on its way, and who is alive.

The server's answers to the heartbeats on the control connection show that it lives, however long a barrier or a merge
takes. When they stop, a wait is over. They also say what has arrived on the data connection, so one that is dead in one
direction is noticed.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from client_edge.connection.heard import heard
from client_edge.connection.heartbeat import Heartbeat
from client_edge.connection.joining import Joined
from client_edge.connection.progress import Arriving, Progress
from client_edge.connection.setbacks import Setbacks
from splitfl.config.operation import LinkSection
from splitfl.errors import PeerGone
from splitfl.protocol.codec import MAX_HEADER_BYTES, payload
from splitfl.protocol.messages import Buffer, Leave, Message
from splitfl.session.limits import limits_of
from splitfl.session.terms import Terms
from splitfl.transport.tcp_info import Counters
from splitfl.transport.zeromq import Endpoint

# Bytes of a file that are asked for at once at most: 20 Mbit/s for 200 ms are 0.5 MB. The server's queue bounds it too.
WINDOW_BYTES = 1 << 21
# Messages without tensors that a server may have sent while this client computes.
_SMALL_ONES = 16
# How long one look for a message lasts at most.
_POLL_S = 0.2
# A message of so many bytes may take long enough to say how far it is.
_LARGE_BYTES = 1 << 24
# So much on the wire is more than ZeroMQ's heartbeats.
_MOVED_BYTES = 1 << 14
# A wait is worth a line when it has lasted a while, and again from time to time.
_WAITING_AFTER_S = 2.0
_WAITING_EVERY_S = 10.0
# How long closing waits for what is still to be sent.
_LINGER_S = 1.0


@dataclass(slots=True, kw_only=True, eq=False)
class Wait:
    """One wait for a message: what for, and how it is told of meanwhile."""

    what: str
    arriving: Arriving
    say_at_s: float


class Line:
    """Both connections of one session. Use from one thread."""

    def __init__(
        self,
        joined: Joined,
        connect: Callable[[LinkSection], Endpoint],
        setbacks: Setbacks,
        *,
        on_waiting: Callable[[str], None],
    ) -> None:
        """`connect` makes the control connection; waits for others are taken note of in `setbacks`."""
        self._endpoint = joined.endpoint
        self._bounds = joined.run.link
        self._setbacks = setbacks
        self._on_waiting = on_waiting
        # before there are terms the server sends its welcome and pieces of files
        self._endpoint.bound_messages(
            num_bytes=MAX_HEADER_BYTES + self._bounds.frame_bytes, num_frames=2, num_waiting_bytes=2 * WINDOW_BYTES
        )
        self._heartbeat = Heartbeat(connect, joined.welcome.session, self._bounds)
        self._sent, self._received = 0, joined.num_bytes
        self._upload: _Upload | None = None
        self._progress: tuple[int, ...] = ()
        self._progress_s = time.monotonic()

    def agree(self, terms: Terms) -> None:
        """Let the server send what belongs to a session of these terms, and no more."""
        limits = limits_of(terms, self._bounds, clients=1)
        self._endpoint.bound_messages(
            num_bytes=limits.message_bytes,
            num_frames=limits.message_frames,
            # one merge, the answers to what is in flight, and small ones that nothing was asked for
            num_waiting_bytes=limits.message_bytes
            + 2 * terms.max_in_flight * terms.activation_bytes
            + _SMALL_ONES * MAX_HEADER_BYTES
            + 2 * WINDOW_BYTES,
        )

    def send(self, frames: Sequence[Buffer]) -> None:
        """Send a message on the data connection; raise `PeerGone` where that is lost."""
        num_bytes, before = payload(frames), self._endpoint.on_the_wire()
        self._endpoint.send(frames)
        self._sent += num_bytes
        if num_bytes >= _LARGE_BYTES and before is not None:
            self._upload = _Upload.of(num_bytes, before.acknowledged, self._on_waiting)

    def wait_for(self, what: str) -> Wait:
        """Begin a wait."""
        wire = self._endpoint.on_the_wire()
        return Wait(
            what=what,
            arriving=Arriving(wire.received if wire is not None else None, self._on_waiting),
            say_at_s=time.monotonic() + _WAITING_AFTER_S,
        )

    def look(self, wait: Wait) -> Message | None:
        """Return the next message, None if there is none yet; raise `PeerGone` when there is none to be expected."""
        if self._heartbeat.fault is not None:
            raise self._heartbeat.fault
        begun_s = time.monotonic()
        frames = self._endpoint.recv(_POLL_S)
        if frames is not None:
            self._received += payload(frames)
            return heard(frames, max_frame_bytes=self._bounds.frame_bytes)
        wire = self._endpoint.on_the_wire()
        if self._upload is not None and wire is not None and self._upload.has_gone(wire.acknowledged):
            self._upload = None
        self._check_heartbeat(wait.what)
        if not self._check_progress(wire, wait.what):
            self._setbacks.waited(time.monotonic() - begun_s)
        self._tell(wait, wire)
        return None

    def ignore_one(self, timeout_s: float) -> None:
        """Let one message come, whatever it says."""
        self._endpoint.recv(timeout_s)

    def end(self, leave: Leave | None = None) -> None:
        """End both connections at once, or after `leave` is said; twice is fine."""
        self._heartbeat.stop(leave)
        self._endpoint.close()

    def close(self, leave: Leave | None) -> None:
        """End both connections when all that was sent is on its way."""
        self._heartbeat.stop(leave)
        self._endpoint.close(linger_s=_LINGER_S)

    def _check_heartbeat(self, what: str) -> None:
        silent_s = self._heartbeat.silent_s
        if silent_s > self._bounds.heartbeat_timeout:
            raise PeerGone(f"{self._endpoint.address} has been silent for {silent_s:.0f} s while waiting for {what}")

    def _check_progress(self, wire: Counters | None, what: str) -> int:
        """Return the bytes on their way, and notice a data connection that is dead while the control connection lives.

        Bytes that one side has sent and the other not received are on their way. They may take as long as the slowest
        link needs, and as long as the kernel moves it on (ZeroMQ's own heartbeats are too few bytes to count).
        """
        pong = self._heartbeat.pong
        on_its_way = max(0, pong.bytes_sent - self._received) + max(0, self._sent - pong.bytes_received)
        moved = (wire.acknowledged // _MOVED_BYTES, wire.received // _MOVED_BYTES) if wire is not None else (0, 0)
        progress = (pong.bytes_received, self._received, *moved)
        if not on_its_way or progress != self._progress:
            self._progress, self._progress_s = progress, time.monotonic()
            return on_its_way
        patience_s = self._bounds.heartbeat_timeout + on_its_way / self._bounds.slowest_link_bytes_per_second
        if time.monotonic() - self._progress_s > patience_s:
            raise PeerGone(f"{on_its_way} bytes were on their way for {patience_s:.0f} s while waiting for {what}")
        return on_its_way

    def _tell(self, wait: Wait, wire: Counters | None) -> None:
        """Say from time to time how far a large message is, or what the run waits for."""
        now_s, pong = time.monotonic(), self._heartbeat.pong
        coming = pong.bytes_sent - self._received
        if coming >= _LARGE_BYTES and wire is not None:
            wait.arriving.at(coming, wire.received, now_s=now_s)
        elif pong.waiting_for and now_s >= wait.say_at_s:
            self._on_waiting(pong.waiting_for)
            wait.say_at_s = now_s + _WAITING_EVERY_S


@dataclass(frozen=True, slots=True)
class _Upload:
    """A large message that was handed to ZeroMQ, and how far it has come."""

    total: int
    begun_at: int
    """Bytes that the connection had carried before it."""
    progress: Progress

    @classmethod
    def of(cls, total: int, begun_at: int, say: Callable[[str], None]) -> "_Upload":
        return cls(total, begun_at, Progress("sent", total, say, begun_at=0, now_s=time.monotonic()))

    def has_gone(self, acknowledged: int) -> bool:
        """Say how far it is, and tell whether all of it has arrived at the other machine."""
        sent = min(self.total, acknowledged - self.begun_at)
        if sent < self.total:
            self.progress.at(sent, now_s=time.monotonic())
        return sent >= self.total
