"""The wire as the client's loop sees it: ask, and get the answer or an error that says what was waited for.

Every wait ends: the server's answers to the heartbeats on the control connection show that it lives, however long a
barrier or a merge takes; when they stop, the wait is over. They also say what has arrived on the data connection, so
one that is dead in one direction is noticed. A connection is never mended: `reconnect` makes new ones, and `resume`
finds out where to go on.
"""

import hashlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from torch import Tensor

from client_edge.consent.gate import Gate
from client_edge.link.heard import heard
from client_edge.link.partial import PartialFile
from client_edge.link.progress import Arriving, Progress
from client_edge.link.setbacks import Setbacks
from client_edge.link.welcome import check_welcome, settings_of
from splitfl import __version__
from splitfl.config.operation import LinkSection
from splitfl.config.own import ClientSection
from splitfl.config.run import differences
from splitfl.config.trees import RunConfig
from splitfl.errors import ConfigError, LocalProtocolError, PeerGone, Refused, RemoteProtocolError, SplitflError
from splitfl.models.layout import Layout
from splitfl.protocol import codec
from splitfl.protocol.codec import MAX_HEADER_BYTES
from splitfl.protocol.messages import (
    WIRE_VERSION,
    Attach,
    BackwardDone,
    Buffer,
    Chunk,
    Committed,
    Declined,
    Farewell,
    Fetch,
    Forward,
    ForwardDone,
    Hello,
    Kept,
    Leave,
    Merged,
    Message,
    Ping,
    Pong,
    Probe,
    Probed,
    Refusal,
    Report,
    Resume,
    Resumed,
    RoundOpened,
    RoundsEnded,
    Shutdown,
    StepRefused,
    TensorFrames,
    Welcome,
    WentBack,
    Why,
)
from splitfl.protocol.tensors import describe, realise
from splitfl.session.client_session import ClientSession
from splitfl.session.limits import limits_of, messages_queued
from splitfl.session.terms import Terms
from splitfl.stopping import StopRequest
from splitfl.transport.keys import read_enrolment, read_key_pair
from splitfl.transport.reach import NOBODY_THERE
from splitfl.transport.security import ClientSecurity
from splitfl.transport.tcp_info import Counters
from splitfl.transport.zeromq import ConnectionLost, Endpoint, HandshakeFailed, Traffic

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

# How long a wait lasts at most before it looks whether a stop was asked for.
_POLL_S = 0.2
# When a client says for the first time what it is trying, and when a check takes silence for nobody.
_TRYING_AFTER_S = 1.0
_HOPELESS_AFTER_S = 3.0
# A server that lives answers a Hello at once; a new connection is tried after this.
_JOIN_AGAIN_S = 10.0
# Longer than this only a person takes to accept what a welcome says.
_READING_S = 1.0
_RETRY_LEAST_S = 0.1
_MAX_HANDSHAKES = 3
_WORTH_ANOTHER_TRY = (Why.NO_SESSION, Why.SHUTDOWN, Why.FULL)
# Bytes of a file that are asked for at once at most: 20 Mbit/s for 200 ms are 0.5 MB. The server's queue bounds it too.
_WINDOW_BYTES = 1 << 21
# Messages without tensors that a server may have sent while this client computes.
_SMALL_ONES = 16
# A message of so many bytes may take long enough to say how far it is.
_LARGE_BYTES = 1 << 24
# So much on the wire is more than ZeroMQ's heartbeats.
_MOVED_BYTES = 1 << 14
# A wait is worth a line when it has lasted a while, and again from time to time.
_WAITING_AFTER_S = 2.0
_WAITING_EVERY_S = 10.0


class RoundClosed(Exception):  # noqa: N818  # no error: the round went on without this client's upload
    """The server closed the round while this client was still at work in it."""

    def __init__(self, merged: Merged) -> None:
        super().__init__(merged.reason)
        self.merged = merged


class StepClosed(Exception):  # noqa: N818  # no error: the step is given up, and the loop goes on
    """The server went on without this client's open step."""

    def __init__(self, refusal: StepRefused) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


class ServerStops(PeerGone):
    """The server is being stopped in order; it resumes when it is started again."""


class _NoAnswer(PeerGone):
    """Nobody answered a Hello in time."""


class ComputeFailed(PeerGone):
    """The server lives and could not do what was asked for; it may be able to the next time."""


class SessionLost(PeerGone):
    """The server lives and knows nothing of this session any more."""


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


class Heartbeat:
    """The control connection: a thread that tells the server we live, and knows whether the server does."""

    def __init__(self, connect: Callable[[LinkSection], Endpoint], session: str, link: LinkSection) -> None:
        self._connect = connect
        self._session = session
        self._link = link
        self._stopping = threading.Event()
        self._leave: Leave | None = None
        self.last_heard_s = time.monotonic()
        self.pong = Pong(number=0, waiting_for="", bytes_sent=0, bytes_received=0)
        self.fault: RemoteProtocolError | None = None
        """What the server has broken on this connection, which it ends by that."""
        self.sent = 0
        self.received = 0
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def silent_s(self) -> float:
        """Seconds since the server's last sign of life."""
        return time.monotonic() - self.last_heard_s

    def stop(self, leave: Leave | None = None) -> None:
        """End the thread; `leave` is what to say when we go before the end."""
        self._leave = leave
        self._stopping.set()
        self._thread.join(timeout=5.0)

    def _beat(self) -> None:
        try:
            with self._connect(self._link) as endpoint:
                endpoint.bound_messages(num_bytes=MAX_HEADER_BYTES, num_frames=1)
                self._talk(endpoint)
        except RemoteProtocolError as error:
            self.fault = error
        except SplitflError as error:  # the silence that follows ends the wait on the data connection, if that lives
            log.info("the control connection ended: %s", error)

    def _talk(self, endpoint: Endpoint) -> None:
        endpoint.send(codec.encode(Attach(session=self._session)))
        number = 0
        while not self._stopping.is_set():
            number += 1
            endpoint.send(codec.encode(Ping(number=number)))
            self._listen(endpoint, time.monotonic() + self._link.heartbeat_interval)
        if self._leave is not None:
            endpoint.send(codec.encode(self._leave))
        self.sent, self.received = endpoint.traffic.sent, endpoint.traffic.received

    def _listen(self, endpoint: Endpoint, until_s: float) -> None:
        while (left_s := until_s - time.monotonic()) > 0 and not self._stopping.is_set():
            frames = endpoint.recv(min(left_s, 0.2))
            if frames is None:
                continue
            match heard(frames, max_frame_bytes=self._link.frame_bytes):
                case Pong() as pong:
                    self.pong = pong
                    self.last_heard_s = time.monotonic()
                case Refusal() | Shutdown():
                    pass  # it comes on the data connection too, or that breaks
                case other:
                    raise RemoteProtocolError(f"{type(other).__name__} on the control connection")
            self.sent, self.received = endpoint.traffic.sent, endpoint.traffic.received


class Link:
    """One client's session with its server, over one connection after another. Use from one thread."""

    def __init__(
        self,
        client: ClientSection,
        gate: Gate,
        stop: StopRequest | None = None,
        *,
        tell: Callable[[str], None] = log.warning,
        is_patient: bool = True,
    ) -> None:
        """Connect and join; raise `Refused`, or `PeerGone` when nobody answers in time.

        What the `gate` does not let through is raised before anything but this client's name was sent. `tell` gets a
        sentence while nobody answers; without patience that nobody listens is the end of it. Every wait
        raises `Stopped` soon after a `stop` is asked for.
        """
        self._client = client
        self.gate = gate
        self.stop = stop or StopRequest()
        self._security = _security_of(client)
        self.address = client.server_address
        if client.enrolment is not None:
            self.address = read_enrolment(client.enrolment).server_address
        self._bounds = LinkSection()
        self._heartbeat: Heartbeat | None = None
        self._session: ClientSession | None = None
        self._terms_of: Callable[[RunConfig], Terms] | None = None
        self._earlier = Traffic()
        self._setbacks = Setbacks()
        self._tell, self._is_patient = tell, is_patient
        self._say_trying_s = time.monotonic() + _TRYING_AFTER_S
        self.is_closed = False
        self.leaving = ""
        """Why we go before the end, to be told to the server; "" when we do not."""
        self.comes_back = False
        """Whether we then mean to be waited for."""
        self._data_sent = self._data_received = 0
        self._upload: _Upload | None = None
        self._progress: tuple[int, ...] = ()
        self._progress_s = 0.0
        self.bytes_of_files = 0
        self.is_parting = False
        """Whether all rounds are merged."""
        self.on_waiting: Callable[[str], None] = lambda _: None
        """Told from time to time what the run waits for, while we wait with it."""
        self.on_lost: Callable[[str], None] = lambda _: None
        """Told of every connection that is lost, and of every attempt at a new one."""
        self.on_settings: Callable[[RunConfig, RunConfig], None] = lambda _before, _now: None
        """Told of the run's settings, before and now, where a server that came back has others."""
        self._endpoint, self.welcome, self.run = self._first_join()
        joined_s = time.monotonic()
        self._admit(self.welcome, self.run)
        if time.monotonic() - joined_s > _READING_S:  # a server takes such a silence for the end
            self._join_again()
        else:
            self._begin()

    def _join_again(self) -> None:
        try:
            self._start_over()
        except PeerGone as gone:
            raise PeerGone(
                f"{self.address} has gone while its settings were read ({gone}); that they were accepted is kept: start"
                " the same command when the server is back"
            ) from None

    def _admit(self, welcome: Welcome, run: RunConfig) -> None:
        try:
            self.gate.admit(welcome, run, address=self.address, server_key=self.server_key)
        except BaseException:
            self._endpoint.close()
            raise

    def _first_join(self) -> tuple[Endpoint, Welcome, RunConfig]:
        """Join for the first time; a connection that breaks while it is made, or is silent, is made again."""
        timeout_s = self._client.connect_timeout
        deadline_s = time.monotonic() + timeout_s
        failed_handshakes, reason = 0, ""
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                welcome, run = self._join_as_wanted(min(left_s, _JOIN_AGAIN_S))
                return self._endpoint, welcome, run
            except HandshakeFailed:
                failed_handshakes += 1
                if failed_handshakes >= _MAX_HANDSHAKES:
                    raise
            except (ConnectionLost, _NoAnswer) as gone:
                log.info("joining again: %s", gone)
                reason = str(gone)
                self._say_trying(reason)
                if not self._is_patient and isinstance(gone, ConnectionLost):
                    break
            self.stop.sleep(_RETRY_LEAST_S)
        tried = f" after {timeout_s:g} s of trying to connect" if self._is_patient else ""
        raise PeerGone(
            f"no answer from {self.address}{tried} ({reason}): is the server running, and is this its address?"
        )

    def _say_trying(self, found: str = "") -> None:
        """Say what is tried when the first answer takes long, and what is known of it."""
        if time.monotonic() < self._say_trying_s:
            return
        self._say_trying_s = time.monotonic() + _WAITING_EVERY_S
        found = found or self._endpoint.finding()
        what = f"nobody listens at {self.address} yet" if found == NOBODY_THERE else f"{self.address}: {found}"
        self._tell(f"{what}; trying for up to {self._client.connect_timeout:g} s")

    @property
    def is_encrypted(self) -> bool:
        """Whether keys are in use."""
        return self._security is not None

    @property
    def server_key(self) -> str:
        """The public key that the server has to have, "" without keys."""
        return self._security.server_public_key if self._security is not None else ""

    @property
    def session(self) -> ClientSession:
        """The session's state, once `agree` has set its terms."""
        if self._session is None:
            raise RuntimeError("the session has no terms yet")
        return self._session

    @property
    def bytes_sent(self) -> int:
        """Bytes sent so far on all connections."""
        return self._earlier.sent + self._endpoint.traffic.sent + (self._heartbeat.sent if self._heartbeat else 0)

    @property
    def bytes_received(self) -> int:
        """Bytes received so far on all connections."""
        return (
            self._earlier.received
            + self._endpoint.traffic.received
            + (self._heartbeat.received if self._heartbeat else 0)
        )

    def agree(self, terms_of: Callable[[RunConfig], Terms]) -> None:
        """Set how the session's terms follow from the run's settings, known once the model's config has arrived."""
        self._terms_of = terms_of
        self._session = self._new_session(terms_of(self.run))
        self._bound_messages()

    def _bound_messages(self) -> None:
        """Bound what the server may send: before the terms are known its welcome and pieces of files, then more."""
        link = self.run.link
        if self._terms_of is None:
            self._endpoint.bound_messages(
                num_bytes=MAX_HEADER_BYTES + link.frame_bytes, num_frames=2, num_waiting_bytes=2 * _WINDOW_BYTES
            )
            return
        terms = self.session.terms
        limits = limits_of(terms, link, clients=1)
        self._endpoint.bound_messages(
            num_bytes=limits.message_bytes,
            num_frames=limits.message_frames,
            # one merge, the answers to what is in flight, and small ones that nothing was asked for
            num_waiting_bytes=limits.message_bytes
            + 2 * terms.max_in_flight * terms.activation_bytes
            + _SMALL_ONES * MAX_HEADER_BYTES
            + 2 * _WINDOW_BYTES,
        )

    def _new_session(self, terms: Terms) -> ClientSession:
        return ClientSession(terms)

    def agree_again(self) -> None:
        """Begin the session's state anew on the same connection, after going back."""
        self._session = self._new_session(self.session.terms)
        self._setbacks.goes_back()

    def resume(self, *, held_round: int, step: int, commit_number: int, pending_step: int) -> Resumed:
        """Say where this client is, and hear where it goes on; needed first on every connection."""
        self._send(
            self.session.resume(
                held_round=held_round, step=step, commit_number=commit_number, pending_step=pending_step
            )
        )
        resumed = self._answer(Resumed, "the server's word on where to go on")
        self.is_parting = resumed.is_parting
        return resumed

    def reconnect(self, why: PeerGone, resume_at: int, *, within_s: float | None = None) -> None:
        """Make new connections and join again, as often as it takes.

        Raises `PeerGone` when there was no progress for `client.reconnect_timeout`, or `within_s` if that is less,
        however often it has joined.
        """
        patience_s = min(within_s or math.inf, self._client.reconnect_timeout)
        reason = str(why)
        while True:
            self._setbacks.lost(now_s=time.monotonic())
            if self._setbacks.failing_s(now_s=time.monotonic()) >= patience_s:
                raise PeerGone(
                    f"gave up on {self.address} after {patience_s:g} s (client.reconnect_timeout):"
                    f" {reason}; what was learned is kept: start the same command again to resume at step {resume_at}"
                )
            self.on_lost(f"server lost ({reason}), retry {self._setbacks.count}, resuming at step {resume_at}")
            self.stop.sleep(self._setbacks.pause_s)
            try:
                self._start_over()
            except PeerGone as gone:
                reason = str(gone)
            except Refused as refused:
                if refused.code not in _WORTH_ANOTHER_TRY:
                    raise
                reason = str(refused)
            else:
                return

    def _start_over(self) -> None:
        self._end_connections()
        welcome, run = self._join_as_wanted(_JOIN_AGAIN_S)
        try:
            self._check_same(welcome, run)
        except Refused:
            self._endpoint.close()
            raise
        self._admit(welcome, run)
        before, self.welcome, self.run = self.run, welcome, run
        self._begin()
        if run != before:
            self.on_settings(before, run)

    def _check_same(self, welcome: Welcome, run: RunConfig) -> None:
        """Raise `Refused` unless it is the same run, to which this client has agreed; how it is operated may change."""
        if welcome.run_id != self.welcome.run_id:
            raise Refused(
                f"{self.address} now serves run {welcome.run_id} and no longer {self.welcome.run_id}: start the client"
                " again to take part in that"
            )
        other = [
            f"{name} (was {then!r}, is {now!r})"
            for before, after in ((self.run.identity(), run.identity()), (self.run.exposure(), run.exposure()))
            for name, then, now in differences(before, after)
        ]
        if other:
            raise Refused(
                f"{self.address} now serves run {welcome.run_id} with other settings than this client has agreed to:"
                f" {'; '.join(dict.fromkeys(other))}. Start the client again to take part in that"
            )

    def _join_as_wanted(self, timeout_s: float) -> tuple[Welcome, RunConfig]:
        """Connect and join, and once more where the run wants connections of another kind."""
        for _ in range(2):
            self._endpoint = self._connect(self._bounds)
            welcome = self._join(timeout_s)
            try:
                run = settings_of(welcome)
                self.gate.check(welcome, run)  # before its bounds become ours
            except SplitflError:
                self._endpoint.close()
                raise
            if _fits(self._bounds, run.link):
                return welcome, run
            self._bounds = run.link
            self._end_endpoint()
        raise _NoAnswer(f"{self.address} says something else of its link with every answer")

    def _begin(self) -> None:
        self._bounds = self.run.link
        self._data_sent = 0
        self._upload = None
        self._progress, self._progress_s = (), time.monotonic()
        self._heartbeat = Heartbeat(self._connect, self.welcome.session, self._bounds)
        if self._terms_of is not None:
            self._session = self._new_session(self._terms_of(self.run))
        self._bound_messages()

    def _connect(self, bounds: LinkSection) -> Endpoint:
        return Endpoint(
            self.address,
            max_frame_bytes=bounds.frame_bytes,
            heartbeat_interval=bounds.heartbeat_interval,
            heartbeat_timeout=bounds.heartbeat_timeout,
            security=self._security,
            socks_proxy=self._client.socks_proxy,
        )

    def _end_connections(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._earlier.sent += self._heartbeat.sent
            self._earlier.received += self._heartbeat.received
            self._heartbeat = None
        self._end_endpoint()

    def _end_endpoint(self) -> None:
        self._endpoint.close()
        self._earlier.sent += self._endpoint.traffic.sent
        self._earlier.received += self._endpoint.traffic.received
        self._endpoint.traffic = Traffic()

    def take_leave(self, reason: str) -> None:
        """Take up this client's place in the run, to give it up for good: who has not resumed has only looked."""
        self._send(Resume(held_round=0, step=0, commit_number=0, pending_step=0))
        with suppress(RemoteProtocolError, PeerGone):
            self._endpoint.recv(_JOIN_AGAIN_S)  # whatever it says: we go
        self.leaving, self.comes_back = reason, False

    def close(self) -> None:
        """End both connections, saying why if we go before the end (`leaving`)."""
        self.is_closed = True
        if self._heartbeat is not None:
            reason = self.leaving
            self._heartbeat.stop(Leave(reason=reason, comes_back=self.comes_back) if reason else None)
        self._endpoint.close(linger_s=1.0)
        if self.gate.allowance is not None:
            self.gate.allowance.sent_at_last(self.bytes_sent)

    def probe(self) -> tuple[int, float]:
        """Send one full frame there and back, before resuming; return its bytes and the seconds that it took."""
        sent = os.urandom(self._bounds.frame_bytes)
        frame = TensorFrames(dtype="u8", shape=(len(sent),), buffers=(sent,))
        begun_s = time.monotonic()
        self._send(Probe(content=frame))
        came = self._answer(Probed, "a full frame to come back")
        if b"".join(came.content.buffers) != sent:
            raise RemoteProtocolError(f"a frame of {len(sent)} bytes came back with other content")
        return len(sent), time.monotonic() - begun_s

    # files of the welcome

    def fetch(self, name: str, folder: Path) -> Path:
        """Return a file of the welcome, from `folder` if it is there with the announced hash, else from the server."""
        size, digest = self._announced(name)
        path = self.place_of(name, folder)
        if path.exists() and _hash_of(path) == digest:
            return path
        with PartialFile(folder, digest, size) as part:
            begun_at = part.num_bytes
            self._receive_file(part, name, size)
            if begun_at and part.digest() != digest:  # what an earlier start had left was no part of it
                part.empty()
                self._receive_file(part, name, size)
            if part.digest() != digest:
                part.empty()
                raise RemoteProtocolError(f"{name} arrived with another hash than announced: start the client again")
            part.become(path)
        self.bytes_of_files += size
        return path

    def _receive_file(self, part: PartialFile, name: str, size: int) -> None:
        """Fetch what is missing of a file, over as many connections as it takes."""
        progress = Progress("received", size, self._tell, begun_at=part.num_bytes, now_s=time.monotonic())
        while part.num_bytes < size:
            try:
                self._fetch_pieces(part, name, size, progress)
            except PeerGone as gone:
                self.reconnect(gone, resume_at=1)

    def _fetch_pieces(self, part: PartialFile, name: str, size: int, progress: Progress) -> None:
        """Fetch the rest of a file, with several pieces on their way at once so that a long link is filled."""
        step = self._bounds.frame_bytes
        window = step * max(1, min(messages_queued(self._bounds) // 2, _WINDOW_BYTES // step))
        asked = part.num_bytes
        while part.num_bytes < size:
            while asked < size and asked - part.num_bytes < window:
                self._send(Fetch(name=name, offset=asked))
                asked += step
            part.write(self._chunk(name, part.num_bytes, min(step, size - part.num_bytes)))
            self._setbacks.reached(name, part.num_bytes)
            progress.at(part.num_bytes, now_s=time.monotonic())

    def place_of(self, name: str, folder: Path) -> Path:
        """Return where `fetch` looks for a file and leaves it: its SHA-256 (hex) is its name."""
        return folder / self._announced(name)[1]

    def digest_of(self, name: str) -> str:
        """Return the SHA-256 (hex) that the welcome announces for a file."""
        return self._announced(name)[1]

    def _announced(self, name: str) -> tuple[int, str]:
        at = self.welcome.file_names.index(name)
        return self.welcome.file_sizes[at], self.welcome.file_hashes[at]

    def _chunk(self, name: str, offset: int, num_bytes: int) -> bytes:
        chunk = self._answer(Chunk, f"{name} from byte {offset}")
        content = b"".join(chunk.content.buffers)
        if (chunk.name, chunk.offset, len(content)) != (name, offset, num_bytes):
            raise RemoteProtocolError(
                f"a piece of {chunk.name!r:.64} of {len(content)} bytes at {chunk.offset} in answer to {name} at"
                f" {offset}, {num_bytes} bytes"
            )
        return content

    # micro-batches and steps

    def send_forward(self, hidden_BSD: Tensor, layout: Layout, *, step: int, micro_batch: int) -> int:
        """Send activations on; returns the request's number. `step` 0 is an evaluation."""
        frames = describe(hidden_BSD, self._bounds.frame_bytes)
        message = self.session.forward(
            step=step,
            micro_batch=micro_batch,
            hidden_BSD=frames,
            lengths_B=layout.lengths_B,
            example_lengths=layout.example_lengths,
        )
        self._send(message)
        return message.request_id

    def decode(
        self,
        cache_id: int,
        hidden_BSD: Tensor,
        lengths_B: tuple[int, ...],
        beams_B: tuple[int, ...],
        *,
        adapters_off: bool = False,
    ) -> Tensor:
        """Return the backbone's activations of a generation's new positions; raise `Refused` when it declines."""
        frames = describe(hidden_BSD, self._bounds.frame_bytes)
        self._send(self.session.decode(cache_id, frames, lengths_B, beams_B, adapters_off=adapters_off))
        match self._one_of((ForwardDone, Declined), "the next token"):
            case ForwardDone(hidden_BSD=answer_BSD):
                return self._real(answer_BSD)
            case Declined(reason=reason):
                raise Refused(f"{self.address} declined: {reason}")
        raise RemoteProtocolError("an answer that is neither activations nor a refusal")

    def end_cache(self, cache_id: int) -> None:
        """Have a generation's cache freed; there is no answer."""
        self._send(self.session.end_cache(cache_id))

    def send_backward(self, request_id: int, gradient_BSD: Tensor) -> None:
        """Send the gradient of the activations that came back for a request."""
        self._send(self.session.backward(request_id, describe(gradient_BSD, self._bounds.frame_bytes)))

    def receive(self) -> tuple[int, Tensor | None, bool]:
        """Return the next answer to a micro-batch: (request, tensor, whether it is a gradient)."""
        match self._one_of((ForwardDone, BackwardDone), "the backbone"):
            case ForwardDone(request_id=number, hidden_BSD=frames):
                return number, self._real(frames), False
            case BackwardDone(request_id=number, gradient_BSD=frames):
                if (frames is not None) != self.run.bottom_trains:
                    rule = "needs its gradient" if self.run.bottom_trains else "has no use for a gradient"
                    raise RemoteProtocolError(f"an answer of the wrong kind: what is below the first cut {rule}")
                return number, None if frames is None else self._real(frames), True
        raise RemoteProtocolError("an answer that is neither activations nor a gradient")

    def commit(self, *, num_label_tokens: int, loss: float, norms_P: Tensor) -> Committed:
        """Ask for the step to be applied; raise `StepClosed` when it is refused: then it is applied on neither side."""
        frames = describe(norms_P, self._bounds.frame_bytes)
        self._send(self.session.commit(num_label_tokens=num_label_tokens, loss=loss, norms_P=frames))
        return self._answer(Committed, "the commit of this step")

    def realise(self, layers: Sequence[TensorFrames]) -> list[Tensor]:
        """Return layers as tensors; raise `RemoteProtocolError` for poison."""
        return [self._real(layer) for layer in layers]

    def _real(self, frames: TensorFrames) -> Tensor:
        return realise(frames, max_rms=min(self._bounds.max_rms, self.gate.policy.max_rms))

    # rounds

    def open_round(self, num_examples: int) -> RoundOpened | RoundsEnded:
        """Wait for the next round, or for the word that there is none."""
        self._send(self.session.ready(num_examples))
        return cast(RoundOpened | RoundsEnded, self._one_of((RoundOpened, RoundsEnded), "the next round"))

    def merge(self, layers: Mapping[str, Tensor], *, num_examples: int, num_tokens: int) -> Merged:
        """Hand over this round's layers and wait for everyone's; the tensors must not be written to meanwhile."""
        frames = tuple(describe(layer, self._bounds.frame_bytes) for layer in layers.values())
        self._send(self.session.upload(num_examples=num_examples, num_tokens=num_tokens, layers=frames))
        return self._await_merge()

    def sit_out(self) -> Merged:
        """Wait for the merge of a round that others train in, or that we have uploaded for on another connection."""
        if not self.session.awaits_merge:
            self.session.sit_out()
        return self._await_merge()

    def report(self, topic: str, *, phase: str, round_number: int, metrics: dict[str, float], digest: str = "") -> None:
        """Tell the server a measurement."""
        self._send(Report(topic=topic, phase=phase, round_number=round_number, metrics=metrics, digest=digest))

    def goodbye(self, metrics: dict[str, float]) -> None:
        """End the session in order."""
        self._send(self.session.goodbye(metrics))
        self._answer(Farewell, "the server's farewell")

    def _await_merge(self) -> Merged:
        try:
            merged = self._answer(Merged, "the merge of this round")
        except RoundClosed as closed:  # the merge itself, come while we asked for it
            merged = closed.merged
        return merged

    # one answer

    def _join(self, timeout_s: float) -> Welcome:
        name = self._client.client_id
        self._endpoint.send(
            codec.encode(Hello(wire_version=WIRE_VERSION, software=f"splitfl {__version__}", client_id=name))
        )
        try:
            frames = self._first_answer(timeout_s)
            if frames is None:
                raise _NoAnswer(f"{self._endpoint.finding()}, for {timeout_s:.3g} s")
            self._data_received = _payload(frames)
            match heard(frames, max_frame_bytes=self._bounds.frame_bytes):
                case Welcome() as welcome:
                    check_welcome(welcome)
                    return welcome
                case Refusal(code=code, reason=reason):
                    raise Refused(f"{self.address} refused {name}: {reason} ({code})", code=code)
                case other:
                    raise RemoteProtocolError(f"{type(other).__name__} in answer to Hello")
        except SplitflError:
            self._endpoint.close()
            raise

    def _first_answer(self, timeout_s: float) -> list[memoryview] | None:
        begun_s = time.monotonic()
        while (left_s := begun_s + timeout_s - time.monotonic()) > 0:
            self.stop.check()
            frames = self._endpoint.recv(min(left_s, _POLL_S if self._is_patient else _POLL_S / 4))
            if frames is not None:
                self._say_trying_s = math.inf
                return frames
            self._say_trying()
            if not self._is_patient and self._is_hopeless(time.monotonic() - begun_s):
                raise ConnectionLost(self._endpoint.finding())
        return None

    def _is_hopeless(self, waited_s: float) -> bool:
        return self._endpoint.is_refused or (not self._endpoint.is_reached and waited_s > _HOPELESS_AFTER_S)

    def _send(self, message: Message) -> None:
        frames = codec.encode(message)
        if (limit := self.welcome.limits.get("message_bytes")) and _payload(frames) > limit:
            raise LocalProtocolError(
                f"{type(message).__name__} of {_payload(frames)} bytes, more than message_bytes = {limit:g}"
            )
        allowance = self.gate.allowance
        if allowance is not None:
            if isinstance(message, Forward) and message.step and not message.micro_batch:
                allowance.step()
            allowance.sent(self.bytes_sent + _payload(frames))
        before = self._endpoint.on_the_wire()
        self._endpoint.send(frames)
        self._data_sent += _payload(frames)
        if _payload(frames) >= _LARGE_BYTES and before is not None:
            self._upload = _Upload.of(_payload(frames), before.acknowledged, self.on_waiting)

    def _answer(self, wanted: type[M], what: str) -> M:
        """Wait for an answer of this kind; what else may come instead is raised."""
        return cast(M, self._one_of((wanted,), what))

    def _one_of(self, wanted: tuple[type, ...], what: str) -> Message:
        while True:
            message = self._next(what)
            match message:
                case Refusal(code=Why.NO_SESSION, reason=reason):
                    raise SessionLost(reason)
                case Refusal(code=Why.FAILED, reason=reason):
                    raise ComputeFailed(reason)
                case Refusal(code=code, reason=reason):
                    raise Refused(f"{reason} ({code})", code=code)
                case Shutdown(resume_at=step):
                    raise ServerStops(f"{self.address} is being stopped, and goes on at step {step} when it is back")
                case Chunk() | Probed():
                    pass
                case _ if self._session is None:
                    raise RemoteProtocolError(f"{type(message).__name__} while waiting for {what}")
                case _:
                    checked = self.session.receive(message)
                    if checked is None:
                        continue
            self._note_progress(message)
            if isinstance(message, RoundOpened) and message.num_steps and self.gate.allowance is not None:
                self.gate.allowance.round(message.round_number)
            if isinstance(message, Merged):
                self.is_parting = message.is_last
            elif isinstance(message, RoundsEnded):
                self.is_parting = True
            match message:
                case StepRefused():
                    self.session.abandon_step(message.next_step)
                    raise StepClosed(message)
                case Merged() if Merged not in wanted:
                    raise RoundClosed(message)
            if not isinstance(message, wanted):
                raise RemoteProtocolError(f"{type(message).__name__} while waiting for {what}")
            return message

    def _note_progress(self, message: Message) -> None:
        match message:
            case ForwardDone() | BackwardDone() | Kept() | WentBack() | Declined():
                self._setbacks.answered()
            case Committed(step=step):
                self._setbacks.reached("step", step)
            case RoundOpened(round_number=number):
                self._setbacks.reached("round", number)
            case Merged(round_number=number):
                self._setbacks.reached("merge", number)

    def _next(self, what: str) -> Message:
        say_at_s = time.monotonic() + _WAITING_AFTER_S
        wire = self._endpoint.on_the_wire()
        arriving = Arriving(wire.received if wire is not None else None, self.on_waiting)
        while True:
            self.stop.check()
            if self._heartbeat is not None and self._heartbeat.fault is not None:
                raise self._heartbeat.fault
            asked_s = time.monotonic()
            frames = self._endpoint.recv(_POLL_S)
            if frames is not None:
                self._data_received += _payload(frames)
                return heard(frames, max_frame_bytes=self._bounds.frame_bytes)
            if self.gate.allowance is not None:
                self.gate.allowance.sent(self.bytes_sent)
            wire = self._endpoint.on_the_wire()
            if self._upload is not None and wire is not None and self._upload.has_gone(wire.acknowledged):
                self._upload = None
            if self._heartbeat is None:
                continue
            if self._heartbeat.silent_s > self._bounds.heartbeat_timeout:
                raise PeerGone(
                    f"{self.address} has been silent for {self._heartbeat.silent_s:.0f} s while waiting for {what}"
                )
            if not self._check_progress(self._heartbeat.pong, wire, what):
                self._setbacks.waited(time.monotonic() - asked_s)
            coming = self._heartbeat.pong.bytes_sent - self._data_received
            if coming >= _LARGE_BYTES and wire is not None:
                arriving.at(coming, wire.received, now_s=time.monotonic())
            elif self._heartbeat.pong.waiting_for and time.monotonic() >= say_at_s:
                self.on_waiting(self._heartbeat.pong.waiting_for)
                say_at_s = time.monotonic() + _WAITING_EVERY_S

    def _check_progress(self, pong: Pong, wire: Counters | None, what: str) -> int:
        """Return the bytes on their way, and notice a data connection that is dead while the control connection lives.

        What one side has sent and the other not received is on its way; it may take as long as the slowest link needs,
        and as long as the kernel moves it on (ZeroMQ's own heartbeats are too few bytes to count).
        """
        on_its_way = max(0, pong.bytes_sent - self._data_received) + max(0, self._data_sent - pong.bytes_received)
        moved = (wire.acknowledged // _MOVED_BYTES, wire.received // _MOVED_BYTES) if wire is not None else (0, 0)
        progress = (pong.bytes_received, self._data_received, *moved)
        if not on_its_way or progress != self._progress:
            self._progress, self._progress_s = progress, time.monotonic()
            return on_its_way
        patience_s = self._bounds.heartbeat_timeout + on_its_way / self._bounds.slowest_link_bytes_per_second
        if time.monotonic() - self._progress_s > patience_s:
            raise PeerGone(f"{on_its_way} bytes were on their way for {patience_s:.0f} s while waiting for {what}")
        return on_its_way


def _fits(bounds: LinkSection, wanted: LinkSection) -> bool:
    """Tell whether connections that were made with some bounds are as a run wants them."""
    same_heart = ("heartbeat_interval", "heartbeat_timeout")
    has_same_heart = all(getattr(bounds, name) == getattr(wanted, name) for name in same_heart)
    return has_same_heart and wanted.frame_bytes <= bounds.frame_bytes


def _payload(frames: Sequence[Buffer]) -> int:
    return sum(map(len, frames))


def _security_of(client: ClientSection) -> ClientSecurity | None:
    """Return the keys that the settings name; a key pair and an enrolment file only mean something together."""
    if client.keys is None and client.enrolment is None:
        return None
    if client.keys is None or client.enrolment is None:
        missing = "client.keys" if client.keys is None else "client.enrolment"
        raise ConfigError(
            f"{missing} is not set: encryption needs both, the folder that `splitfl keygen` made here, and the"
            " enrolment file that the server's operator sent back"
        )
    pair, enrolment = read_key_pair(client.keys), read_enrolment(client.enrolment)
    if enrolment.client_id != client.client_id:
        raise ConfigError(
            f"client.client_id is {client.client_id}, but {client.enrolment} enrols {enrolment.client_id}: set it so"
        )
    if enrolment.client_public_key != pair.public:
        raise ConfigError(
            f"{client.enrolment} was made for another key than the one in {client.keys}: send the operator"
            " this folder's public.key, and use the enrolment file that comes back"
        )
    return ClientSecurity(key_pair=pair, server_public_key=enrolment.server_public_key)


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
