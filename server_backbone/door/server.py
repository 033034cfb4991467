"""The server's loop: one thread that owns the socket, members, gate and rounds, and hands tensors to the engine.

A training step, as seen here: `Forward` -> gate -> engine -> `ForwardDone`; `Backward` -> engine -> `BackwardDone`;
`Commit` -> gate -> (all members in) -> gradients reduced and recorded -> `Committed` to every member, and the worker's
optimizer step while the members take theirs.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from server_backbone.compute.mishaps import Mishap, done_for
from server_backbone.compute.queue import Jobs
from server_backbone.compute.worker import Contribution, Scaling
from server_backbone.deciding.blame import Blame, Fault, Stage
from server_backbone.deciding.caches import CacheBook
from server_backbone.deciding.gates import Action, Apply, CloseStep, Compute, SitOut, TakeBack, gate_for
from server_backbone.deciding.rounds import Decision, End, Judge, LastCall, Merge, Open, Release, Rounds, Stop
from server_backbone.deciding.turns import Turns
from server_backbone.door.admission import Admission
from server_backbone.door.measurements import Measurements
from server_backbone.door.members import Connection, Member, Members
from server_backbone.door.provisions import Provisions
from server_backbone.engine.engine import Decided, Engine, MergedLayers, Spooled, Verdict
from server_backbone.records.entries import Entry, Finished, Joined, Left, Returned, TurnEnded
from server_backbone.records.state import RoundState
from splitfl.config import RunConfig
from splitfl.durability.crash import crash_point
from splitfl.errors import LocalProtocolError, PeerGone, RemoteProtocolError
from splitfl.protocol import codec
from splitfl.protocol.messages import (
    Attach,
    Backward,
    BackwardDone,
    Buffer,
    Chunk,
    Commit,
    Committed,
    Declined,
    Decode,
    Discard,
    EndCache,
    Farewell,
    Fetch,
    Forward,
    ForwardDone,
    GoBack,
    Goodbye,
    Hello,
    Keep,
    Kept,
    Leave,
    Merged,
    Message,
    Ping,
    Pong,
    Probe,
    Probed,
    Ready,
    Refusal,
    Report,
    Resume,
    Resumed,
    RoundOpened,
    RoundsEnded,
    Shutdown,
    TensorFrames,
    Upload,
    Welcome,
    WentBack,
    Why,
)
from splitfl.protocol.tensors import OutOfBounds, realise
from splitfl.session.limits import Limits
from splitfl.session.own_loop import OwnLoopServerSession
from splitfl.session.server import Applied, Phase, Reply, ServerSession
from splitfl.session.terms import Terms
from splitfl.stopping import StopRequest
from splitfl.telemetry.history import History
from splitfl.telemetry.measures import ALSO, complete, event_of, federated, totals_of
from splitfl.telemetry.metrics import MetricsLog
from splitfl.telemetry.units import printable
from splitfl.training.optimizer import NO_GRADIENT
from splitfl.transport.zeromq import Arrived, Listener

log = logging.getLogger(__name__)

B = TypeVar("B", Forward, Backward)

# How long the loop sleeps at most before it looks at its deadlines.
_TICK_S = 0.25
# How often the folder of keys is looked at.
_KEYS_EVERY_S = 0.25
# Frames that a client may have sent back to it on one connection.
_MAX_PROBES = 4
# What the loop took longer than this for is no silence of the clients.
_STALL_S = 1.0
# A wait is worth a line when it has lasted a while, and again from time to time.
_WAITING_AFTER_S = 1.0
_WAITING_EVERY_S = 10.0
# What a client says of itself in words is shown up to here, and a list of names in a Pong.
_MAX_REASON = 200
# What a client may ask for ahead of the answers, or beyond what it needs; more is a violation. docs/limits.md has them.
_MAX_JOBS = 64
_MAX_PINGS = 64
_MAX_FETCHES = 64
_MAX_KNOCKING = 4
_MAX_REWINDS = 3
_MAX_ENDS_TOLD = 8
# The time that something cannot be done for a client at which it is told what to change.
_LAST_MISHAP = 3
# A clock that stood still, with this process or its machine, is nobody's idleness.
_MAX_PASSED_S = 1.0
_MAX_SAT_OUT = 2
_MAX_WAITING = 1000


@dataclass(kw_only=True)
class Server:
    """One run on one socket."""

    run: RunConfig
    run_id: str
    terms: Terms
    limits: Limits
    listener: Listener
    admission: Admission
    engine: Engine
    provisions: Provisions
    metrics: MetricsLog
    history: History
    stop: StopRequest
    reason: str = field(default="the server stopped on an error", init=False)
    """Why the run ended before its last round, "" once it has gone through it."""

    def __post_init__(self) -> None:
        federation = self.run.federation
        self._jobs = Jobs(self.listener.wake)
        self._gate = gate_for(
            federation.server_mode,
            federation.step_timeout,
            federation.max_missed_steps,
            is_patient=self.run.has_own_loops,
        )
        if self.run.has_own_loops:
            self._gate.round_opened((), first_step=1)  # and never closed
        if self.run.is_buffered:
            self._rounds: Rounds = Turns(federation, self.run.strategy.buffer_size, time.monotonic())
        else:
            self._rounds = Rounds(federation, self.engine.merger.strategy.configure_train, time.monotonic())
        self._members = Members()
        self._caches = CacheBook(self.run.link)
        self._blame = Blame()
        self._stuck: dict[str, tuple[Stage, OutOfBounds]] = {}
        """Clients that sent what may follow from the last merge, and wait for what the others show."""
        self._layers = self._layers_of_all(0)
        self._merge_number = 0
        self._have_rounds_ended = False
        self._measurements = Measurements()
        self._is_over = False
        self._ticked_s = time.monotonic()
        self._mishaps: Counter[str] = Counter()
        """How often in a row something could not be done for a client."""
        self._most_jobs = _MAX_JOBS + 8 * self.limits.micro_batches_in_flight
        num_chunks = sum(file.num_bytes // self.run.link.frame_bytes + 1 for file in self.provisions.files.values())
        self._most_fetches = 4 * num_chunks + _MAX_FETCHES
        self._waiting_said = ("", 0.0)
        self._keys_due_s = 0.0

    def serve(self) -> None:
        """Run until the last client has said goodbye, or the run is given up (see `reason`).

        Raises `Stopped` when that was asked for, behind the job that the compute thread was at.
        """
        try:
            before_s = time.monotonic()
            while not self._is_over and not self.stop.is_asked:
                arrived = self.listener.recv(_TICK_S)
                now_s = time.monotonic()
                self._forgive(now_s - before_s)
                before_s = now_s
                if arrived is not None:
                    self._receive(arrived, now_s)
                self._jobs.finish()
                self._tick(now_s)
        finally:
            self._jobs.close(drops=self.stop.is_asked)
        if not self._is_over:
            self._jobs.finish()  # whoever waits for what is decided hears of it
        if not self._is_over:
            self.stop.check()

    def _forgive(self, stalled_s: float) -> None:
        """After a stall of this loop nobody has been silent: what they have said waits to be read."""
        if stalled_s > _STALL_S:
            for connection in self._members.connections():
                connection.last_heard_s += stalled_s

    def dismiss(self, reason: str) -> None:
        """Tell every client that the run is over."""
        for connection in self._members.connections():
            self._refuse(connection.peer, Why.OVER if self.reason else Why.FINISHED, reason)

    def suspend(self) -> None:
        """Save this moment after an interruption, and tell every client where to resume."""
        try:
            if self._jobs.is_quiet:  # else the compute thread may be in the middle of a step
                self._save()
        finally:
            self.say_shutdown()

    def _save(self) -> None:
        note = self.engine.snapshot()
        self._said_of_snapshot(note)
        if self.run.has_own_loops:
            self.engine.save_trained()

    def say_shutdown(self) -> None:
        """Tell every client at which step it resumes."""
        members = self.engine.ledger.state.members
        for connection in self._members.connections():
            known = members.get(connection.member.client_id)
            self._say_last(connection.peer, Shutdown(resume_at=known.step + 1 if known is not None else 1))

    # what was before

    def recover(self) -> None:
        """Go on where the ledger's log ends: every client is expected back."""
        state, now_s = self.engine.ledger.state, time.monotonic()
        self._merge_number = state.held_round
        if state.has_ended:
            self._say_why_rounds_ended()  # it may have ended between the record and this
        self._layers = self._layers_of_all(state.num_merged)
        if state.round is not None or state.turns:
            self._gate.round_opened((), state.round.step if state.round is not None else 1)
        for client_id, known in state.members.items():
            member = self._add(client_id)
            if known.has_finished:  # nobody waits for it, but it may not have heard our farewell
                member.is_out = member.has_parted = True
                member.session.restore(applied=known.applied, round_=None, next_step=0, awaits_merge=False)
                continue
            member.absent_since_s = now_s
            round_ = state.round_of(client_id)
            member.session.restore(
                applied=known.applied,
                round_=self._opening(_open_of(round_), client_id) if round_ is not None else None,
                next_step=known.next_step,
                awaits_merge=round_ is not None and (client_id in round_.uploaded or client_id not in round_.trainers),
            )
            is_expected = state.round is not None and client_id not in state.round.out
            if is_expected and member.session.phase is Phase.TRAINING and not member.session.has_done_its_steps:
                self._gate.returned(client_id)
        self._rounds.restore(
            _open_of(state.round) if state.round is not None else None,
            state.uploaded,
            state.round.out if state.round is not None else (),
            num_merged=state.num_merged,
            next_steps={client_id: state.next_step_of(client_id) for client_id in state.members},
            has_stopped=state.has_ended,
        )
        self._have_rounds_ended = self._rounds.is_parting
        self._decide(
            self._rounds.resumed([member.client_id for member in self._members if not member.is_out], now_s), now_s
        )

    def _layers_of_all(self, num_merged: int) -> tuple[TensorFrames, ...]:
        """Describe everyone's layers; the first ones only where a client comes back to them, since all begin so."""
        return self.engine.describe_layers() if num_merged or self.run.is_buffered else ()

    def _add(self, client_id: str) -> Member:
        member = self._new_member(client_id)
        self._members.add(member)
        return member

    def _new_member(self, client_id: str) -> Member:
        session = OwnLoopServerSession(self.terms) if self.run.has_own_loops else ServerSession(self.terms)
        return Member(client_id=client_id, session=session)

    # what comes in

    def _receive(self, arrived: Arrived, now_s: float) -> None:
        connection = self._members.at(arrived.peer)
        if not arrived.intact:
            self._damaged(arrived.peer, connection)
            return
        if not self.admission.is_let_in(arrived.user_id):
            self._lock_out(arrived.peer, connection)
            return
        if connection is not None:
            self._count(connection, arrived, now_s)
        try:
            if len(arrived.frames) > self.limits.message_frames:
                raise RemoteProtocolError(f"a message of more than message_frames = {self.limits.message_frames}")
            if _payload(arrived.frames) > self.limits.message_bytes:
                raise RemoteProtocolError(f"a message of more than message_bytes = {self.limits.message_bytes}")
            message = codec.decode(arrived.frames, max_frame_bytes=self.limits.frame_bytes)
            self._route(arrived, connection, message, now_s)
        except RemoteProtocolError as error:
            self._punish(arrived, connection, str(error))

    def _count(self, connection: Connection, arrived: Arrived, now_s: float) -> None:
        connection.last_heard_s = now_s
        connection.member.received += arrived.num_bytes
        if arrived.peer == connection.peer:
            connection.data_received += _payload(arrived.frames)

    def _route(self, arrived: Arrived, connection: Connection | None, message: Message, now_s: float) -> None:
        peer = arrived.peer
        match message:
            case Hello() if connection is None:
                self._admit(arrived, message, now_s)
            case Attach(session=token) if connection is None:
                self._attach(arrived, token)
            case Ping() if connection is not None:
                self._check_rate_of_pings(connection, now_s)
                self._pong(peer, connection, message.number)
            case Leave() if connection is not None:
                self._lose(connection, printable(message.reason, _MAX_REASON), waits=message.comes_back)
            case _ if connection is None:
                self._refuse(peer, Why.NO_SESSION, "no session here: say hello first (the server may be a new one)")
            case _ if peer != connection.peer:
                raise RemoteProtocolError(f"{type(message).__name__} on the control connection")
            case Resume() if not connection.is_resumed:
                if connection.is_resuming:
                    raise RemoteProtocolError("Resume before the last one is answered")
                connection.is_resuming = True
                # behind whatever is being applied, so that what it is compared with is settled
                self._jobs.submit(lambda: None, lambda _: self._resume(connection, message))
            case Fetch():
                self._provide(connection, message)
            case Probe() if not connection.is_resumed:
                self._send_back(connection, message)
            case _ if not connection.is_resumed:
                raise RemoteProtocolError(f"{type(message).__name__} before Resume")
            case _:
                self._hear(connection.member, message, now_s)

    def _check_rate_of_pings(self, connection: Connection, now_s: float) -> None:
        """Raise for more pings than an honest client has had time for, however long they were on their way."""
        connection.num_pings += 1
        beats = (now_s - connection.begun_s) / self.run.link.heartbeat_interval
        if connection.num_pings > _MAX_PINGS + 4 * beats:
            raise RemoteProtocolError(
                f"{connection.num_pings} pings in {now_s - connection.begun_s:.0f} s, where one every"
                f" link.heartbeat_interval = {self.run.link.heartbeat_interval:g} s is asked for"
            )

    def _hear(self, member: Member, message: Message, now_s: float) -> None:
        if self._jobs.num_asked_by(member.client_id) >= self._most_jobs:
            raise RemoteProtocolError(f"more than {self._most_jobs} messages that nothing was waited for after")
        accepted = member.session.receive(message)
        if isinstance(accepted, Reply):
            self._tell(member, accepted.message)
        elif accepted is not None:
            self._act(member, accepted, now_s)

    def _act(self, member: Member, message: Message, now_s: float) -> None:
        """Do what a legal message asks for."""
        client_id = member.client_id
        match message:
            case Ready():
                self._announce(member, message)
                member.has_parted = member.sits_out = False
                member.idle_s = 0.0
                if self._have_rounds_ended:
                    self._say_ended_again(member)  # it was evaluating still
                else:
                    self._decide(self._rounds.ready(client_id), now_s)
            case Forward(step=0):
                self._evaluates(member)
                self._compute(member, message, self.engine.evaluate)
            case Decode():
                self._decode(member, message, now_s)
            case EndCache():
                if self._caches.has(client_id, message.cache_id):
                    self._end_cache(client_id, message.cache_id)
            case Forward():
                self._carry_out(self._gate.forward(client_id, message, now_s), now_s)
            case Backward():
                self._compute(member, message, self.engine.backward)
            case Commit():
                if not self._takes_claims(member, message):
                    return
                self._carry_out(self._gate.commit(client_id, message, now_s), now_s)
            case Upload():
                self._shows_work(member)
                self._spool(member, message)
            case Report():
                self._evaluates(member)
                self._take_report(member, message)
            case Goodbye():
                self._part(member, message)
            case Discard(step=step):
                self._drop_unwanted(member)
                self._jobs.submit(partial(self.engine.discarded, client_id, step), _nothing, asked_by=client_id)
                self._carry_out(self._gate.finished(client_id, now_s), now_s)
            case Keep():
                self._jobs.submit(
                    partial(self.engine.keep, client_id), partial(self._tell_of_snapshot, member), asked_by=client_id
                )
            case GoBack():
                self._go_back(member, message)

    def _announce(self, member: Member, message: Ready) -> None:
        """Have a client weigh by what it announced first; its text may change honestly, so a change is only said."""
        client_id, num_examples = member.client_id, message.num_examples
        is_new = num_examples != member.num_examples
        member.held_round, member.num_examples = message.round_number, num_examples

        def say(counted: int) -> None:
            if is_new and counted != num_examples:
                text = (
                    f"{client_id} says that it has {num_examples} examples; in a merge it weighs by the {counted} that"
                    " it announced when it joined this run"
                )
                self.metrics.emit("note", text=text)

        self._jobs.submit(partial(self.engine.announced, client_id, num_examples), say)

    def _go_back(self, member: Member, message: GoBack) -> None:
        """Bring backbone and client back to a kept snapshot, unless that would take something from another client."""
        at_work = [other.client_id for other in self._members if other is not member and other.session.is_in_step]
        if at_work and not self.engine.worker.has_copies:
            reason = f"{', '.join(at_work)} is in the middle of a step: try again when it has ended"
            self._tell_of_snapshot(member, Declined(request_id=0, reason=reason))
            return

        def answer(reply: WentBack | Declined) -> None:
            if isinstance(reply, WentBack):
                known = self.engine.ledger.state.members[member.client_id]
                member.session.restore(
                    applied=known.applied, round_=None, next_step=known.next_step, awaits_merge=False
                )
                member.num_rewinds = 0
                self.metrics.emit("went_back", client_id=member.client_id, commit_number=reply.commit_number)
            self._tell_of_snapshot(member, reply)

        self._jobs.submit(
            partial(self.engine.go_back, member.client_id, message.commit_number), answer, asked_by=member.client_id
        )

    def _tell_of_snapshot(self, member: Member, reply: Kept | WentBack | Declined) -> None:
        if isinstance(member.session, OwnLoopServerSession):
            member.session.snapshot_answered()
        self._tell(member, reply)

    def _part(self, member: Member, message: Goodbye) -> None:
        """Note that a client is done, as often as it says so: the answer may be lost, or the server have ended."""
        if not member.has_parted:
            member.has_parted = True
            self.metrics.emit("client_done", client_id=member.client_id, **totals_of(message.metrics))
            self._write(Finished(client_id=member.client_id))
        crash_point("goodbye-before-farewell")
        self._tell(member, Farewell())
        self._free_caches(member)
        if member.connection is not None:
            self._members.disconnect(member.connection)
        self._leave(member, "done")

    def _send_back(self, connection: Connection, message: Probe) -> None:
        """Return a frame to a client that tries the way; few, and none that would not be legal in training."""
        connection.num_probes += 1
        content = message.content
        if connection.num_probes > _MAX_PROBES:
            raise RemoteProtocolError(
                f"{connection.num_probes} probes on a connection, where {_MAX_PROBES} is the most"
            )
        if content.dtype != "u8" or len(content.buffers) != 1:
            raise RemoteProtocolError("a probe that is not one frame of bytes")
        self._send(connection, Probed(content=content))

    def _provide(self, connection: Connection, message: Fetch) -> None:
        connection.num_fetches += 1
        if connection.num_fetches > self._most_fetches:
            raise RemoteProtocolError(f"{connection.num_fetches} pieces of files fetched, more than all files have")
        try:
            content = done_for(
                partial(self.provisions.read, message.name, message.offset, self.run.link.frame_bytes),
                f"the server cannot read {printable(message.name, 40)}, which it offers",
            )
        except Mishap as mishap:
            self._could_not(connection, mishap)
            return
        frames = TensorFrames(dtype="u8", shape=(len(content),), buffers=(content,))
        self._send(connection, Chunk(name=message.name, offset=message.offset, content=frames))

    def _pong(self, peer: bytes, connection: Connection, number: int) -> None:
        pong = Pong(
            number=number,
            waiting_for=self._waiting_for()[:_MAX_WAITING],
            bytes_sent=connection.data_sent,
            bytes_received=connection.data_received,
        )
        self._send_to(peer, connection, pong)

    def _take_report(self, member: Member, report: Report) -> None:
        if report.round_number > self._merge_number:
            raise RemoteProtocolError(f"a report of round {report.round_number}, which is not merged")
        if report.topic == "loaded":
            self.metrics.emit("loaded", client_id=member.client_id, round=report.round_number, digest=report.digest)
            return
        if report.phase != "after":
            measured = {name: value for name, value in report.metrics.items() if not name.startswith(ALSO)}
            self._jobs.submit(
                partial(self.engine.measured, member.client_id, report.round_number, measured),
                _nothing,
                asked_by=member.client_id,
            )
        also = {name.removeprefix(ALSO): value for name, value in report.metrics.items() if name.startswith(ALSO)}
        round_number = self.engine.ledger.state.ends_with if self._is_of_the_best(report) else report.round_number
        self._measurements.add(report.phase, round_number, member.client_id, complete(report.metrics))
        self.metrics.emit(
            "evaluated",
            client_id=member.client_id,
            phase=report.phase,
            round=round_number,
            **event_of(report.metrics),
            also=also,
        )

    def _say_federated(self) -> None:
        """Say what clients have measured, all together, where that has changed since it was last said."""
        for phase, round_number, clients in self._measurements.news():
            self.metrics.emit(
                "federated",
                phase=phase,
                round=round_number,
                num_clients=len(clients),
                measures=federated(clients),
            )

    def _is_of_the_best(self, report: Report) -> bool:
        """Tell whether a report is of the round that the run ends with, whose number clients do not know."""
        return self._have_rounds_ended and report.phase == "after" and self.engine.ledger.state.ends_with > 0

    # who comes in

    def _lock_out(self, peer: bytes, connection: Connection | None) -> None:
        self._refuse(
            peer,
            Why.REVOKED,
            "this client's key is not, or no longer, among those that the server lets in: ask the server's operator to"
            " run `splitfl authorize`",
        )
        if connection is not None:
            self._lose(connection, "its key was revoked", waits=False)

    def _damaged(self, peer: bytes, connection: Connection | None) -> None:
        self._refuse(peer, Why.NO_SESSION, "a message arrived damaged: connect anew and resume")
        if connection is not None:
            self._lose(connection, "sent a message that was damaged on its way")

    def _admit(self, arrived: Arrived, hello: Hello, now_s: float) -> None:
        finished = f"run {self.run_id} has finished: it has no further round"
        refused = self.admission.too_soon(arrived.user_id, now_s) or self.admission.objection(
            hello,
            arrived.user_id,
            self._members,
            finished=finished if self._rounds.is_parting else "",
            keeps_copies=self.run.has_own_loops and self.engine.worker.has_copies,  # which no merge ever ends
            now_s=now_s,
        )
        if refused is not None:
            self._refuse(arrived.peer, refused.code, refused.reason)
            return
        for knocking in self._members.knocking(hello.client_id)[: 1 - _MAX_KNOCKING]:
            self._refuse(knocking.peer, Why.NO_SESSION, "newer sessions of this client have begun: connect anew")
            self._lose(knocking, "began sessions without resuming in them")
        member = self._members.get(hello.client_id) or self._new_member(hello.client_id)
        self._welcome(self._members.connect(member, arrived.peer, arrived.user_id, now_s))

    def _welcome(self, connection: Connection) -> None:
        files = self.provisions.files
        self._send(
            connection,
            Welcome(
                session=connection.token,
                session_number=connection.number,
                run_id=self.run_id,
                settings=self.run.to_json(),
                fingerprint=self.run.fingerprint(),
                file_names=tuple(files),
                file_sizes=tuple(file.num_bytes for file in files.values()),
                file_hashes=tuple(file.digest for file in files.values()),
                limits=self.limits.announced(),
            ),
        )

    def _attach(self, arrived: Arrived, token: str) -> None:
        connection = self._members.with_token(token)
        if connection is None:
            self._refuse(arrived.peer, Why.NO_SESSION, "no session with this token: connect anew and resume")
        elif connection.user_id != arrived.user_id:
            self._refuse(arrived.peer, Why.KEY_MISMATCH, "this token was given to another key")
        elif connection.control_peer is not None:
            raise RemoteProtocolError("a second control connection")
        else:
            self._members.attach(connection, arrived.peer)

    def _resume(self, connection: Connection, claim: Resume) -> None:
        """Let a client go on: it is this member from now on, and an older session of it is over."""
        if self._members.with_token(connection.token) is not connection:
            return  # lost while the queue came to it
        connection.is_resuming = False
        member = connection.member = self._joined(connection.member)
        rival = member.connection
        if rival is not None and rival.number > connection.number:
            self._refuse(connection.peer, Why.SUPERSEDED, "a newer session of this client has begun")
            self._members.disconnect(connection)
            return
        if rival is not None and rival is not connection:
            self._supersede(rival)
        member.connection = connection
        was_training = member.session.phase is Phase.TRAINING
        if was_training:
            member.session.returned(self._gate.returned(member.client_id))
        resumed = member.session.resume(
            claim,
            held_round=self._merge_number,
            layers=self._layers,
            counted_round=self._counted_round(member.client_id),
            is_parting=self._rounds.is_parting,
        )
        self._let_go_on(connection, claim, resumed, was_training)

    def _counted_round(self, client_id: str) -> int:
        known = self.engine.ledger.state.members.get(client_id)
        return known.counted_round if known is not None else 0

    def _joined(self, newcomer: Member) -> Member:
        """Take in a client that is new; before it resumes it has only looked, and nobody waits for it."""
        known = self._members.get(newcomer.client_id)
        if known is not None:
            return known
        self._members.add(newcomer)
        self._write(Joined(client_id=newcomer.client_id))
        self._rounds.joined(newcomer.client_id)
        self.metrics.emit("client_joined", client_id=newcomer.client_id)
        return newcomer

    def _let_go_on(self, connection: Connection, claim: Resume, resumed: Resumed, was_training: bool) -> None:
        member, now_s = connection.member, time.monotonic()
        if resumed.verdict == "rewind":
            member.num_rewinds += 1
            if member.num_rewinds > _MAX_REWINDS:
                self._strike(
                    connection,
                    f"a Resume at step {claim.step}, commit {claim.commit_number}, merge {claim.held_round}, after it"
                    f" was told {_MAX_REWINDS} times that this server is at step {resumed.step}",
                )
                return
            self.metrics.emit("client_rewinds", client_id=member.client_id, step=resumed.step)
        else:
            connection.is_resumed = True
            member.held_round = self._merge_number if resumed.layers else claim.held_round
            if resumed.verdict == "anew":
                member.held_round = -1 if not resumed.layers else self._merge_number
                self.metrics.emit("client_rejoins", client_id=member.client_id, reason=resumed.reason)
            self._take_back(member)
        self._send(connection, resumed)
        if was_training and member.session.phase is not Phase.TRAINING:
            if self.run.is_buffered:
                self._write(TurnEnded(client_id=member.client_id))
            else:
                self._write(Left(client_id=member.client_id))
            self._carry_out(self._gate.finished(member.client_id, now_s), now_s)
            self._decide(self._rounds.gave_up(member.client_id), now_s)
        elif member.session.phase is Phase.TRAINING and member.session.has_done_its_steps:
            self._carry_out(self._gate.finished(member.client_id, now_s), now_s)

    def _take_back(self, member: Member) -> None:
        takes_part = member.session.phase in (Phase.TRAINING, Phase.MERGING)
        if member.is_out and takes_part:
            self._write(Returned(client_id=member.client_id))
        if member.is_out or member.absent_since_s is not None:
            self._rounds.joined(member.client_id, takes_part=takes_part)
            self.metrics.emit("client_returned", client_id=member.client_id, step=member.session.applied.step)
        member.absent_since_s, member.is_out = None, False

    def _supersede(self, rival: Connection) -> None:
        if rival.user_id:
            why = "somebody has a copy of this client's keys; tell the server's operator"
        else:  # without keys a name is all there is
            why = "another process has the same client.client_id; give each client a name of its own"
        reason = f"a newer session of this client has begun: if that was not you, {why}"
        for peer in (rival.peer, rival.control_peer):
            if peer is not None:
                self._refuse(peer, Why.SUPERSEDED, reason)
        self._lose(rival, "was replaced by a newer session of its own")

    # who breaks a rule

    def _punish(self, arrived: Arrived, connection: Connection | None, rule: str) -> None:
        """Tell a peer which rule it broke and end its session; the third time it is kept out."""
        name = connection.member.client_id if connection is not None else self.admission.name_of(arrived.user_id)
        rule = printable(rule)
        log.warning("%s broke a rule: %s", name or "a stranger", rule)
        if name is None:
            self._refuse(arrived.peer, Why.VIOLATION, f"protocol error: {rule}")
            return
        strike = self.admission.strike(name, rule)
        if strike.count <= self.limits.strikes:  # whoever is kept out fills no disk
            self.metrics.emit("violation", client_id=name, rule=rule[:200], strikes=strike.count)
        self._refuse(arrived.peer, strike.code, strike.reason)
        if connection is not None:
            self._lose(connection, f"broke a rule: {rule}", waits=not strike.is_last)

    def _check_keys(self) -> None:
        """Act on what `splitfl authorize` and `splitfl revoke` have changed."""
        if not self.admission.refresh():
            return
        revoked = [
            connection
            for connection in self._members.connections()
            if not self.admission.belongs(connection.user_id, connection.member.client_id)
        ]
        if revoked:
            # what they did so far stays, whatever comes
            self._jobs.submit(self.engine.snapshot, self._said_of_snapshot)
        for connection in revoked:
            self._lock_out(connection.peer, connection)

    def _check_endless(self, now_s: float) -> None:
        """Take a connection that was cut off for lost; a client that this happens to again and again has to wait."""
        for cut in self.listener.sweep():
            name = self.admission.name_of(cut.user_id)
            reason = f"a message without end: {cut.num_bytes} bytes, more than message_bytes"
            log.warning("cut off %s at %s: %s", name or "a stranger", cut.address, reason)
            self.metrics.emit("cut_off", address=cut.address, client_id=name or "", num_bytes=cut.num_bytes)
            if name is not None:
                self.admission.cut_off(name, now_s)
                member = self._members.get(name)
                if member is not None and member.connection is not None:
                    self._lose(member.connection, reason)

    # what the gate and the rounds decide

    def _carry_out(self, actions: Iterable[Action], now_s: float) -> None:
        for action in actions:
            match action:
                case Compute(client_id=client_id, message=message):
                    member = self._members[client_id]
                    if member.connection is not None:
                        self._compute(member, message, self.engine.forward)
                case Apply(members=members):
                    contributions = [self._contribution(client_id, commit) for client_id, commit in members]
                    self._jobs.submit(
                        partial(self.engine.decide, contributions),
                        partial(self._acknowledge, members, contributions),
                        partial(self._could_not_decide, members),
                    )
                    # next on the queue, so ahead of any work of a later step: both sides take their steps at once;
                    # whatever is stopped, since what is decided counts
                    self._jobs.submit(partial(self.engine.apply, contributions), self._said_of_snapshot, always=True)
                case CloseStep():
                    self._close_step(action, now_s)
                case SitOut(client_id=client_id, reason=reason):
                    self._sit_out(self._members[client_id], reason, now_s)
                case TakeBack(client_id=client_id):
                    self._wait_again(self._members[client_id])

    def _acknowledge(
        self, members: tuple[tuple[str, Commit], ...], contributions: list[Contribution], decided: Decided
    ) -> None:
        """Tell every member that the step counts; those whose connection is gone learn it when they resume."""
        for client_id, commit in members:
            member = self._members[client_id]
            reply = Committed(
                step=commit.step,
                commit_number=decided.commit_number,
                clip_coefficient=decided.clip_coefficient,
                durable_step=decided.durable_step,
            )
            del self._mishaps[client_id]
            self._shows_work(member)
            if member.session.phase in (Phase.TRAINING, Phase.COMMITTING):
                member.session.committed(reply)
            else:  # the round closed meanwhile; it counts all the same
                member.session.applied = Applied(
                    step=reply.step, commit_number=reply.commit_number, clip_coefficient=reply.clip_coefficient
                )
            self._tell(member, reply)
            crash_point("commit-acknowledged")
            self.history.note(
                "acknowledged", client_id=client_id, step=commit.step, commit_number=decided.commit_number
            )
            self._log_step(member, commit, contributions[0], decided)
            if member.session.has_done_its_steps:
                self._carry_out(self._gate.finished(client_id, time.monotonic()), time.monotonic())

    def _could_not_decide(self, members: tuple[tuple[str, Commit], ...], error: Exception) -> bool:
        """End the sessions of a step that could not be added up; tell whether that was it."""
        if not isinstance(error, Mishap):
            return False
        for client_id, _ in members:
            connection = self._members[client_id].connection
            if connection is not None:
                self._could_not(connection, error)
        return True

    def _contribution(self, client_id: str, commit: Commit) -> Contribution:
        learning_rate = self.run.optimizer.backbone_lr or commit.learning_rate
        return Contribution(
            slot=client_id,
            step=commit.step,
            num_label_tokens=commit.num_label_tokens,
            norms_P=realise(commit.norms_P).tolist(),
            scaling=Scaling(learning_rate=learning_rate, clip_coefficient=commit.clip_coefficient)
            if self.run.has_own_loops
            else None,
        )

    def _log_step(self, member: Member, commit: Commit, first: Contribution, decided: Decided) -> None:
        is_own_loop = first.scaling is not None
        self.metrics.emit(
            "step",
            client_id=member.client_id,
            round=member.session.round_number,
            step=commit.step,
            commit_number=decided.commit_number,
            loss=None if is_own_loop else commit.loss,  # a client's own loop keeps it to itself
            num_label_tokens=commit.num_label_tokens,
            num_tokens=member.session.asked.num_tokens,
            num_positions=member.session.asked.num_positions,
            learning_rate=self.engine.worker.learning_rate_of(first),
            clip_coefficient=decided.clip_coefficient,
            bytes_sent=member.received,
            bytes_received=member.sent,
            compute_seconds=self.engine.worker.compute.seconds,
        )

    def _close_step(self, action: CloseStep, now_s: float) -> None:
        member = self._members[action.client_id]
        if member.session.phase not in (Phase.TRAINING, Phase.COMMITTING):
            return
        refusal = member.session.step_closed(action.next_step, action.reason)
        self._drop_unwanted(member)
        self._jobs.submit(partial(self.engine.closed, member.client_id, refusal.step, action.next_step), _nothing)
        self._tell(member, refusal)
        if not member.sits_out:  # one that begins steps again and again fills no disk
            self.metrics.emit("step_refused", client_id=member.client_id, step=refusal.step, reason=action.reason)
        if member.session.has_done_its_steps:
            self._carry_out(self._gate.finished(member.client_id, now_s), now_s)

    def _decide(self, decisions: Iterable[Decision], now_s: float) -> None:
        for decision in decisions:
            match decision:
                case Open():
                    self._jobs.submit(
                        partial(self.engine.opened, decision, self.run.federation.local_steps),
                        partial(self._open_round, decision),
                    )
                case LastCall():
                    self._gate.round_closed()  # what is decided is acknowledged before anybody is called
                    self._jobs.submit(self.engine.last_call, partial(self._call_for_layers, decision))
                case Merge():
                    if decision.closes:
                        self._gate.round_closed()
                    self._jobs.submit(partial(self.engine.merge, decision), partial(self._merged, decision))
                case Release(client_id=client_id):
                    self._release(client_id, "")
                case Judge(round_number=number):
                    self._jobs.submit(partial(self.engine.judge, number), self._judged)
                case Stop(reason=reason):
                    self._jobs.submit(partial(self.engine.end_rounds, reason), self._rounds_ended)
                case End(reason=reason):
                    self._say_federated()
                    self.reason = reason
                    self._is_over = True

    def _open_round(self, round_: Open, _: None) -> None:
        """Tell everybody of a round that is written down."""
        self._gate.round_opened(round_.trainers, round_.first_step)
        self._say_federated()
        self.metrics.emit(
            "round_opened",
            round=round_.round_number,
            trainers=round_.trainers,
            first_step=round_.first_step,
            num_steps=self.run.federation.local_steps,
        )
        for client_id in round_.clients:
            member = self._members[client_id]
            opened = self._opening(round_, client_id)
            member.session.phase = Phase.READY  # one whose connection was lost meanwhile is in the round as well
            member.session.opened(opened)
            member.idle_s, member.num_sat_out = 0.0, 0
            self._tell(member, opened)
            if member.is_out:
                self._carry_out(self._gate.finished(client_id, time.monotonic()), time.monotonic())
        self._rounds.opened(time.monotonic())
        for client_id in round_.trainers:
            if self._gate.sits_out(client_id):
                self._sit_out(self._members[client_id], "has missed too many steps before", time.monotonic())

    def _judged(self, verdict: Verdict) -> None:
        """Say what the verdict on the last merge is, and go on as it asks."""
        standing = verdict.standing
        self._say_federated()
        self.metrics.emit(
            "judged",
            round=standing.judged_round,
            metric=self.run.federation.metric_for_best_model,
            value=standing.value,
            best_round=standing.best_round,
            best_value=standing.best_value if standing.best_round else None,
            rounds_without_improvement=standing.rounds_without_improvement,
        )
        now_s = time.monotonic()
        self._decide(self._rounds.judged(verdict.reason, now_s), now_s)

    def _rounds_ended(self, note: str) -> None:
        """Tell everybody who waits for the next round that there is none."""
        state = self.engine.ledger.state
        self._have_rounds_ended = True
        if note:
            self.metrics.emit("note", text=note)
        self._say_why_rounds_ended()
        if state.held_round != self._merge_number:
            self._merge_number, self._layers = state.held_round, self.engine.describe_layers()
        for member in self._members:
            if member.session.phase is Phase.READY:
                self._say_ended(member)
        now_s = time.monotonic()
        self._decide(self._rounds.stopped(now_s), now_s)

    def _say_why_rounds_ended(self) -> None:
        state = self.engine.ledger.state
        self.metrics.emit("rounds_ended", reason=state.end_reason, round=state.num_merged, best_round=state.ends_with)

    def _say_ended_again(self, member: Member) -> None:
        member.num_ends_told += 1
        if member.num_ends_told > _MAX_ENDS_TOLD:
            raise RemoteProtocolError("Ready again and again, where no round is left")
        self._say_ended(member)

    def _say_ended(self, member: Member) -> None:
        state = self.engine.ledger.state
        layers = () if member.held_round == self._merge_number else self._layers
        member.session.rounds_ended()
        member.held_round = self._merge_number
        self._tell(
            member,
            RoundsEnded(
                round_number=self._merge_number,
                best_round=state.ends_with,
                reason=state.end_reason,
                layers=layers,
            ),
        )

    def _opening(self, round_: Open, client_id: str) -> RoundOpened:
        member = self._members[client_id]
        return RoundOpened(
            round_number=round_.round_number,
            first_step=round_.first_step,
            num_steps=self.run.federation.local_steps if client_id in round_.trainers else 0,
            layers=() if member.held_round == self._merge_number else self._layers,
        )

    def _call_for_layers(self, call: LastCall, able: set[str]) -> None:
        """End the round's steps for those still at work; who has finished none has nothing to upload."""
        self.metrics.emit("last_call", round=call.round_number, clients=sorted(able.intersection(call.clients)))
        reason = f"the round closes after {self.run.federation.round_timeout:g} s (federation.round_timeout)"
        now_s = time.monotonic()
        for client_id in call.clients:
            session = self._members[client_id].session
            if client_id not in able:
                self._decide(self._rounds.gave_up(client_id), now_s)
            elif not session.has_done_its_steps:
                end = session.last_step + 1
                self._close_step(CloseStep(client_id=client_id, next_step=end, reason=reason), now_s)

    def _merged(self, merge: Merge, merged: MergedLayers) -> None:
        self._layers = merged.layers
        self._merge_number = merge.round_number
        if not merged.reason:
            self._blame.merged()
        message = Merged(
            round_number=merge.round_number,
            accepted=not merged.reason,
            reason=merged.reason,
            is_last=self._rounds.is_last,
            counted=False,
            layers=self._layers,
        )
        self.metrics.emit(
            "merged",
            round=merge.round_number,
            accepted=message.accepted,
            reason=merged.reason,
            clients=merged.weights,
            capped=merged.capped,
            moved=merged.moved,
            absent=merge.absent,
            num_tensors=len(self.terms.layer_shapes),
            digest=merged.digest,
            **({} if merged.uploads is None else {"uploads": merged.uploads}),
        )
        self._said_of_snapshot(merged.note)
        if merge.closes:
            self._close_round(message, merged.weights)
        now_s = time.monotonic()
        self._decide(self._rounds.merged(now_s, merged.reason), now_s)

    def _close_round(self, message: Merged, weights: Mapping[str, float]) -> None:
        """Tell everybody of the merge that ends their round."""
        self._have_rounds_ended = message.is_last
        for member in self._members:
            if member.session.phase in (Phase.TRAINING, Phase.COMMITTING, Phase.MERGING):
                self._end_round(member, replace(message, counted=member.client_id in weights))
            elif message.is_last and member.session.phase is Phase.READY:
                self._say_ended(member)  # it came for a round that there will not be

    def _end_round(self, member: Member, message: Merged) -> None:
        member.session.merged(message)
        member.idle_s = 0.0
        del self._mishaps[member.client_id]
        self._drop_unwanted(member)
        self._stuck.pop(member.client_id, None)
        self._jobs.submit(partial(self.engine.worker.discard, member.client_id), _nothing)
        self._tell(member, message)

    def _release(self, client_id: str, objection: str) -> None:
        """Give a client that has uploaded the newest layers; it goes on with a round of its own."""
        member = self._members[client_id]
        if member.session.phase is not Phase.MERGING:
            return  # the last merge came first
        message = Merged(
            round_number=self._merge_number,
            accepted=not objection,
            reason=objection,
            is_last=False,
            counted=False,
            layers=self._layers,
        )
        self._end_round(member, message)

    # what the compute thread is asked for

    def _compute(self, member: Member, message: B, work: Callable[[str, B], ForwardDone | BackwardDone]) -> None:
        """Have a micro-batch computed and answer with the result; a tensor that cannot be taken ends the session."""
        connection, number = member.connection, message.request_id
        is_evaluation = isinstance(message, Forward) and message.step == 0
        stage = Stage.EVALUATION if is_evaluation else Stage.TRAINING
        member.waiting[number] = message

        def answer(reply: ForwardDone | BackwardDone | None) -> None:
            if reply is None or connection is None or member.connection is not connection:
                return
            if stage is Stage.EVALUATION:
                self._went_on(member, stage)
            if member.session.answered(reply):
                self._send(connection, reply)

        def guarded() -> ForwardDone | BackwardDone | None:
            if member.connection is not connection or member.waiting.pop(number, None) is not message:
                return None  # nobody waits for it any more
            return work(member.client_id, message)

        def refuse(error: Exception) -> bool:
            is_mine = connection is not None and member.connection is connection
            if is_mine and isinstance(error, OutOfBounds) and self._is_excused(member, stage, error):
                return True
            return self._refuse_tensor(connection, error)

        self._jobs.submit(guarded, answer, refuse, asked_by=member.client_id)

    def _drop_unwanted(self, member: Member) -> None:
        """Let go of micro-batches on the queue whose answer nobody waits for."""
        for number in [number for number in member.waiting if not member.session.awaits(number)]:
            member.waiting.pop(number, None)

    # whose fault it is

    def _takes_claims(self, member: Member, commit: Commit) -> bool:
        """Check what a client says of its gradients; False if it may follow from the last merge that they are none."""
        try:
            _check_claims(commit)
        except OutOfBounds as error:
            if not self._is_excused(member, Stage.TRAINING, error):
                raise
            return False
        return True

    def _went_on(self, member: Member, stage: Stage) -> None:
        self._blame.went_on(member.client_id, stage)
        self._stuck.pop(member.client_id, None)

    def _may_follow_from_a_merge(self, client_id: str) -> bool:
        """Tell whether a client's layers are those of a merge still, or others are stuck with what it began with."""
        state = self.engine.ledger.state
        round_ = state.round_of(client_id)
        has_learned = round_ is not None and bool(round_.finished.get(client_id))
        return state.folded_round > 0 and (not has_learned or bool(self._stuck.keys() - {client_id}))

    def _is_excused(self, member: Member, stage: Stage, error: OutOfBounds) -> bool:
        """Tell whether what a client sent may follow from a merge: then it waits for what the others show.

        It sits the round out meanwhile, so that nobody waits for it.
        """
        client_id, now_s = member.client_id, time.monotonic()
        if not self._may_follow_from_a_merge(client_id):
            return False
        self._blame.stuck(client_id, stage)
        if self._blame.fault(client_id, stage, self._at_work()) is Fault.ITS_OWN:
            return False
        if client_id not in self._stuck:
            merge = self.engine.ledger.state.folded_round
            self.metrics.emit("stuck", client_id=client_id, round=merge, reason=str(error))
        self._stuck[client_id] = stage, error
        self._settle_blame()
        if client_id in self._stuck and stage is Stage.TRAINING:
            self._jobs.submit(partial(self.engine.worker.discard, client_id), _nothing)
            self._carry_out(self._gate.finished(client_id, now_s), now_s)
            self._decide(self._rounds.gave_up(client_id), now_s)
        return True

    def _settle_blame(self) -> None:
        """Punish those who wait for it where the others have gone on, or end the run where most cannot."""
        for client_id, (stage, error) in list(self._stuck.items()):
            fault, connection = (
                self._blame.fault(client_id, stage, self._at_work()),
                self._members[client_id].connection,
            )
            if fault is Fault.THE_MERGES:
                self._stuck.clear()
                self._jobs.submit(self.engine.generation_before_the_merge, partial(self._end_over_merge, str(error)))
                return
            if fault is Fault.ITS_OWN:
                del self._stuck[client_id]
                self._refuse_tensor(connection, error)

    def _at_work(self) -> list[str]:
        """Name the clients that train from everyone's layers, or are about to."""
        round_ = self.engine.ledger.state.round
        if round_ is None:
            return [member.client_id for member in self._members if not member.is_out]
        return [
            client_id for client_id in round_.trainers if client_id not in round_.out or client_id in round_.uploaded
        ]

    def _end_over_merge(self, what: str, generation: int | None) -> None:
        """Give up a run whose layers nobody can use; who moved them how far is in the sentence."""
        state = self.engine.ledger.state
        stuck = [client_id for client_id in self._at_work() if self._blame.is_stuck(client_id)]
        farthest = sorted(state.folded.items(), key=lambda each: (-each[1], each[0]))
        moves = ", ".join(f"{client_id} {share:.0%}" for client_id, share in farthest)
        back = (
            f"`splitfl rollback RUN_DIR --to {generation}` takes the run back to before that merge"
            if generation is not None
            else "no snapshot from before that merge is kept (storage.keep_snapshots)"
        )
        reason = (
            f"the layers of merge {state.folded_round} are of no use: {', '.join(stuck)} got {what} from them. In it"
            f" were, with how far each had moved its layers of what strategy.max_update allows: {moves}. Keep out whom"
            f" you do not trust (`splitfl revoke`); {back}"
        )
        self._decide([End(reason=reason)], time.monotonic())

    def _decode(self, member: Member, message: Decode, now_s: float) -> None:
        """Have new positions of a generation computed, or decline; either way it is no violation."""
        connection = member.connection
        reason = self._caches.admit(member.client_id, message, now_s)

        def work() -> ForwardDone | Declined | None:
            if member.connection is not connection:
                return None  # nobody waits for it any more
            if reason:
                return Declined(request_id=message.request_id, reason=reason)
            return self.engine.decode(member.client_id, message)

        def answer(reply: ForwardDone | Declined | None) -> None:
            if reply is None or connection is None or member.connection is not connection:
                return
            if isinstance(reply, Declined) and not reason:  # by the worker, which has freed the cache
                self._caches.ended(member.client_id, message.cache_id)
            member.session.decoded()
            self._send(connection, reply)

        self._jobs.submit(work, answer, partial(self._refuse_tensor, connection), asked_by=member.client_id)

    def _end_cache(self, client_id: str, cache_id: int) -> None:
        self._caches.ended(client_id, cache_id)
        self._jobs.submit(partial(self.engine.worker.end_cache, client_id, cache_id), _nothing)

    def _free_caches(self, member: Member) -> None:
        self._caches.forget(member.client_id)
        self._jobs.submit(partial(self.engine.worker.end_caches, member.client_id), _nothing)

    def _spool(self, member: Member, upload: Upload) -> None:
        def count(spooled: Spooled) -> None:
            if spooled.objection:
                self.metrics.emit("upload_dropped", client_id=member.client_id, reason=spooled.objection)
                self._release(member.client_id, spooled.objection)
            else:
                self._went_on(member, Stage.TRAINING)
                self._settle_blame()  # before the round closes
                self._decide(self._rounds.uploaded(member.client_id, spooled.name), time.monotonic())

        self._jobs.submit(
            partial(self.engine.spool, member.client_id, upload),
            count,
            partial(self._refuse_layers, member, member.connection),
        )

    def _refuse_layers(self, member: Member, connection: Connection | None, error: Exception) -> bool:
        """Take an upload back that could not be taken: the client may send another."""
        if isinstance(error, RemoteProtocolError | Mishap) and member.session.phase is Phase.MERGING:
            member.session.phase = Phase.TRAINING
        return self._refuse_tensor(connection, error)

    def _refuse_tensor(self, connection: Connection | None, error: Exception) -> bool:
        """End the session of a client whose tensors could not be taken; tell whether that was the error."""
        if isinstance(error, Mishap):
            if connection is not None and connection.member.connection is connection:
                self._could_not(connection, error)
            return True
        if not isinstance(error, RemoteProtocolError):
            return False
        if connection is not None and connection.member.connection is connection:
            self._strike(connection, str(error))
        return True

    def _strike(self, connection: Connection, rule: str) -> None:
        self._punish(Arrived(peer=connection.peer, user_id=connection.user_id, frames=[]), connection, rule)

    def _could_not(self, connection: Connection, mishap: Mishap) -> None:
        """Tell a client that something could not be done for it; the third time, what to change."""
        member = connection.member
        self._mishaps[member.client_id] += 1
        count = self._mishaps[member.client_id]
        code, then = Why.FAILED, f"time {count}: it is tried again"
        if count >= _LAST_MISHAP and mishap.is_memory:
            code, then = Why.TOO_LARGE, "set client.micro_batch_rows so that a step goes in smaller pieces"
        elif count >= _LAST_MISHAP:
            code, then = Why.OVER, f"{count} times in a row: tell the server's operator"
        log.error("%s: %s", member.client_id, mishap)
        if count <= _LAST_MISHAP:
            self.metrics.emit("failed", client_id=member.client_id, reason=str(mishap), count=count)
        self._refuse(connection.peer, code, f"{mishap}; {then}")
        self._lose(connection, f"had something that could not be done for it: {mishap}")

    def _said_of_snapshot(self, note: str) -> None:
        if note:
            log.error("no snapshot could be taken: %s", note)
            self.metrics.emit("snapshot_failed", reason=note)

    # who is there

    def _tick(self, now_s: float) -> None:
        if now_s >= self._keys_due_s:
            self._keys_due_s = now_s + _KEYS_EVERY_S
            self._check_keys()
        self._check_endless(now_s)
        for connection in self._members.connections():
            silent_s = now_s - connection.last_heard_s
            if silent_s > self.run.link.heartbeat_timeout:
                self._lose(connection, f"fell silent for {silent_s:.0f} s")
        for client_id, cache_id in self._caches.expired(now_s):
            self._end_cache(client_id, cache_id)
        patience_s = self.run.federation.step_timeout
        for member in self._members:
            if member.absent_since_s is not None and now_s - member.absent_since_s > patience_s:
                self._leave(member, f"was away for more than step_timeout = {patience_s:g} s")
        self._check_idle(now_s)
        self._settle_blame()
        self._carry_out(self._gate.ticked(now_s), now_s)
        self._decide(self._rounds.ticked(now_s), now_s)
        self._say_what_is_waited_for(now_s)

    def _check_idle(self, now_s: float) -> None:
        """Wait no longer for who is there, owes the others something, and has shown nothing for too long."""
        passed_s, self._ticked_s = min(_MAX_PASSED_S, now_s - self._ticked_s), now_s
        federation, link = self.run.federation, self.run.link
        patience_s = federation.max_missed_steps * federation.step_timeout
        patience_s += self.limits.message_bytes / link.slowest_link_bytes_per_second  # it may be sending
        for member in self._members:
            if member.connection is None or not member.session.is_its_turn:
                continue
            member.idle_s += passed_s
            if member.idle_s > patience_s and not member.sits_out and self._rounds.waits_for(member.client_id):
                self._sit_out(member, f"has shown nothing for {patience_s:.0f} s, and sits out until it does", now_s)

    def _sit_out(self, member: Member, reason: str, now_s: float) -> None:
        if member.sits_out:
            return
        member.sits_out = True
        member.num_sat_out += 1
        self.metrics.emit("sits_out", client_id=member.client_id, reason=reason)
        self._decide(self._rounds.sits_out(member.client_id), now_s)

    def _shows_work(self, member: Member) -> None:
        """Take note of something finished; whoever sat out twice in a round is not waited for again before the next."""
        member.idle_s = 0.0
        if member.sits_out and member.num_sat_out < _MAX_SAT_OUT and not self._gate.sits_out(member.client_id):
            self._wait_again(member)

    def _evaluates(self, member: Member) -> None:
        """Take note of work between two rounds, or behind the last, for which the run's end waits."""
        member.idle_s = 0.0
        if self._rounds.is_parting:
            self._rounds.comes_back(member.client_id)  # it may have been late for a round
            self._wait_again(member)

    def _wait_again(self, member: Member) -> None:
        member.idle_s = 0.0
        if not member.sits_out:
            return
        member.sits_out = False
        self.metrics.emit("taken_back", client_id=member.client_id)
        self._rounds.comes_back(member.client_id)

    def _say_what_is_waited_for(self, now_s: float) -> None:
        text, (last, due_s) = self._waiting_for(), self._waiting_said
        if text != last:
            self._waiting_said = (text, now_s + _WAITING_AFTER_S)
        elif text and now_s >= due_s:
            self.metrics.emit("waiting", text=text)
            self._waiting_said = (text, now_s + _WAITING_EVERY_S)

    def _waiting_for(self) -> str:
        absent = [member.client_id for member in self._members if member.absent_since_s is not None]
        slow = self._gate.waiting_for()
        text = f"the step of {', '.join(slow)}" if slow else self._rounds.waiting_for()
        return f"{text} (absent: {', '.join(absent)})" if text and absent else text

    def _lose(self, connection: Connection, reason: str, *, waits: bool = True) -> None:
        """Forget a connection and what was under way on it; the member is waited for, or the run goes on without it."""
        member, now_s = connection.member, time.monotonic()
        if not self._members.disconnect(connection):
            return
        member.session.disconnected()
        member.waiting.clear()
        self._stuck.pop(member.client_id, None)
        self._free_caches(member)
        self._jobs.submit(partial(self.engine.worker.discard, member.client_id), _nothing)
        self._rounds.lost(member.client_id)
        self._carry_out(self._gate.lost(member.client_id, now_s), now_s)
        if waits:
            member.absent_since_s = now_s
            self.metrics.emit("client_lost", client_id=member.client_id, reason=reason)
        else:
            self._leave(member, reason)

    def _leave(self, member: Member, reason: str) -> None:
        """Go on without a client, by the rules of the config, until it comes back."""
        if member.is_out:
            return
        now_s = time.monotonic()
        member.absent_since_s, member.is_out = None, True
        self.metrics.emit("client_left", client_id=member.client_id, reason=reason)
        self._write(Left(client_id=member.client_id))
        self._carry_out(self._gate.finished(member.client_id, now_s), now_s)
        self._decide(self._rounds.left(member.client_id), now_s)

    def _write(self, entry: Entry) -> None:
        """Write into the ledger that a member has come or gone."""
        self._jobs.submit(partial(self.engine.ledger.write, entry), _nothing, always=True)

    # what goes out

    def _tell(self, member: Member, message: Message) -> None:
        """Send to a member if it is connected; if not, it learns what it must when it resumes."""
        if member.connection is not None:
            self._send(member.connection, message)

    def _send(self, connection: Connection, message: Message) -> None:
        self._send_to(connection.peer, connection, message)

    def _send_to(self, peer: bytes, connection: Connection, message: Message) -> None:
        frames = codec.encode(message)
        num_bytes = _payload(frames)
        if num_bytes > self.limits.message_bytes:
            raise LocalProtocolError(
                f"{type(message).__name__} of {num_bytes} bytes, more than message_bytes = {self.limits.message_bytes}"
            )
        try:
            connection.member.sent += self.listener.send(peer, frames)
        except PeerGone as error:
            self._lose(connection, str(error))
            return
        if peer == connection.peer:
            connection.data_sent += num_bytes

    def _refuse(self, peer: bytes, code: Why, reason: str) -> None:
        log.info("refused a peer (%s): %s", code, printable(reason))
        self._say_last(peer, Refusal(code=code, reason=reason))

    def _say_last(self, peer: bytes, message: Message) -> None:
        """Send what nothing follows; a peer that has gone already misses nothing."""
        try:
            self.listener.send(peer, codec.encode(message))
        except PeerGone:
            log.info("a peer had gone before it was told of %s", type(message).__name__)


def _open_of(round_: RoundState) -> Open:
    """Say again how a round opened."""
    return Open(
        round_number=round_.number,
        clients=tuple(round_.clients),
        trainers=tuple(round_.trainers),
        first_step=round_.first_step,
    )


def _nothing(_: object) -> None:
    """Follow a job up with nothing."""


def _payload(frames: Iterable[Buffer]) -> int:
    return sum(map(len, frames))


def _check_claims(commit: Commit) -> None:
    """Raise for what must not reach the others' step."""
    if not math.isfinite(commit.loss):
        raise OutOfBounds("a loss that is not finite (NONFINITE_TENSOR)")
    if any(norm < 0 and norm != NO_GRADIENT for norm in realise(commit.norms_P).tolist()):
        raise RemoteProtocolError(f"a negative norm of a gradient (only {NO_GRADIENT:g} is one, for none)")
