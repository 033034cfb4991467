"""Clients that come: said hello to, given files, and told where they go on."""

from dataclasses import dataclass, replace
from typing import ClassVar

from server_backbone.deciding.gates import Gate
from server_backbone.deciding.rounds import Rounds
from server_backbone.desks.desk import (
    NOTHING,
    Desk,
    Effect,
    Effects,
    FinishedSteps,
    GivesUp,
    GoesOn,
    Lose,
    Strike,
    WorkQueue,
)
from server_backbone.desks.training.layers import CommonLayers
from server_backbone.desks.training.openings import Openings
from server_backbone.door.admission import Admission
from server_backbone.door.mail import Mail
from server_backbone.door.members import Connection, Member, Members
from server_backbone.engine import work
from server_backbone.engine.engine import Engine
from server_backbone.engine.work import Work
from server_backbone.kinds import ServerParts
from server_backbone.records.entries import Joined, Returned
from server_backbone.records.state import MemberState
from splitfl.config.trees import RunConfig
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Attach, Hello, Message, Resume, Resumed, Welcome, Why
from splitfl.session.server_session import Phase
from splitfl.session.terms import Terms
from splitfl.telemetry.metrics import MetricsLog
from splitfl.transport.zeromq import Arrived

_MAX_KNOCKING = 4
_MAX_REWINDS = 3


@dataclass(kw_only=True, eq=False)
class Arrivals(Desk):
    """From `Hello` to `Resumed`."""

    run: RunConfig
    kind: ServerParts
    terms: Terms
    greeting: Welcome
    """For every client, but for its session."""
    admission: Admission
    members: Members
    gate: Gate
    rounds: Rounds
    common: CommonLayers
    openings: Openings
    engine: Engine
    queue: WorkQueue
    mail: Mail
    metrics: MetricsLog

    takes: ClassVar[tuple[type[Message], ...]] = (Resume,)
    finishes: ClassVar[tuple[type[Work], ...]] = (work.Settle,)
    carries: ClassVar[tuple[type[Effect], ...]] = (GoesOn,)

    def hear_stranger(self, arrived: Arrived, message: Message, now_s: float) -> Effects:
        """Take what comes from a peer without a session."""
        match message:
            case Hello():
                return self._admit(arrived, message, now_s)
            case Attach(session=token):
                self._attach(arrived, token)
            case _:
                reason = "no session here: say hello first (the server may be a new one)"
                self.mail.refuse(arrived.peer, Why.NO_SESSION, reason)
        return NOTHING

    def receive(self, connection: Connection, message: Message, now_s: float) -> Effects:
        """Have what is being applied settled, so that what a `Resume` is compared with is."""
        if not isinstance(message, Resume) or connection.is_resumed:
            raise RemoteProtocolError(f"{type(message).__name__} after Resume")
        if connection.is_resuming:
            raise RemoteProtocolError("Resume before the last one is answered")
        connection.is_resuming = True
        self.queue.put(work.Settle(token=connection.token, claim=message))
        return NOTHING

    def done(self, done: Work, result: object, now_s: float) -> Effects:
        """Let a client go on, unless a newer session of it has begun; an older one is over."""
        connection = self.members.with_token(done.token) if isinstance(done, work.Settle) else None
        if connection is None or not isinstance(done, work.Settle):
            return NOTHING  # lost while the queue came to it
        connection.is_resuming = False
        member = connection.member = self._joined(connection.member)
        rival = member.connection
        goes_on = GoesOn(connection=connection, claim=done.claim)
        if rival is None or rival is connection:
            return [goes_on]
        if rival.number > connection.number:
            self.mail.refuse(connection.peer, Why.SUPERSEDED, "a newer session of this client has begun")
            self.members.disconnect(connection)
            return NOTHING
        return [self._superseded(rival), goes_on]

    def carry_out(self, effect: Effect, now_s: float) -> Effects:
        """Answer a `Resume`."""
        if not isinstance(effect, GoesOn):
            return NOTHING
        connection, claim = effect.connection, effect.claim
        member = connection.member
        member.connection = connection
        was_training = member.session.phase is Phase.TRAINING
        if was_training:
            member.session.returned(self.gate.returned(member.client_id))
        resumed = member.session.resume(
            claim,
            held_round=self.common.held_round,
            layers=self.common.layers,
            counted_round=self.common.counted_round(member.client_id),
            is_parting=self.rounds.is_parting,
        )
        return self._let_go_on(connection, claim, resumed, was_training)

    def restore(self, client_id: str, known: MemberState, now_s: float) -> None:
        """Expect a client back that was in the run before this process."""
        member = self.new_member(client_id)
        self.members.add(member)
        if known.has_finished:  # nobody waits for it, but it may not have heard our farewell
            member.is_out = member.has_parted = True
            member.session.restore(applied=known.applied, round_=None, next_step=0, awaits_merge=False)
            return
        state = self.engine.view.state
        member.absent_since_s = now_s
        round_ = state.round_of(client_id)
        member.session.restore(
            applied=known.applied,
            round_=self.openings.opening(round_.opened(), client_id) if round_ is not None else None,
            next_step=known.next_step,
            awaits_merge=round_ is not None and (client_id in round_.uploaded or client_id not in round_.trainers),
        )
        is_expected = state.round is not None and client_id not in state.round.out
        if is_expected and member.session.phase is Phase.TRAINING and not member.session.has_done_its_steps:
            self.gate.returned(client_id)

    def _admit(self, arrived: Arrived, hello: Hello, now_s: float) -> Effects:
        finished = f"run {self.greeting.run_id} has finished: it has no further round"
        refused = self.admission.too_soon(arrived.user_id, now_s) or self.admission.objection(
            hello,
            arrived.user_id,
            self.members,
            finished=finished if self.rounds.is_parting else "",
            keeps_copies=self.kind.keeps_copies(self.run),
            now_s=now_s,
        )
        if refused is not None:
            self.mail.refuse(arrived.peer, refused.code, refused.reason)
            return NOTHING
        lost = []
        for knocking in self.members.knocking(hello.client_id)[: 1 - _MAX_KNOCKING]:
            self.mail.refuse(knocking.peer, Why.NO_SESSION, "newer sessions of this client have begun: connect anew")
            lost.append(Lose(connection=knocking, reason="began sessions without resuming in them"))
        member = self.members.get(hello.client_id) or self.new_member(hello.client_id)
        connection = self.members.connect(member, arrived.peer, arrived.user_id, now_s)
        self.mail.send(connection, replace(self.greeting, session=connection.token, session_number=connection.number))
        return lost

    def _attach(self, arrived: Arrived, token: str) -> None:
        connection = self.members.with_token(token)
        if connection is None:
            self.mail.refuse(arrived.peer, Why.NO_SESSION, "no session with this token: connect anew and resume")
        elif connection.user_id != arrived.user_id:
            self.mail.refuse(arrived.peer, Why.KEY_MISMATCH, "this token was given to another key")
        elif connection.control_peer is not None:
            raise RemoteProtocolError("a second control connection")
        else:
            self.members.attach(connection, arrived.peer)

    def new_member(self, client_id: str) -> Member:
        """Return a client that has only looked in yet."""
        return Member(client_id=client_id, session=self.kind.session(self.terms))

    def _joined(self, newcomer: Member) -> Member:
        """Take in a client that is new; before it resumes it has only looked, and nobody waits for it."""
        known = self.members.get(newcomer.client_id)
        if known is not None:
            return known
        self.members.add(newcomer)
        self.queue.put(work.Write(entry=Joined(client_id=newcomer.client_id)))
        self.rounds.joined(newcomer.client_id)
        self.metrics.emit("client_joined", client_id=newcomer.client_id)
        return newcomer

    def _superseded(self, rival: Connection) -> Lose:
        if rival.user_id:
            why = "somebody has a copy of this client's keys; tell the server's operator"
        else:  # without keys a name is all there is
            why = "another process has the same client.client_id; give each client a name of its own"
        reason = f"a newer session of this client has begun: if that was not you, {why}"
        for peer in (rival.peer, rival.control_peer):
            if peer is not None:
                self.mail.refuse(peer, Why.SUPERSEDED, reason)
        return Lose(connection=rival, reason="was replaced by a newer session of its own")

    def _let_go_on(self, connection: Connection, claim: Resume, resumed: Resumed, was_training: bool) -> Effects:
        member = connection.member
        if resumed.verdict == "rewind":
            member.num_rewinds += 1
            if member.num_rewinds > _MAX_REWINDS:
                rule = (
                    f"a Resume at step {claim.step}, commit {claim.commit_number}, merge {claim.held_round}, after it"
                    f" was told {_MAX_REWINDS} times that this server is at step {resumed.step}"
                )
                return [Strike(connection=connection, rule=rule)]
            self.metrics.emit("client_rewinds", client_id=member.client_id, step=resumed.step)
        else:
            connection.is_resumed = True
            member.held_round = self.common.held_round if resumed.layers else claim.held_round
            if resumed.verdict == "anew":
                member.held_round = -1 if not resumed.layers else self.common.held_round
                self.metrics.emit("client_rejoins", client_id=member.client_id, reason=resumed.reason)
            self._take_back(member)
        self.mail.send(connection, resumed)
        if was_training and member.session.phase is not Phase.TRAINING:
            self.queue.put(work.Write(entry=self.kind.gone(member.client_id)))
            return [FinishedSteps(client_id=member.client_id), GivesUp(client_id=member.client_id)]
        if member.session.phase is Phase.TRAINING and member.session.has_done_its_steps:
            return [FinishedSteps(client_id=member.client_id)]
        return NOTHING

    def _take_back(self, member: Member) -> None:
        takes_part = member.session.phase in (Phase.TRAINING, Phase.MERGING)
        if member.is_out and takes_part:
            self.queue.put(work.Write(entry=Returned(client_id=member.client_id)))
        if member.is_out or member.absent_since_s is not None:
            self.rounds.joined(member.client_id, takes_part=takes_part)
            self.metrics.emit("client_returned", client_id=member.client_id, step=member.session.applied.step)
        member.absent_since_s, member.is_out = None, False
