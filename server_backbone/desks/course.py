"""The run's course: rounds that open, are merged and judged, and end; and everyone's layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from server_backbone.compute.mishaps import Mishap
from server_backbone.deciding.blame import Stage
from server_backbone.deciding.gates import CloseStep, Gate, SitOut
from server_backbone.deciding.rounds import End, Judge, LastCall, Merge, Open, Release, Rounds, Stop
from server_backbone.desks.desk import (
    NOTHING,
    Desk,
    Effect,
    Effects,
    FinishedSteps,
    GivesUp,
    ShowsWork,
    WorkQueue,
    refused,
)
from server_backbone.desks.excuses import Excuses
from server_backbone.desks.measurements import Sayer
from server_backbone.desks.snapshots import Snapshots
from server_backbone.door.mail import Mail
from server_backbone.door.members import Connection, Member, Members
from server_backbone.engine import work
from server_backbone.engine.engine import EndedRounds, Engine, MergedLayers, Spooled, Verdict
from server_backbone.engine.work import Work
from server_backbone.kinds import ServerParts
from splitfl.config.trees import RunConfig
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Merged, Message, Ready, RoundOpened, RoundsEnded, TensorFrames, Upload
from splitfl.session.server_session import Phase
from splitfl.telemetry.metrics import MetricsLog

_MAX_ENDS_TOLD = 8


@dataclass(kw_only=True, eq=False)
class Course(Desk):
    """Rounds, as `server_backbone.deciding.rounds` decides about them."""

    run: RunConfig
    kind: ServerParts
    members: Members
    gate: Gate
    rounds: Rounds
    excuses: Excuses
    engine: Engine
    queue: WorkQueue
    mail: Mail
    metrics: MetricsLog
    sayer: Sayer
    snapshots: Snapshots
    num_tensors: int
    """In everyone's layers."""

    held_round: int = field(default=0, init=False)
    """What clients hold: the number of the last merge, or the one above it once the run ends with an earlier one's."""
    layers: tuple[TensorFrames, ...] = field(default=(), init=False)
    """Everyone's layers; none before the first merge, since all begin with the same."""
    have_ended: bool = field(default=False, init=False)
    """Whether no further round is opened, and clients know it."""
    is_over: bool = field(default=False, init=False)
    reason: str = field(default="the server stopped on an error", init=False)
    """Why the run ended before its last round, "" once it has gone through it."""

    takes: ClassVar[tuple[type[Message], ...]] = (Ready, Upload)
    finishes: ClassVar[tuple[type[Work], ...]] = (
        work.Announce,
        work.OpenRound,
        work.FindFinished,
        work.Spool,
        work.MakeMerge,
        work.JudgeMerge,
        work.EndRounds,
    )
    carries: ClassVar[tuple[type[Effect], ...]] = (Open, LastCall, Merge, Release, Judge, Stop, End, GivesUp)

    def __post_init__(self) -> None:
        self.layers = self._layers_after(0)

    def counted_round(self, client_id: str) -> int:
        """Return the last merge that a client's layers are in."""
        known = self.engine.view.state.members.get(client_id)
        return known.counted_round if known is not None else 0

    def receive(self, connection: Connection, message: Message, now_s: float) -> Effects:
        """Take a client that waits for a round, or its layers."""
        member = connection.member
        match message:
            case Ready():
                return self._ready(member, message)
            case Upload():
                self.queue.put(work.Spool(ticket=member.ticket(), upload=message))
                return [ShowsWork(client_id=member.client_id)]
        return NOTHING

    def carry_out(self, effect: Effect, now_s: float) -> Effects:
        """Do what was decided about the rounds."""
        match effect:
            case Open():
                self.queue.put(work.OpenRound(round=effect))
            case LastCall():
                self.gate.round_closed()  # decided steps are acknowledged before anybody is called
                self.queue.put(work.FindFinished(call=effect))
            case Merge():
                if effect.closes:
                    self.gate.round_closed()
                self.queue.put(work.MakeMerge(merge=effect))
            case Release():
                self._release(effect.client_id, "")
            case Judge():
                self.queue.put(work.JudgeMerge(round_number=effect.round_number))
            case Stop():
                self.queue.put(work.EndRounds(reason=effect.reason))
            case End():
                self.sayer.say()
                self.reason, self.is_over = effect.reason, True
            case GivesUp():
                return self.rounds.gave_up(effect.client_id)
        return NOTHING

    def done(self, done: Work, result: object, now_s: float) -> Effects:
        """Go on with what was written down."""
        match done, result:
            case work.Announce(), int():
                self._say_what_counts(done, result)
            case work.OpenRound(), _:
                return self._opened(done.round, now_s)
            case work.FindFinished(), set():
                return self._call_for_layers(done.call, result)
            case work.Spool(), Spooled():
                return self._spooled(done, result)
            case work.MakeMerge(), MergedLayers():
                return self._merged(done.merge, result, now_s)
            case work.JudgeMerge(), Verdict():
                return self._judged(result, now_s)
            case work.EndRounds(), EndedRounds():
                return self._rounds_ended(result, now_s)
        return NOTHING

    def failed(self, failed: Work, error: Exception, now_s: float) -> Effects | None:
        """Take an upload back that could not be taken: the client may send another."""
        if not isinstance(failed, work.Spool):
            return None
        member = self.members[failed.ticket.client_id]
        if isinstance(error, RemoteProtocolError | Mishap) and member.session.phase is Phase.MERGING:
            member.session.phase = Phase.TRAINING
        return refused(member, failed.ticket, error)

    def lost(self, member: Member, now_s: float) -> Effects:
        """Do not count on a client that is gone."""
        self.rounds.lost(member.client_id)
        return NOTHING

    def left(self, member: Member, now_s: float) -> Effects:
        """Go on without it."""
        return self.rounds.left(member.client_id)

    def ticked(self, now_s: float) -> Effects:
        """Look at the rounds' deadlines."""
        return self.rounds.ticked(now_s)

    # what was before

    def recover(self, now_s: float) -> Effects:
        """Go on where the log ends; every member has been restored."""
        state = self.engine.view.state
        self.rounds.restore(
            state.round.opened() if state.round is not None else None,
            state.uploaded,
            state.round.out if state.round is not None else (),
            num_merged=state.num_merged,
            next_steps={client_id: state.next_step_of(client_id) for client_id in state.members},
            has_stopped=state.has_ended,
        )
        self.have_ended = self.rounds.is_parting
        return self.rounds.resumed([member.client_id for member in self.members if not member.is_out], now_s)

    def hold(self) -> None:
        """Hold the layers of the last merge, or of that with which the run has ended."""
        state = self.engine.view.state
        self.held_round = state.held_round
        if state.has_ended:
            self._say_why_rounds_ended()  # it may have ended between the record and this
        self.layers = self._layers_after(state.num_merged)

    def _layers_after(self, num_merged: int) -> tuple[TensorFrames, ...]:
        """Describe everyone's layers; the first ones only where a client comes back to them, since all begin so."""
        return self.engine.describe_layers() if self.kind.holds_layers(num_merged) else ()

    # rounds that open

    def _ready(self, member: Member, message: Ready) -> Effects:
        is_new = message.num_examples != member.num_examples
        member.held_round, member.num_examples = message.round_number, message.num_examples
        self.queue.put(work.Announce(client_id=member.client_id, num_examples=message.num_examples, is_new=is_new))
        member.has_parted = member.sits_out = False
        member.idle_s = 0.0
        if not self.have_ended:
            return self.rounds.ready(member.client_id)
        self._say_ended_again(member)  # it was evaluating still
        return NOTHING

    def _say_what_counts(self, done: work.Announce, counted: int) -> None:
        """Have a client weigh by what it announced first; its text may change honestly, so a change is only said."""
        if done.is_new and counted != done.num_examples:
            text = (
                f"{done.client_id} says that it has {done.num_examples} examples; in a merge it weighs by the {counted}"
                " that it announced when it joined this run"
            )
            self.metrics.emit("note", text=text)

    def _opened(self, round_: Open, now_s: float) -> Effects:
        """Tell everybody of a round that is written down."""
        self.gate.round_opened(round_.trainers, round_.first_step)
        self.sayer.say()
        self.metrics.emit(
            "round_opened",
            round=round_.round_number,
            trainers=round_.trainers,
            first_step=round_.first_step,
            num_steps=self.run.federation.local_steps,
        )
        effects: list[Effect] = []
        for client_id in round_.clients:
            member = self.members[client_id]
            opened = self.opening(round_, client_id)
            member.session.phase = Phase.READY  # one whose connection was lost meanwhile is in the round as well
            member.session.opened(opened)
            member.idle_s, member.num_sat_out = 0.0, 0
            self.mail.tell(member, opened)
            if member.is_out:
                effects.append(FinishedSteps(client_id=client_id))
        self.rounds.opened(now_s)
        reason = "has missed too many steps before"
        sitting = [client_id for client_id in round_.trainers if self.gate.sits_out(client_id)]
        return [*effects, *(SitOut(client_id=client_id, reason=reason) for client_id in sitting)]

    def opening(self, round_: Open, client_id: str) -> RoundOpened:
        """Return how a round opens for a client."""
        member = self.members[client_id]
        return RoundOpened(
            round_number=round_.round_number,
            first_step=round_.first_step,
            num_steps=self.run.federation.local_steps if client_id in round_.trainers else 0,
            layers=() if member.held_round == self.held_round else self.layers,
        )

    # rounds that close

    def _call_for_layers(self, call: LastCall, able: set[str]) -> Effects:
        """End the round's steps for those still at work; who has finished none has nothing to upload."""
        self.metrics.emit("last_call", round=call.round_number, clients=sorted(able.intersection(call.clients)))
        reason = f"the round closes after {self.run.federation.round_timeout:g} s (federation.round_timeout)"
        effects: list[Effect] = []
        for client_id in call.clients:
            session = self.members[client_id].session
            if client_id not in able:
                effects.append(GivesUp(client_id=client_id))
            elif not session.has_done_its_steps:
                effects.append(CloseStep(client_id=client_id, next_step=session.last_step + 1, reason=reason))
        return effects

    def _spooled(self, done: work.Spool, spooled: Spooled) -> Effects:
        client_id = done.ticket.client_id
        self.members[client_id].tickets.discard(done.ticket)
        if spooled.objection:
            self.metrics.emit("upload_dropped", client_id=client_id, reason=spooled.objection)
            self._release(client_id, spooled.objection)
            return NOTHING
        self.excuses.went_on(client_id, Stage.TRAINING)
        settled = self.excuses.settle()  # before the round closes
        return [*settled, *self.rounds.uploaded(client_id, spooled.name)]

    def _merged(self, merge: Merge, merged: MergedLayers, now_s: float) -> Effects:
        self.layers, self.held_round = merged.layers, merge.round_number
        if not merged.reason:
            self.excuses.blame.merged()
        message = Merged(
            round_number=merge.round_number,
            accepted=not merged.reason,
            reason=merged.reason,
            is_last=self.rounds.is_last,
            counted=False,
            layers=self.layers,
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
            num_tensors=self.num_tensors,
            digest=merged.digest,
            **({} if merged.uploads is None else {"uploads": merged.uploads}),
        )
        self.snapshots.say_failed(merged.note)
        if merge.closes:
            self._close_round(message, merged.weights)
        return self.rounds.merged(now_s, merged.reason)

    def _close_round(self, message: Merged, weights: Mapping[str, float]) -> None:
        """Tell everybody of the merge that ends their round."""
        self.have_ended = message.is_last
        for member in self.members:
            if member.session.phase in (Phase.TRAINING, Phase.COMMITTING, Phase.MERGING):
                self._end_round(member, replace(message, counted=member.client_id in weights))
            elif message.is_last and member.session.phase is Phase.READY:
                self._say_ended(member)  # it came for a round that there will not be

    def _end_round(self, member: Member, message: Merged) -> None:
        member.session.merged(message)
        member.idle_s, member.num_mishaps = 0.0, 0
        member.drop(unwanted_only=True)
        self.excuses.forget(member.client_id)
        self.queue.put(work.Discard(client_id=member.client_id))
        self.mail.tell(member, message)

    def _release(self, client_id: str, objection: str) -> None:
        """Give a client that has uploaded the newest layers; it goes on with a round of its own."""
        member = self.members[client_id]
        if member.session.phase is not Phase.MERGING:
            return  # the last merge came first
        message = Merged(
            round_number=self.held_round,
            accepted=not objection,
            reason=objection,
            is_last=False,
            counted=False,
            layers=self.layers,
        )
        self._end_round(member, message)

    # rounds that are judged, and the last one

    def _judged(self, verdict: Verdict, now_s: float) -> Effects:
        """Say what the verdict on the last merge is, and go on as it asks."""
        standing = verdict.standing
        self.sayer.say()
        self.metrics.emit(
            "judged",
            round=standing.judged_round,
            metric=self.run.federation.metric_for_best_model,
            value=standing.value,
            best_round=standing.best_round,
            best_value=standing.best_value if standing.best_round else None,
            rounds_without_improvement=standing.rounds_without_improvement,
        )
        return self.rounds.judged(verdict.reason, now_s)

    def _rounds_ended(self, ended: EndedRounds, now_s: float) -> Effects:
        """Tell everybody who waits for the next round that there is none."""
        state = self.engine.view.state
        self.have_ended = True
        if ended.note:
            self.metrics.emit("note", text=ended.note)
        self._say_why_rounds_ended()
        if state.held_round != self.held_round:
            self.held_round, self.layers = state.held_round, ended.layers
        for member in self.members:
            if member.session.phase is Phase.READY:
                self._say_ended(member)
        return self.rounds.stopped(now_s)

    def _say_why_rounds_ended(self) -> None:
        state = self.engine.view.state
        self.metrics.emit("rounds_ended", reason=state.end_reason, round=state.num_merged, best_round=state.ends_with)

    def _say_ended_again(self, member: Member) -> None:
        member.num_ends_told += 1
        if member.num_ends_told > _MAX_ENDS_TOLD:
            raise RemoteProtocolError("Ready again and again, where no round is left")
        self._say_ended(member)

    def _say_ended(self, member: Member) -> None:
        state = self.engine.view.state
        layers = () if member.held_round == self.held_round else self.layers
        member.session.rounds_ended()
        member.held_round = self.held_round
        message = RoundsEnded(
            round_number=self.held_round, best_round=state.ends_with, reason=state.end_reason, layers=layers
        )
        self.mail.tell(member, message)
