"""Training steps: micro-batches computed when the gate lets them, and commits applied and acknowledged.

The gate decides who begins. The messages stay here until then, so that a hidden state goes from its session to the
queue and nowhere else.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from server_backbone.compute.blocks_worker import Contribution
from server_backbone.compute.mishaps import Mishap
from server_backbone.deciding.blame import Stage
from server_backbone.deciding.gates import Apply, Begin, CloseStep, Gate
from server_backbone.desks.desk import (
    NOTHING,
    CouldNot,
    Desk,
    Effect,
    Effects,
    Evaluates,
    FinishedSteps,
    ShowsWork,
    WorkQueue,
    refused,
)
from server_backbone.desks.training.excuses import Excuses
from server_backbone.door.mail import Mail
from server_backbone.door.members import Connection, Member, Members
from server_backbone.engine import work
from server_backbone.engine.engine import Engine
from server_backbone.engine.steps import Decided
from server_backbone.engine.work import Work
from server_backbone.kinds import ServerParts
from splitfl.config.trees import RunConfig
from splitfl.durability.crash import crash_point
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Backward, BackwardDone, Commit, Committed, Discard, Forward, ForwardDone, Message
from splitfl.protocol.roles import Role
from splitfl.protocol.tensors import OutOfBounds, Tensors
from splitfl.session.server_session import Applied, Phase
from splitfl.telemetry.history import History
from splitfl.telemetry.metrics import MetricsLog
from splitfl.training.optimizer import NO_GRADIENT


@dataclass(kw_only=True, eq=False)
class Steps(Desk):
    """`Forward` -> gate -> `ForwardDone`; `Backward` -> `BackwardDone`; `Commit` -> gate -> `Committed` to all."""

    run: RunConfig
    kind: ServerParts
    members: Members
    gate: Gate
    excuses: Excuses
    engine: Engine
    queue: WorkQueue
    mail: Mail
    metrics: MetricsLog
    history: History
    tensors: Tensors
    _held: dict[str, list[work.Run]] = field(default_factory=dict, init=False)
    """Micro-batches that the gate has not let begin, by client."""
    _asked: dict[str, Commit] = field(default_factory=dict, init=False)
    """Each client's last request to apply a step."""

    takes: ClassVar[tuple[type[Message], ...]] = (Forward, Backward, Commit, Discard)
    finishes: ClassVar[tuple[type[Work], ...]] = (work.Run, work.Decide)
    carries: ClassVar[tuple[type[Effect], ...]] = (Begin, Apply, CloseStep, FinishedSteps)

    def receive(self, connection: Connection, message: Message, now_s: float) -> Effects:
        """Have a micro-batch computed, or a step committed or given up, when it is time."""
        member = connection.member
        match message:
            case Forward(step=0) | Backward():
                self.queue.put(_run(member, message))
                return [Evaluates(client_id=member.client_id)] if isinstance(message, Forward) else NOTHING
            case Forward():
                self._held.setdefault(member.client_id, []).append(_run(member, message))
                return self.gate.forward(member.client_id, message.step, now_s)
            case Commit():
                excused = self._check_claims(member, message)
                if excused is not None:
                    return excused
                self._asked[member.client_id] = message
                return self.gate.commit(member.client_id, now_s)
            case Discard():
                member.drop(unwanted_only=True)
                self.queue.put(work.GiveUpStep(client_id=member.client_id, step=message.step))
                return self.gate.finished(member.client_id, now_s)
        return NOTHING

    def carry_out(self, effect: Effect, now_s: float) -> Effects:
        """Do what the gate has decided."""
        match effect:
            case Begin():
                for run in self._held.pop(effect.client_id, ()):
                    self.queue.put(run)
            case Apply():
                commits = tuple((client_id, self._asked.pop(client_id)) for client_id in effect.client_ids)
                contributions = [self._contribution(client_id, commit) for client_id, commit in commits]
                self.queue.put(work.Decide(commits=commits, contributions=contributions))
                # next on the queue, so ahead of any work of a later step: both sides take their steps at once
                self.queue.put(work.ApplyStep(contributions=contributions))
            case CloseStep():
                return self._close_step(effect)
            case FinishedSteps():
                return self.gate.finished(effect.client_id, now_s)
        return NOTHING

    def done(self, done: Work, result: object, now_s: float) -> Effects:
        """Send back what was computed, or acknowledge what was decided."""
        match done, result:
            case work.Run(), ForwardDone() | BackwardDone():
                return self._answer(done, result)
            case work.Decide(), Decided():
                return [effect for each in done.commits for effect in self._acknowledge(*each, done, result)]
        return NOTHING

    def failed(self, failed: Work, error: Exception, now_s: float) -> Effects | None:
        """End the sessions of those for whom it was done, unless what they sent may follow from a merge."""
        match failed:
            case work.Run(ticket=ticket):
                member = self.members[ticket.client_id]
                if isinstance(error, OutOfBounds) and not ticket.is_void:
                    excused = self.excuses.excuse(member, _stage_of(failed), error)
                    if excused is not None:
                        member.tickets.discard(ticket)
                        return excused
                return refused(member, ticket, error)
            case work.Decide(commits=commits) if isinstance(error, Mishap):
                connections = [self.members[client_id].connection for client_id, _ in commits]
                return [CouldNot(connection=each, mishap=error) for each in connections if each is not None]
        return None

    def lost(self, member: Member, now_s: float) -> Effects:
        """Wait for no step of a member that is gone, or not for ever."""
        self._held.pop(member.client_id, None)
        return self.gate.lost(member.client_id, now_s)

    def left(self, member: Member, now_s: float) -> Effects:
        """Expect no step of it."""
        return self.gate.finished(member.client_id, now_s)

    def ticked(self, now_s: float) -> Effects:
        """Close steps that have taken too long, and forget micro-batches of steps that have ended."""
        self._held = {client_id: self._awaited(client_id, runs) for client_id, runs in self._held.items()}
        return self.gate.ticked(now_s)

    def _awaited(self, client_id: str, runs: list[work.Run]) -> list[work.Run]:
        """Return the micro-batches that the client still waits for."""
        session = self.members[client_id].session
        return [run for run in runs if session.awaits(run.ticket.request_id)]

    def _answer(self, done: work.Run, reply: ForwardDone | BackwardDone) -> Effects:
        member = self.members[done.ticket.client_id]
        if done.ticket.is_void or member.connection is None:
            return NOTHING
        member.tickets.discard(done.ticket)
        if done.is_evaluation:
            self.excuses.went_on(member.client_id, Stage.EVALUATION)
        if member.session.answered(reply):
            self.mail.send(member.connection, reply)
        return NOTHING

    def _acknowledge(self, client_id: str, commit: Commit, done: work.Decide, decided: Decided) -> Effects:
        """Tell a member that its step counts; one whose connection is gone learns it when it resumes."""
        member = self.members[client_id]
        reply = Committed(
            step=commit.step,
            commit_number=decided.commit_number,
            clip_coefficient=decided.clip_coefficient,
            durable_step=decided.durable_step,
        )
        self.members.mishaps.pop(client_id, None)
        if member.session.phase in (Phase.TRAINING, Phase.COMMITTING):
            member.session.committed(reply)
        else:  # the round closed meanwhile; it counts all the same
            member.session.applied = Applied(
                step=reply.step, commit_number=reply.commit_number, clip_coefficient=reply.clip_coefficient
            )
        self.mail.tell(member, reply)
        crash_point("commit-acknowledged")
        self.history.note("acknowledged", client_id=client_id, step=commit.step, commit_number=decided.commit_number)
        self._say_step(member, commit, decided)
        shows = ShowsWork(client_id=client_id)
        return [shows, FinishedSteps(client_id=client_id)] if member.session.has_done_its_steps else [shows]

    def _contribution(self, client_id: str, commit: Commit) -> Contribution:
        return Contribution(
            client_id=client_id,
            step=commit.step,
            num_label_tokens=commit.num_label_tokens,
            norms_P=self._norms(commit),
            scaling=self.kind.scaling(self.run, commit),
        )

    def _say_step(self, member: Member, commit: Commit, decided: Decided) -> None:
        self.metrics.emit(
            "step",
            client_id=member.client_id,
            round=member.session.round_number,
            step=commit.step,
            commit_number=decided.commit_number,
            loss=self.kind.loss_told(commit),
            num_label_tokens=commit.num_label_tokens,
            num_tokens=member.session.asked.num_tokens,
            num_positions=member.session.asked.num_positions,
            learning_rate=decided.learning_rate,
            clip_coefficient=decided.clip_coefficient,
            bytes_sent=member.received,
            bytes_received=member.sent,
            compute_seconds=self.engine.view.used.compute_seconds,
        )

    def _close_step(self, effect: CloseStep) -> Effects:
        member = self.members[effect.client_id]
        if member.session.phase not in (Phase.TRAINING, Phase.COMMITTING):
            return NOTHING
        refusal = member.session.step_closed(effect.next_step, effect.reason)
        member.drop(unwanted_only=True)
        self.queue.put(work.CloseStep(client_id=member.client_id, step=refusal.step, next_step=effect.next_step))
        self.mail.tell(member, refusal)
        if not member.sits_out:  # one that begins steps again and again fills no disk
            self.metrics.emit("step_refused", client_id=member.client_id, step=refusal.step, reason=effect.reason)
        return [FinishedSteps(client_id=member.client_id)] if member.session.has_done_its_steps else NOTHING

    def _check_claims(self, member: Member, commit: Commit) -> Effects | None:
        """Check what a client says of its gradients; return what follows where it may follow from a merge."""
        try:
            self._check_numbers(commit)
        except OutOfBounds as error:
            excused = self.excuses.excuse(member, Stage.TRAINING, error)
            if excused is None:
                raise
            return excused
        return None

    def _check_numbers(self, commit: Commit) -> None:
        """Raise for what must not reach the others' step."""
        if not math.isfinite(commit.loss):
            raise OutOfBounds("a loss that is not finite (NONFINITE_TENSOR)")
        if any(norm < 0 and norm != NO_GRADIENT for norm in self._norms(commit)):
            raise RemoteProtocolError(f"a negative norm of a gradient (only {NO_GRADIENT:g} is one, for none)")

    def _norms(self, commit: Commit) -> list[float]:
        norms: list[float] = self.tensors.unpack(Role.NORMS, commit.norms_P).tolist()
        return norms


def _run(member: Member, message: Forward | Backward) -> work.Run:
    return work.Run(ticket=member.ticket(message.request_id), message=message)


def _stage_of(run: work.Run) -> Stage:
    return Stage.EVALUATION if run.is_evaluation else Stage.TRAINING
