"""The server's loop: one thread that owns the socket, sessions, gate and rounds, and hands tensors to the worker.

A training step, as seen here: `Forward` -> gate -> worker -> `ForwardDone`; `Backward` -> worker -> `BackwardDone`;
`Commit` -> gate -> (all members in) -> worker's gradients reduced -> `Committed` to every member, and the worker's
optimizer step while the members take theirs.
"""

import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from server_backbone.gates import Action, Apply, CloseStep, Compute, gate_for
from server_backbone.jobs import Jobs
from server_backbone.merger import Merger
from server_backbone.provisions import Provisions
from server_backbone.rounds import Decision, End, Merge, Open, Rounds
from server_backbone.worker import Contribution, Worker
from splitfl.config import NAME_PATTERN, RunConfig
from splitfl.errors import PeerGone, RemoteProtocolError
from splitfl.protocol import codec
from splitfl.protocol.messages import (
    WIRE_VERSION,
    Attach,
    Backward,
    BackwardDone,
    Chunk,
    Commit,
    Committed,
    Farewell,
    Fetch,
    Forward,
    ForwardDone,
    Goodbye,
    Hello,
    Leave,
    Merged,
    Message,
    Ping,
    Pong,
    Ready,
    Refusal,
    Report,
    RoundOpened,
    TensorFrames,
    Upload,
    Welcome,
)
from splitfl.protocol.tensors import describe, digest_of, realise
from splitfl.session.server import Phase, Reply, ServerSession
from splitfl.session.terms import Terms
from splitfl.telemetry.metrics import MetricsLog
from splitfl.transport.zeromq import Listener, framed_bytes

log = logging.getLogger(__name__)

# How long the loop sleeps at most before it looks at its deadlines.
_TICK_S = 0.25
# A wait is worth a line when it has lasted a while, and again from time to time.
_WAITING_AFTER_S = 1.0
_WAITING_EVERY_S = 10.0


@dataclass(slots=True, kw_only=True)
class _Client:
    """One connected client."""

    client_id: str
    peer: bytes
    session: ServerSession
    token: str
    last_heard_s: float
    control_peer: bytes | None = None
    sent: int = 0
    received: int = 0
    num_examples: int = 0
    held_round: int = 0
    """Number of the merge whose layers it holds."""


@dataclass(kw_only=True)
class Server:
    """One run on one socket."""

    run: RunConfig
    run_id: str
    terms: Terms
    listener: Listener
    worker: Worker
    merger: Merger
    provisions: Provisions
    metrics: MetricsLog
    reason: str = field(default="the server stopped on an error", init=False)
    """Why the run ended before its last round, "" once it has gone through it."""

    def __post_init__(self) -> None:
        federation = self.run.federation
        self._jobs = Jobs(self.listener.wake)
        self._gate = gate_for(federation.server_mode, federation.step_timeout)
        self._rounds = Rounds(federation, self.merger.strategy.configure_train, time.monotonic())
        self._clients: dict[str, _Client] = {}
        self._by_peer: dict[bytes, _Client] = {}
        self._by_token: dict[str, _Client] = {}
        self._layers: tuple[TensorFrames, ...] = ()
        self._merge_number = 0
        self._commit_number = 0
        self._is_over = False
        self._waiting_said = ("", 0.0)

    def serve(self) -> None:
        """Run until the last client has said goodbye, or the run is given up (see `reason`)."""
        try:
            while not self._is_over:
                arrived = self.listener.recv(_TICK_S)
                now_s = time.monotonic()
                if arrived is not None:
                    self._receive(*arrived, now_s)
                self._jobs.finish()
                self._tick(now_s)
        finally:
            self._jobs.close()

    def stop(self, reason: str) -> None:
        """Tell every client that the run is over."""
        for client in list(self._clients.values()):
            self._send(client, Refusal(reason=reason))

    # what comes in

    def _receive(self, peer: bytes, frames: list[memoryview], now_s: float) -> None:
        client = self._by_peer.get(peer)
        if client is not None:
            client.received += framed_bytes(frames)
            client.last_heard_s = now_s
        try:
            message = codec.decode(frames, max_frame_bytes=self.run.link.frame_bytes)
            self._route(peer, client, message, now_s)
        except RemoteProtocolError as error:
            log.warning("%s broke the protocol: %s", client.client_id if client else "a stranger", error)
            if client is None:
                self._refuse(peer, f"protocol error: {error}")
            else:
                self._expel(client, f"broke the protocol: {error}")

    def _route(self, peer: bytes, client: _Client | None, message: Message, now_s: float) -> None:
        match message:
            case Hello() if client is None:
                self._admit(peer, message, now_s)
            case Attach(session=token) if client is None and token in self._by_token:
                self._attach(peer, self._by_token[token])
            case Ping() if client is not None:
                self._send_to(peer, client, Pong(number=message.number, waiting_for=self._waiting_for()))
            case Leave() if client is not None:
                self._drop(client, message.reason[:200])
            case _ if client is None:
                self._refuse(peer, "no session here: say hello first (the server may have been restarted)")
            case _ if peer != client.peer:
                raise RemoteProtocolError(f"{type(message).__name__} on the control connection")
            case _:
                accepted = client.session.receive(message)
                if isinstance(accepted, Reply):
                    self._send(client, accepted.message)
                elif accepted is not None:
                    self._act(client, accepted, now_s)

    def _act(self, client: _Client, message: Message, now_s: float) -> None:
        """Do what a legal message asks for."""
        match message:
            case Fetch():
                content = self.provisions.read(message.name, message.offset, self.run.link.frame_bytes)
                frames = TensorFrames(dtype="u8", shape=(len(content),), buffers=(content,))
                self._send(client, Chunk(name=message.name, offset=message.offset, content=frames))
            case Ready():
                client.held_round, client.num_examples = message.round_number, message.num_examples
                self._decide(self._rounds.ready(client.client_id), now_s)
            case Forward(step=0):
                self._compute(client, partial(self._evaluate, message))
            case Forward():
                self._carry_out(self._gate.forward(client.client_id, message, now_s), now_s)
            case Backward():
                self._compute(client, partial(self._backward, client.client_id, message))
            case Commit():
                if not math.isfinite(message.loss):
                    raise RemoteProtocolError("a loss that is not finite")
                realise(message.norms_P)  # norms that are not finite must not reach the others' step
                self._carry_out(self._gate.commit(client.client_id, message, now_s), now_s)
            case Upload():
                self._spool(client, message)
            case Report():
                self._note(client, message)
            case Goodbye():
                self.metrics.emit("client_done", client_id=client.client_id, **_with_counts(message.metrics))
                self._send(client, Farewell())
                self._drop(client, "done")

    def _admit(self, peer: bytes, hello: Hello, now_s: float) -> None:
        if hello.wire_version != WIRE_VERSION:
            self._refuse(
                peer,
                f"this server speaks wire version {WIRE_VERSION} and this client {hello.wire_version}"
                f" ({hello.software:.40}): install the same splitfl on both",
            )
        elif hello.client_id in self._clients:
            wait = self.run.link.heartbeat_timeout
            self._refuse(
                peer,
                f"client_id {hello.client_id:.64} is connected already: choose another name, or, if that client was"
                f" just stopped, try again in {wait:g} s",
            )
        elif not re.fullmatch(NAME_PATTERN, hello.client_id):
            self._refuse(peer, "client_id must be 1 to 64 letters, digits, '.', '_' or '-'")
        elif self._rounds.is_parting:
            self._refuse(peer, f"run {self.run_id} has finished its {self.run.federation.num_rounds} rounds")
        else:
            self._welcome(peer, hello.client_id, now_s)

    def _welcome(self, peer: bytes, client_id: str, now_s: float) -> None:
        client = _Client(
            client_id=client_id,
            peer=peer,
            session=ServerSession(self.terms),
            token=secrets.token_hex(16),
            last_heard_s=now_s,
        )
        self._clients[client_id] = self._by_peer[peer] = self._by_token[client.token] = client
        self._rounds.joined(client_id)
        self.metrics.emit("client_joined", client_id=client_id)
        files = self.provisions.files
        self._send(
            client,
            Welcome(
                session=client.token,
                run_id=self.run_id,
                settings=self.run.to_json(),
                fingerprint=self.run.fingerprint(),
                file_names=tuple(files),
                file_sizes=tuple(file.num_bytes for file in files.values()),
                file_hashes=tuple(file.digest for file in files.values()),
            ),
        )

    def _attach(self, peer: bytes, client: _Client) -> None:
        if client.control_peer is not None:
            raise RemoteProtocolError("a second control connection")
        client.control_peer = peer
        self._by_peer[peer] = client

    def _note(self, client: _Client, report: Report) -> None:
        if report.topic == "loaded":
            self.metrics.emit(
                "loaded", client_id=client.client_id, round=report.round_number, digest=report.digest[:64]
            )
            return
        also = {name.removeprefix("also:"): v for name, v in report.metrics.items() if name.startswith("also:")}
        self.metrics.emit(
            "evaluated",
            client_id=client.client_id,
            phase=report.phase[:16],
            round=report.round_number,
            eval_loss=report.metrics.get("eval_loss"),
            num_eval_examples=int(report.metrics.get("num_eval_examples", 0)),
            also=also,
        )

    # what the gate and the rounds decide

    def _carry_out(self, actions: Iterable[Action], now_s: float) -> None:
        for action in actions:
            match action:
                case Compute(client_id=client_id, message=message):
                    if client_id in self._clients:
                        self._compute(self._clients[client_id], partial(self._forward, client_id, message))
                case Apply(members=members):
                    contributions = [_contribution(client_id, commit) for client_id, commit in members]
                    self._jobs.submit(
                        partial(self.worker.reduce, contributions), partial(self._acknowledge, members, contributions)
                    )
                    # next on the queue, so ahead of any work of a later step: both sides take their steps at once
                    self._jobs.submit(self.worker.apply, lambda _: None)
                case CloseStep():
                    self._close_step(action, now_s)

    def _acknowledge(
        self, members: tuple[tuple[str, Commit], ...], contributions: list[Contribution], clip_coefficient: float
    ) -> None:
        """Tell every member that the step is decided; those who left meanwhile have lost nothing but the answer."""
        self._commit_number += 1
        for client_id, commit in members:
            client = self._clients.get(client_id)
            if client is None or client.session.phase is not Phase.COMMITTING:
                continue
            reply = Committed(step=commit.step, commit_number=self._commit_number, clip_coefficient=clip_coefficient)
            client.session.committed(reply)
            self._send(client, reply)
            self.metrics.emit(
                "step",
                client_id=client_id,
                round=client.session.round_number,
                step=commit.step,
                commit_number=self._commit_number,
                loss=commit.loss,
                num_label_tokens=commit.num_label_tokens,
                learning_rate=self.worker.learning_rate(contributions[0].step),
                clip_coefficient=clip_coefficient,
                bytes_sent=client.received,
                bytes_received=client.sent,
                compute_seconds=self.worker.compute.seconds,
            )
            if client.session.next_step > client.session.last_step:
                self._carry_out(self._gate.finished(client_id, time.monotonic()), time.monotonic())

    def _close_step(self, action: CloseStep, now_s: float) -> None:
        client = self._clients.get(action.client_id)
        if client is None:
            return
        refusal = client.session.step_closed(action.next_step, action.reason)
        self._jobs.submit(partial(self.worker.discard, client.client_id), lambda _: None)
        self._send(client, refusal)
        self.metrics.emit("step_refused", client_id=client.client_id, step=refusal.step, reason=action.reason)
        if client.session.next_step > client.session.last_step:
            self._carry_out(self._gate.finished(client.client_id, now_s), now_s)

    def _decide(self, decisions: Iterable[Decision], now_s: float) -> None:
        for decision in decisions:
            match decision:
                case Open():
                    self._open_round(decision, now_s)
                case Merge():
                    self._gate.round_closed()
                    self._jobs.submit(partial(self._merge, decision), partial(self._merged, decision))
                case End(reason=reason):
                    self.reason = reason
                    self._is_over = True

    def _open_round(self, round_: Open, now_s: float) -> None:
        steps = self.run.federation.local_steps
        self._gate.round_opened(round_.trainers, round_.first_step)
        self.metrics.emit(
            "round_opened",
            round=round_.round_number,
            trainers=round_.trainers,
            first_step=round_.first_step,
            num_steps=steps,
        )
        for client_id in round_.clients:
            client = self._clients.get(client_id)
            if client is None:
                continue  # dropped while the others were told
            opened = RoundOpened(
                round_number=round_.round_number,
                first_step=round_.first_step,
                num_steps=steps if client_id in round_.trainers else 0,
                layers=() if client.held_round == self._merge_number else self._layers,
            )
            client.session.opened(opened)
            self._send(client, opened)
        self._rounds.opened(now_s)

    def _merged(self, merge: Merge, layers: tuple[tuple[TensorFrames, ...], str, dict[str, float]]) -> None:
        self._layers, digest, weights = layers
        self._merge_number = merge.round_number
        message = Merged(
            round_number=merge.round_number,
            accepted=not merge.reason,
            reason=merge.reason,
            is_last=self._rounds.is_last,
            layers=self._layers,
        )
        self.metrics.emit(
            "merged",
            round=merge.round_number,
            accepted=message.accepted,
            reason=merge.reason,
            clients=weights,
            absent=merge.absent,
            num_tensors=len(self._layers),
            digest=digest,
        )
        for client in list(self._clients.values()):
            if client.session.phase in (Phase.TRAINING, Phase.COMMITTING, Phase.MERGING):
                client.session.merged(message)
                self._jobs.submit(partial(self.worker.discard, client.client_id), lambda _: None)
                self._send(client, message)
        now_s = time.monotonic()
        self._decide(self._rounds.merged(now_s), now_s)

    # what the compute thread does

    def _compute(self, client: _Client, work: Callable[[], ForwardDone | BackwardDone]) -> None:
        """Have a micro-batch computed and answer with the result; a tensor that cannot be taken ends the session."""

        def answer(reply: ForwardDone | BackwardDone) -> None:
            if client.client_id in self._clients and client.session.answered(reply):
                self._send(client, reply)

        self._jobs.submit(work, answer, partial(self._expel_for, client))

    def _evaluate(self, message: Forward) -> ForwardDone:
        hidden_BSD = self.worker.evaluate(realise(message.hidden_BSD), message.lengths_B, message.left_padded)
        return ForwardDone(request_id=message.request_id, hidden_BSD=self._describe(hidden_BSD))

    def _forward(self, client_id: str, message: Forward) -> ForwardDone:
        hidden_BSD = self.worker.forward(
            client_id,
            message.request_id,
            realise(message.hidden_BSD),
            message.lengths_B,
            message.left_padded,
            step=message.step,
            micro_batch=message.micro_batch,
        )
        return ForwardDone(request_id=message.request_id, hidden_BSD=self._describe(hidden_BSD))

    def _backward(self, client_id: str, message: Backward) -> BackwardDone:
        gradient_BSD = self.worker.backward(client_id, message.request_id, realise(message.gradient_BSD))
        return BackwardDone(
            request_id=message.request_id,
            gradient_BSD=None if gradient_BSD is None else self._describe(gradient_BSD),
        )

    def _spool(self, client: _Client, upload: Upload) -> None:
        def spool() -> None:
            self.merger.spool(client.client_id, upload)

        def count(_: None) -> None:
            if client.client_id in self._clients and client.session.phase is Phase.MERGING:
                now_s = time.monotonic()
                self._decide(self._rounds.uploaded(client.client_id), now_s)

        self._jobs.submit(spool, count, partial(self._expel_for, client))

    def _merge(self, merge: Merge) -> tuple[tuple[TensorFrames, ...], str, dict[str, float]]:
        """Fold the uploads (or keep the old layers) and save everything that is trained."""
        weights = {} if merge.reason else self.merger.merge(merge.uploaded)
        self.merger.forget_uploads()
        self.merger.save(self.worker.trained())
        layers = self.merger.layers()
        return tuple(self._describe(layer) for layer in layers.values()), digest_of(layers.values()), weights

    def _describe(self, tensor: Tensor) -> TensorFrames:
        return describe(tensor, self.run.link.frame_bytes)

    # who is there

    def _tick(self, now_s: float) -> None:
        for client in list(self._clients.values()):
            silent_s = now_s - client.last_heard_s
            if silent_s > self.run.link.heartbeat_timeout:
                self._expel(client, f"fell silent for {silent_s:.0f} s")
        self._carry_out(self._gate.ticked(now_s), now_s)
        self._decide(self._rounds.ticked(now_s), now_s)
        self._say_what_is_waited_for(now_s)

    def _say_what_is_waited_for(self, now_s: float) -> None:
        text, (last, due_s) = self._waiting_for(), self._waiting_said
        if text != last:
            self._waiting_said = (text, now_s + _WAITING_AFTER_S)
        elif text and now_s >= due_s:
            self.metrics.emit("waiting", text=text)
            self._waiting_said = (text, now_s + _WAITING_EVERY_S)

    def _waiting_for(self) -> str:
        slow = self._gate.waiting_for()
        return f"the step of {', '.join(slow)}" if slow else self._rounds.waiting_for()

    def _expel(self, client: _Client, reason: str) -> None:
        if client.client_id in self._clients:
            self._drop(client, reason)
            self._refuse(client.peer, f"the server ended the session: {client.client_id} {reason}")

    def _expel_for(self, client: _Client, error: Exception) -> bool:
        """End the session of a client whose tensors could not be taken; tell whether that was the error."""
        if isinstance(error, RemoteProtocolError):
            self._expel(client, f"sent {error}")
        return isinstance(error, RemoteProtocolError)

    def _drop(self, client: _Client, reason: str) -> None:
        """Forget a client: the others go on by the rules of the config."""
        if self._clients.pop(client.client_id, None) is None:
            return
        self._by_peer = {peer: other for peer, other in self._by_peer.items() if other is not client}
        del self._by_token[client.token]
        client.session.phase = Phase.GONE
        self.metrics.emit("client_left", client_id=client.client_id, reason=reason)
        self._jobs.submit(partial(self.worker.discard, client.client_id), lambda _: None)
        now_s = time.monotonic()
        self._carry_out(self._gate.finished(client.client_id, now_s), now_s)
        self._decide(self._rounds.left(client.client_id), now_s)

    def _send(self, client: _Client, message: Message) -> None:
        self._send_to(client.peer, client, message)

    def _send_to(self, peer: bytes, client: _Client, message: Message) -> None:
        try:
            client.sent += self.listener.send(peer, codec.encode(message))
        except PeerGone as error:
            self._drop(client, str(error))

    def _refuse(self, peer: bytes, reason: str) -> None:
        log.warning("refused a peer: %s", reason)
        try:
            self.listener.send(peer, codec.encode(Refusal(reason=reason)))
        except PeerGone:
            log.info("a refused peer had gone already")


def _contribution(client_id: str, commit: Commit) -> Contribution:
    return Contribution(
        slot=client_id,
        step=commit.step,
        num_label_tokens=commit.num_label_tokens,
        norms_P=realise(commit.norms_P).tolist(),
    )


def _with_counts(metrics: dict[str, float]) -> dict[str, float | int]:
    """Make whole numbers of what the wire carries as floats, seconds apart."""
    return {
        name[:64]: int(value) if value.is_integer() and not name.endswith("seconds") else value
        for name, value in metrics.items()
    }
