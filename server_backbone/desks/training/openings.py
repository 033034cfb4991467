"""Rounds that open: clients that are ready for one, and how each begins it."""

from dataclasses import dataclass
from typing import ClassVar

from server_backbone.deciding.gates import Gate, SitOut
from server_backbone.deciding.rounds import Open, Rounds
from server_backbone.desks.desk import NOTHING, Desk, Effect, Effects, FinishedSteps, WorkQueue
from server_backbone.desks.training.endings import Endings
from server_backbone.desks.training.layers import CommonLayers
from server_backbone.desks.training.measurements import Sayer
from server_backbone.door.mail import Mail
from server_backbone.door.members import Connection, Member, Members
from server_backbone.engine import work
from server_backbone.engine.engine import Engine
from server_backbone.engine.work import Work
from splitfl.config.trees import RunConfig
from splitfl.protocol.messages import Message, Ready, RoundOpened
from splitfl.session.server_session import Phase
from splitfl.telemetry.metrics import MetricsLog


@dataclass(kw_only=True, eq=False)
class Openings(Desk):
    """Who is counted on for the next round, as `server_backbone.deciding.rounds` decides."""

    run: RunConfig
    members: Members
    gate: Gate
    rounds: Rounds
    engine: Engine
    queue: WorkQueue
    mail: Mail
    metrics: MetricsLog
    sayer: Sayer
    common: CommonLayers
    endings: Endings

    takes: ClassVar[tuple[type[Message], ...]] = (Ready,)
    finishes: ClassVar[tuple[type[Work], ...]] = (work.Announce, work.OpenRound)
    carries: ClassVar[tuple[type[Effect], ...]] = (Open,)

    def receive(self, connection: Connection, message: Message, now_s: float) -> Effects:
        """Take a client that waits for a round."""
        return self._ready(connection.member, message) if isinstance(message, Ready) else NOTHING

    def carry_out(self, effect: Effect, now_s: float) -> Effects:
        """Have a round written down."""
        if isinstance(effect, Open):
            self.queue.put(work.OpenRound(round=effect))
        return NOTHING

    def done(self, done: Work, result: object, now_s: float) -> Effects:
        """Go on with what was written down."""
        match done, result:
            case work.Announce(), int():
                self._say_what_counts(done, result)
            case work.OpenRound(), _:
                return self._opened(done.round, now_s)
        return NOTHING

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
        self.endings.have_ended = self.rounds.is_parting
        return self.rounds.resumed([member.client_id for member in self.members if not member.is_out], now_s)

    def _ready(self, member: Member, message: Ready) -> Effects:
        is_new = message.num_examples != member.num_examples
        member.held_round, member.num_examples = message.round_number, message.num_examples
        self.queue.put(work.Announce(client_id=member.client_id, num_examples=message.num_examples, is_new=is_new))
        member.has_parted = member.sits_out = False
        member.idle_s = 0.0
        if not self.endings.have_ended:
            return self.rounds.ready(member.client_id)
        self.endings.say_again(member)  # it was evaluating still
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
            layers=self.common.missed_by(member),
        )
