"""The end of a run: merges that are judged, the last round, and what is told to those who come after it."""

from dataclasses import dataclass, field
from typing import ClassVar

from server_backbone.deciding.rounds import End, Judge, Rounds, Stop
from server_backbone.desks.desk import NOTHING, Desk, Effect, Effects, WorkQueue
from server_backbone.desks.training.layers import CommonLayers
from server_backbone.desks.training.measurements import Sayer
from server_backbone.door.mail import Mail
from server_backbone.door.members import Member, Members
from server_backbone.engine import work
from server_backbone.engine.engine import Engine
from server_backbone.engine.merges import EndedRounds, Verdict
from server_backbone.engine.work import Work
from splitfl.config.trees import RunConfig
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import RoundsEnded
from splitfl.session.server_session import Phase
from splitfl.telemetry.metrics import MetricsLog

_MAX_ENDS_TOLD = 8


@dataclass(kw_only=True, eq=False)
class Endings(Desk):
    """Whether a further round is worth its while, and what follows where none is."""

    run: RunConfig
    members: Members
    rounds: Rounds
    engine: Engine
    queue: WorkQueue
    mail: Mail
    metrics: MetricsLog
    sayer: Sayer
    common: CommonLayers

    have_ended: bool = field(default=False, init=False)
    """Whether no further round is opened, and clients know it."""
    is_over: bool = field(default=False, init=False)
    reason: str = field(default="the server stopped on an error", init=False)
    """Why the run ended before its last round, "" once it has gone through it."""

    finishes: ClassVar[tuple[type[Work], ...]] = (work.JudgeMerge, work.EndRounds)
    carries: ClassVar[tuple[type[Effect], ...]] = (Judge, Stop, End)

    def carry_out(self, effect: Effect, now_s: float) -> Effects:
        """Have a merge judged, end the rounds, or end the run."""
        match effect:
            case Judge():
                self.queue.put(work.JudgeMerge(round_number=effect.round_number))
            case Stop():
                self.queue.put(work.EndRounds(reason=effect.reason))
            case End():
                self.sayer.say()
                self.reason, self.is_over = effect.reason, True
        return NOTHING

    def done(self, done: Work, result: object, now_s: float) -> Effects:
        """Say what was judged, or that there is no further round."""
        match result:
            case Verdict():
                return self._judged(result, now_s)
            case EndedRounds():
                return self._rounds_ended(result, now_s)
        return NOTHING

    def recover(self) -> None:
        """Say why the rounds have ended, where they have: the server may have ended between the record and this."""
        if self.engine.view.state.has_ended:
            self._say_why()

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
        self._say_why()
        if state.held_round != self.common.held_round:
            self.common.become(state.held_round, ended.layers)
        for member in self.members:
            if member.session.phase is Phase.READY:
                self.say(member)
        return self.rounds.stopped(now_s)

    def _say_why(self) -> None:
        state = self.engine.view.state
        self.metrics.emit("rounds_ended", reason=state.end_reason, round=state.num_merged, best_round=state.ends_with)

    def say_again(self, member: Member) -> None:
        """Tell a client that was evaluating when the others heard of it; raise for one that asks without end."""
        member.num_ends_told += 1
        if member.num_ends_told > _MAX_ENDS_TOLD:
            raise RemoteProtocolError("Ready again and again, where no round is left")
        self.say(member)

    def say(self, member: Member) -> None:
        """Tell a client that waits for the next round that there is none."""
        state = self.engine.view.state
        layers = self.common.missed_by(member)
        member.session.rounds_ended()
        member.held_round = self.common.held_round
        message = RoundsEnded(
            round_number=self.common.held_round, best_round=state.ends_with, reason=state.end_reason, layers=layers
        )
        self.mail.tell(member, message)
