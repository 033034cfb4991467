"""The wire as the client's loop sees it: ask, and get the answer or an error that says what was waited for.

Every wait ends: the server's answers to the heartbeats on the control connection show that it lives, however long a
barrier or a merge takes; when they stop, the wait is over.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar, cast

from torch import Tensor

from splitfl import __version__
from splitfl.config import LinkSection, RunConfig
from splitfl.errors import PeerGone, Refused, RemoteProtocolError
from splitfl.protocol import codec
from splitfl.protocol.messages import (
    WIRE_VERSION,
    Attach,
    BackwardDone,
    Chunk,
    Committed,
    Farewell,
    Fetch,
    ForwardDone,
    Hello,
    Leave,
    Merged,
    Message,
    Ping,
    Pong,
    Refusal,
    Report,
    RoundOpened,
    StepRefused,
    Welcome,
)
from splitfl.protocol.tensors import describe, realise
from splitfl.session.client import ClientSession
from splitfl.transport.zeromq import Endpoint

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

_POLL_S = 0.5
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


class Heartbeat:
    """The control connection: a thread that tells the server we live, and knows whether the server does."""

    def __init__(self, address: str, session: str, link: LinkSection) -> None:
        self._address = address
        self._session = session
        self._link = link
        self._stopping = threading.Event()
        self._leaving = ""
        self.last_heard_s = time.monotonic()
        self.waiting_for = ""
        self.sent = 0
        self.received = 0
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def silent_s(self) -> float:
        """Seconds since the server's last sign of life."""
        return time.monotonic() - self.last_heard_s

    def stop(self, leaving: str = "") -> None:
        """End the thread; `leaving` is the reason to give when we go before the end."""
        self._leaving = leaving
        self._stopping.set()
        self._thread.join(timeout=5.0)

    def _beat(self) -> None:
        with _endpoint(self._address, self._link) as endpoint:
            endpoint.send(codec.encode(Attach(session=self._session)))
            number = 0
            while not self._stopping.is_set():
                number += 1
                endpoint.send(codec.encode(Ping(number=number)))
                self._listen(endpoint, time.monotonic() + self._link.heartbeat_interval)
            if self._leaving:
                endpoint.send(codec.encode(Leave(reason=self._leaving)))
            self.sent, self.received = endpoint.traffic.sent, endpoint.traffic.received

    def _listen(self, endpoint: Endpoint, until_s: float) -> None:
        while (left_s := until_s - time.monotonic()) > 0 and not self._stopping.is_set():
            frames = endpoint.recv(min(left_s, 0.2))
            if frames is None:
                continue
            match codec.decode(frames, max_frame_bytes=self._link.frame_bytes):
                case Pong(waiting_for=waiting_for):
                    self.waiting_for = waiting_for
                    self.last_heard_s = time.monotonic()
            self.sent, self.received = endpoint.traffic.sent, endpoint.traffic.received


class Link:
    """One client's session with its server. Use from one thread."""

    def __init__(self, address: str, client_id: str, connect_timeout: float) -> None:
        """Connect and join; raise `Refused`, or `PeerGone` when nobody answers in time."""
        self.address = address
        self._bounds = LinkSection()
        self._endpoint = _endpoint(address, self._bounds)
        self._heartbeat: Heartbeat | None = None
        self._session: ClientSession | None = None
        self.welcome = self._join(client_id, connect_timeout)
        self.run = _settings_of(self.welcome)
        self._bounds = self.run.link
        self._heartbeat = Heartbeat(address, self.welcome.session, self._bounds)
        self.bytes_of_files = 0
        self.on_waiting: Callable[[str], None] = lambda _: None
        """Told from time to time what the run waits for, while we wait with it."""

    @property
    def session(self) -> ClientSession:
        """The session's state, once `agree` has set its terms."""
        if self._session is None:
            raise RuntimeError("the session has no terms yet")
        return self._session

    @property
    def bytes_sent(self) -> int:
        """Bytes sent so far on both connections."""
        return self._endpoint.traffic.sent + (self._heartbeat.sent if self._heartbeat else 0)

    @property
    def bytes_received(self) -> int:
        """Bytes received so far on both connections."""
        return self._endpoint.traffic.received + (self._heartbeat.received if self._heartbeat else 0)

    def agree(self, session: ClientSession) -> None:
        """Set the session's terms, known once the model's config has arrived."""
        self._session = session

    def close(self, leaving: str = "") -> None:
        """End both connections; `leaving` says why we go before the end."""
        if self._heartbeat is not None:
            self._heartbeat.stop(leaving)
        self._endpoint.close(linger_s=1.0)

    # files of the welcome

    def fetch(self, name: str, folder: Path) -> Path:
        """Return a file of the welcome, from `folder` if it is there with the announced hash, else from the server."""
        size, digest = self._announced(name)
        path = folder / digest
        if path.exists() and _hash_of(path) == digest:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        half_done = folder / f".{digest}.{os.getpid()}.partial"
        try:
            with half_done.open("wb") as file:
                while file.tell() < size:
                    file.write(self._chunk(name, file.tell()))
            if _hash_of(half_done) != digest:
                raise RemoteProtocolError(f"{name} arrived with another hash than announced: start the client again")
            half_done.replace(path)
        finally:
            half_done.unlink(missing_ok=True)
        self.bytes_of_files += size
        return path

    def _announced(self, name: str) -> tuple[int, str]:
        at = self.welcome.file_names.index(name)
        return self.welcome.file_sizes[at], self.welcome.file_hashes[at]

    def _chunk(self, name: str, offset: int) -> bytes:
        self._send(Fetch(name=name, offset=offset))
        chunk = self._answer(Chunk, f"{name} from byte {offset}")
        content = b"".join(chunk.content.buffers)
        if chunk.name != name or chunk.offset != offset or not content:
            raise RemoteProtocolError(f"a piece of {chunk.name:.64} at {chunk.offset} in answer to {name} at {offset}")
        return content

    # micro-batches and steps

    def send_forward(self, hidden_BSD: Tensor, lengths_B: tuple[int, ...], *, step: int, micro_batch: int) -> int:
        """Send activations on; returns the request's number. `step` 0 is an evaluation."""
        frames = describe(hidden_BSD, self._bounds.frame_bytes)
        message = self.session.forward(step=step, micro_batch=micro_batch, hidden_BSD=frames, lengths_B=lengths_B)
        self._send(message)
        return message.request_id

    def send_backward(self, request_id: int, gradient_BSD: Tensor) -> None:
        """Send the gradient of the activations that came back for a request."""
        self._send(self.session.backward(request_id, describe(gradient_BSD, self._bounds.frame_bytes)))

    def receive(self) -> tuple[int, Tensor | None, bool]:
        """Return the next answer to a micro-batch: (request, tensor, whether it is a gradient)."""
        match self._one_of((ForwardDone, BackwardDone), "the backbone"):
            case ForwardDone(request_id=number, hidden_BSD=frames):
                return number, realise(frames), False
            case BackwardDone(request_id=number, gradient_BSD=None):
                return number, None, True
            case BackwardDone(request_id=number, gradient_BSD=frames) if frames is not None:
                return number, realise(frames), True
        raise RemoteProtocolError("an answer that is neither activations nor a gradient")

    def commit(self, *, num_label_tokens: int, loss: float, norms_P: Tensor) -> Committed:
        """Ask for the step to be applied; raise `StepClosed` when it is refused: then it is applied on neither side."""
        frames = describe(norms_P, self._bounds.frame_bytes)
        self._send(self.session.commit(num_label_tokens=num_label_tokens, loss=loss, norms_P=frames))
        return self._answer(Committed, "the commit of this step")

    # rounds

    def open_round(self, num_examples: int) -> RoundOpened:
        """Wait for the next round."""
        self._send(self.session.ready(num_examples))
        return self._answer(RoundOpened, "the next round")

    def merge(self, layers: Mapping[str, Tensor], *, num_examples: int, num_tokens: int) -> Merged:
        """Hand over this round's layers and wait for everyone's; the tensors must not be written to meanwhile."""
        frames = tuple(describe(layer, self._bounds.frame_bytes) for layer in layers.values())
        self._send(self.session.upload(num_examples=num_examples, num_tokens=num_tokens, layers=frames))
        return self._await_merge()

    def sit_out(self) -> Merged:
        """Wait for the merge of a round that others train in."""
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
            return self._answer(Merged, "the merge of this round")
        except RoundClosed as closed:  # the merge itself, come while we asked for it
            return closed.merged

    # one answer

    def _join(self, client_id: str, timeout_s: float) -> Welcome:
        self._endpoint.send(
            codec.encode(Hello(wire_version=WIRE_VERSION, software=f"splitfl {__version__}", client_id=client_id))
        )
        frames = self._endpoint.recv(timeout_s)
        if frames is None:
            self._endpoint.close()
            raise PeerGone(
                f"no answer from {self.address} after {timeout_s:g} s of trying to connect: is the server running, and"
                " is this its address?"
            )
        match codec.decode(frames, max_frame_bytes=self._bounds.frame_bytes):
            case Welcome() as welcome:
                return welcome
            case Refusal(reason=reason):
                self._endpoint.close()
                raise Refused(f"{self.address} refused {client_id}: {reason}")
            case other:
                raise RemoteProtocolError(f"{type(other).__name__} in answer to Hello")

    def _send(self, message: Message) -> None:
        self._endpoint.send(codec.encode(message))

    def _answer(self, wanted: type[M], what: str) -> M:
        """Wait for an answer of this kind; what else may come instead is raised."""
        return cast(M, self._one_of((wanted,), what))

    def _one_of(self, wanted: tuple[type, ...], what: str) -> Message:
        while True:
            message = self._next(what)
            match message:
                case Refusal(reason=reason):
                    raise Refused(reason)
                case Chunk():
                    pass
                case _:
                    checked = self.session.receive(message)
                    if checked is None:
                        continue
            match message:
                case StepRefused():
                    self.session.abandon_step(message.next_step)
                    raise StepClosed(message)
                case Merged() if Merged not in wanted:
                    raise RoundClosed(message)
            if not isinstance(message, wanted):
                raise RemoteProtocolError(f"{type(message).__name__} while waiting for {what}")
            return message

    def _next(self, what: str) -> Message:
        say_at_s = time.monotonic() + _WAITING_AFTER_S
        while True:
            frames = self._endpoint.recv(_POLL_S)
            if frames is not None:
                return codec.decode(frames, max_frame_bytes=self._bounds.frame_bytes)
            if self._heartbeat is not None and self._heartbeat.silent_s > self._bounds.heartbeat_timeout:
                raise PeerGone(
                    f"{self.address} has been silent for {self._heartbeat.silent_s:.0f} s while waiting for {what}:"
                    " the server or the network is gone; start the client again when it is back"
                )
            if self._heartbeat is not None and self._heartbeat.waiting_for and time.monotonic() >= say_at_s:
                self.on_waiting(self._heartbeat.waiting_for)
                say_at_s = time.monotonic() + _WAITING_EVERY_S


def _endpoint(address: str, link: LinkSection) -> Endpoint:
    return Endpoint(
        address,
        max_frame_bytes=link.frame_bytes,
        heartbeat_interval=link.heartbeat_interval,
        heartbeat_timeout=link.heartbeat_timeout,
    )


def _settings_of(welcome: Welcome) -> RunConfig:
    """Read the run's settings; a fingerprint that differs means that the two sides read them differently."""
    try:
        tree = json.loads(welcome.settings)
    except ValueError:
        raise RemoteProtocolError("settings that are no JSON") from None
    run = RunConfig.from_tree(tree, source="the server's settings")
    if run.fingerprint() != welcome.fingerprint:
        raise RemoteProtocolError(
            f"the run's settings have fingerprint {run.fingerprint():.12} here and {welcome.fingerprint:.12} on the"
            " server: install the same splitfl on both"
        )
    return run


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
