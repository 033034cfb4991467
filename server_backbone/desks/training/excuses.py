"""Whose fault it is when a client cannot go on from a merge: it waits for what the others show."""

from dataclasses import dataclass, field
from typing import ClassVar

from server_backbone.deciding.blame import Blame, Fault, Stage
from server_backbone.deciding.rounds import End
from server_backbone.desks.desk import NOTHING, Desk, Effect, Effects, FinishedSteps, GivesUp, Strike, WorkQueue
from server_backbone.door.members import Member, Members
from server_backbone.engine import work
from server_backbone.engine.engine import Engine
from server_backbone.engine.work import Work
from splitfl.protocol.tensors import OutOfBounds
from splitfl.telemetry.metrics import MetricsLog


@dataclass(kw_only=True, eq=False)
class Excuses(Desk):
    """Clients that sent what may follow from the last merge (`server_backbone.deciding.blame`)."""

    members: Members
    engine: Engine
    queue: WorkQueue
    metrics: MetricsLog
    blame: Blame = field(default_factory=Blame)

    _stuck: dict[str, tuple[Stage, OutOfBounds]] = field(default_factory=dict, init=False)

    finishes: ClassVar[tuple[type[Work], ...]] = (work.FindSnapshotBefore,)

    def excuse(self, member: Member, stage: Stage, error: OutOfBounds) -> Effects | None:
        """Return what follows if a client's message may follow from a merge, None if it is its own fault.

        It sits the round out meanwhile, so that nobody waits for it.
        """
        client_id = member.client_id
        if not self._may_follow_from_a_merge(client_id):
            return None
        self.blame.stuck(client_id, stage)
        if self.blame.fault(client_id, stage, self._at_work()) is Fault.ITS_OWN:
            return None
        if client_id not in self._stuck:
            merge = self.engine.view.state.folded_round
            self.metrics.emit("stuck", client_id=client_id, round=merge, reason=str(error))
        self._stuck[client_id] = stage, error
        settled = self.settle()
        if client_id not in self._stuck or stage is not Stage.TRAINING:
            return settled
        self.queue.put(work.Discard(client_id=client_id))
        return [*settled, FinishedSteps(client_id=client_id), GivesUp(client_id=client_id)]

    def went_on(self, client_id: str, stage: Stage) -> None:
        """Take note that a client's work with these layers was sound."""
        self.blame.went_on(client_id, stage)
        self.forget(client_id)

    def forget(self, client_id: str) -> None:
        """Wait for nothing about a client."""
        self._stuck.pop(client_id, None)

    def settle(self) -> Effects:
        """Punish the clients that wait for it where the others have gone on, or end the run where most cannot."""
        effects: list[Effect] = []
        for client_id, (stage, error) in list(self._stuck.items()):
            fault, connection = self.blame.fault(client_id, stage, self._at_work()), self.members[client_id].connection
            if fault is Fault.THE_MERGES:
                self._stuck.clear()
                self.queue.put(work.FindSnapshotBefore(error=str(error)))
                break
            if fault is Fault.ITS_OWN:
                del self._stuck[client_id]
                if connection is not None:
                    effects.append(Strike(connection=connection, rule=str(error)))
        return effects

    def ticked(self, now_s: float) -> Effects:
        """See whether the others have shown whose fault it is."""
        return self.settle()

    def lost(self, member: Member, now_s: float) -> Effects:
        """Wait for nothing about a client that is gone."""
        self.forget(member.client_id)
        return NOTHING

    def done(self, done: Work, result: object, now_s: float) -> Effects:
        """Give up a run whose layers nobody can use; who moved them how far is in the sentence."""
        if not isinstance(done, work.FindSnapshotBefore):
            return NOTHING
        state = self.engine.view.state
        stuck = [client_id for client_id in self._at_work() if self.blame.is_stuck(client_id)]
        farthest = sorted(state.folded.items(), key=lambda each: (-each[1], each[0]))
        moves = ", ".join(f"{client_id} {share:.0%}" for client_id, share in farthest)
        back = (
            f"`splitfl rollback RUN_DIR --to {result}` takes the run back to before that merge"
            if result is not None
            else "no snapshot from before that merge is kept (storage.keep_snapshots)"
        )
        reason = (
            f"the layers of merge {state.folded_round} are of no use: {', '.join(stuck)} got {done.error} from them."
            f" In it were, with how far each had moved its layers of what strategy.max_update allows: {moves}. Keep out"
            f" whom you do not trust (`splitfl revoke`); {back}"
        )
        return [End(reason=reason)]

    def _may_follow_from_a_merge(self, client_id: str) -> bool:
        """Tell whether a client still has a merge's layers, or others are stuck with the layers that it began with."""
        state = self.engine.view.state
        round_ = state.round_of(client_id)
        has_learned = round_ is not None and bool(round_.finished.get(client_id))
        return state.folded_round > 0 and (not has_learned or bool(self._stuck.keys() - {client_id}))

    def _at_work(self) -> list[str]:
        """Name the clients that train from everyone's layers, or are about to."""
        round_ = self.engine.view.state.round
        if round_ is None:
            return [member.client_id for member in self.members if not member.is_out]
        return [
            client_id for client_id in round_.trainers if client_id not in round_.out or client_id in round_.uploaded
        ]
