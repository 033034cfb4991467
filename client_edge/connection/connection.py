"""One client's connection with its server over its whole life: send, and get an answer or an error.

Every wait ends (`line`). Two connections are never mended: `reconnect` makes new ones, and `resume` finds out where to
go on.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, overload

from client_edge.connection.endings import RoundClosed, StepClosed, check_goes_on
from client_edge.connection.joining import JOIN_AGAIN_S, Joining
from client_edge.connection.line import Line
from client_edge.connection.setbacks import Setbacks
from client_edge.consent.gate import Gate
from splitfl.config.own import ClientSection
from splitfl.config.trees import RunConfig
from splitfl.errors import LocalProtocolError, PeerGone, Refused, RemoteProtocolError
from splitfl.protocol import codec
from splitfl.protocol.codec import payload
from splitfl.protocol.messages import (
    Chunk,
    Forward,
    Leave,
    Merged,
    Message,
    Probed,
    Resume,
    Resumed,
    RoundOpened,
    StepRefused,
    Welcome,
    Why,
)
from splitfl.protocol.tensors import Tensors
from splitfl.session.client_session import ClientSession
from splitfl.stopping import StopRequest

log = logging.getLogger(__name__)

A = TypeVar("A", bound=Message)
B = TypeVar("B", bound=Message)

_WORTH_ANOTHER_TRY = (Why.NO_SESSION, Why.SHUTDOWN, Why.FULL)


class Connection:
    """One client's session with its server, over one line after another. Use from one thread."""

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
        self.client, self.gate, self.stop, self.tell = client, gate, stop or StopRequest(), tell
        self._joining = Joining(client, gate, self.stop, tell=tell, is_patient=is_patient)
        self._setbacks = Setbacks()
        self._session: ClientSession | None = None
        self._new_session: Callable[[RunConfig], ClientSession] | None = None
        self.is_closed = False
        self.leaving = ""
        """Why we go before the end, to be told to the server; "" when we do not."""
        self.comes_back = False
        """Whether we then mean to be waited for."""
        self.on_waiting: Callable[[str], None] = lambda _: None
        """Told from time to time what the run waits for, while we wait with it."""
        self.on_lost: Callable[[str], None] = lambda _: None
        """Told of every connection that is lost, and of every attempt at a new one."""
        self.on_settings: Callable[[RunConfig, RunConfig], None] = lambda _before, _now: None
        """Told of the run's settings, before and now, where a server that came back has others."""
        self._joined = self._joining.first()
        self._begin()

    # what was joined

    @property
    def address(self) -> str:
        """Where the server is."""
        return self._joining.address

    @property
    def is_encrypted(self) -> bool:
        """Whether keys are in use."""
        return bool(self.server_key)

    @property
    def server_key(self) -> str:
        """The public key that the server has to have, "" without keys."""
        return self._joining.server_key

    @property
    def welcome(self) -> Welcome:
        """The server's last welcome."""
        return self._joined.welcome

    @property
    def run(self) -> RunConfig:
        """The run's settings, as the server has them now."""
        return self._joined.run

    @property
    def session(self) -> ClientSession:
        """The session's state, once `agree` has set its terms."""
        if self._session is None:
            raise RuntimeError("the session has no terms yet")
        return self._session

    @property
    def tensors(self) -> Tensors:
        """How the session's tensors travel, once `agree` has set its terms."""
        link, policy = self.run.link, self.gate.policy
        return Tensors(
            self.session.terms.wire_types, frame_bytes=link.frame_bytes, max_rms=min(link.max_rms, policy.max_rms)
        )

    @property
    def bytes_sent(self) -> int:
        """Bytes sent so far on all connections."""
        return sum(traffic.sent for traffic in self._joining.traffic)

    @property
    def bytes_received(self) -> int:
        """Bytes received so far on all connections."""
        return sum(traffic.received for traffic in self._joining.traffic)

    # joining, and where to go on

    def agree(self, new_session: Callable[[RunConfig], ClientSession]) -> None:
        """Set how a session follows from the run's settings, known once the model's config has arrived."""
        self._new_session = new_session
        self._begin_session()

    def agree_again(self) -> None:
        """Begin the session's state anew on the same connection, after going back."""
        self._begin_session()
        self._setbacks.goes_back()

    def resume(self, *, held_round: int, step: int, commit_number: int, pending_step: int) -> Resumed:
        """Say where this client is, and hear where it goes on; needed first on every connection."""
        self.send(
            self.session.resume(
                held_round=held_round, step=step, commit_number=commit_number, pending_step=pending_step
            )
        )
        return self.answer("the server's word on where to go on", Resumed)

    def reconnect(self, why: PeerGone, resume_at: int, *, within_s: float | None = None) -> None:
        """Make new connections and join again, as often as it takes.

        Raises `PeerGone` when there was no progress for `client.reconnect_timeout`, or `within_s` if that is less,
        however often it has joined.
        """
        patience_s = min(within_s or math.inf, self.client.reconnect_timeout)
        reason = str(why)
        while True:
            self._setbacks.lost(now_s=time.monotonic())
            if self._setbacks.failing_s(now_s=time.monotonic()) >= patience_s:
                raise PeerGone(
                    f"gave up on {self.address} after {patience_s:g} s (client.reconnect_timeout):"
                    f" {reason}; the learned layers are kept: start the same command again to resume at step"
                    f" {resume_at}"
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

    def reached(self, what: str, number: int) -> None:
        """Take note of progress, after which a loss of the connection is the first one again."""
        self._setbacks.reached(what, number)

    def _start_over(self) -> None:
        self._line.end()
        before, self._joined = self._joined, self._joining.again(self._joined)
        self._begin()
        if self.run != before.run:
            self.on_settings(before.run, self.run)

    def _begin(self) -> None:
        """Hold the new line first: where no session can begin on it, closing ends it all the same."""
        self._line = Line(self._joined, self._joining.connect, self._setbacks, on_waiting=self._tell_waiting)
        self._begin_session()

    def _tell_waiting(self, text: str) -> None:
        self.on_waiting(text)

    def _begin_session(self) -> None:
        if self._new_session is not None:
            self._session = self._new_session(self.run)
            self._line.agree(self._session.terms)

    # one message, one answer

    def send(self, message: Message) -> None:
        """Send a message; raise `PeerGone` where the connection is lost, and `NotAllowed` at a bound of the policy."""
        frames = codec.encode(message)
        num_bytes = payload(frames)
        if (limit := self.welcome.limits.get("message_bytes")) and num_bytes > limit:
            raise LocalProtocolError(
                f"{type(message).__name__} of {num_bytes} bytes, more than message_bytes = {limit:g}"
            )
        allowance = self.gate.allowance
        if allowance is not None:
            if isinstance(message, Forward) and message.step and not message.micro_batch:
                allowance.step()
            allowance.sent(self.bytes_sent + num_bytes)
        self._line.send(frames)

    @overload
    def answer(self, what: str, one: type[A], /) -> A: ...

    @overload
    def answer(self, what: str, one: type[A], other: type[B], /) -> A | B: ...

    def answer(self, what: str, /, *wanted: type[Any]) -> Any:
        """Wait for a message of one of these kinds; what may come instead of it is raised (`endings`)."""
        while True:
            message = self._checked(self._next(what), what)
            if message is None:
                continue
            self._setbacks.heard(message)
            match message:
                case RoundOpened() if message.num_steps and self.gate.allowance is not None:
                    self.gate.allowance.round(message.round_number)
                case StepRefused():
                    self.session.abandon_step(message.next_step)
                    raise StepClosed(message)
                case Merged() if Merged not in wanted:
                    raise RoundClosed(message)
            if not isinstance(message, wanted):
                raise RemoteProtocolError(f"{type(message).__name__} while waiting for {what}")
            return message

    def _next(self, what: str) -> Message:
        wait = self._line.wait_for(what)
        while True:
            self.stop.check()
            message = self._line.look(wait)
            if message is not None:
                return message
            if self.gate.allowance is not None:
                self.gate.allowance.sent(self.bytes_sent)

    def _checked(self, message: Message, what: str) -> Message | None:
        """Return a message that may come now, None for one that belongs to a step we gave up."""
        check_goes_on(message, self.address)
        if isinstance(message, Chunk | Probed):
            return message
        if self._session is None:
            raise RemoteProtocolError(f"{type(message).__name__} while waiting for {what}")
        return self._session.receive(message)

    # going

    def take_leave(self, reason: str) -> None:
        """Take up this client's place in the run, to give it up for good: who has not resumed has only looked."""
        self.send(Resume(held_round=0, step=0, commit_number=0, pending_step=0))
        with suppress(RemoteProtocolError, PeerGone):
            self._line.ignore_one(JOIN_AGAIN_S)  # whatever it says: we go
        self.leaving, self.comes_back = reason, False

    def close(self) -> None:
        """End both connections, saying why if we go before the end (`leaving`)."""
        self.is_closed = True
        self._line.close(Leave(reason=self.leaving, comes_back=self.comes_back) if self.leaving else None)
        if self.gate.allowance is not None:
            self.gate.allowance.sent_at_last(self.bytes_sent)
