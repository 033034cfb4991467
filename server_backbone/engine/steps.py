"""Steps: decided and written down, then applied; or closed, and given up."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from server_backbone.compute.blocks_worker import BlocksWorker, Contribution, ReducedStep
from server_backbone.compute.copies import digest_in
from server_backbone.compute.mishaps import Mishap, done_for, done_for_all
from server_backbone.compute.queue import Doers
from server_backbone.engine import work
from server_backbone.engine.keeping import Keeping
from server_backbone.engine.work import Work
from server_backbone.records import entries as log
from server_backbone.records.ledger import Ledger
from splitfl.durability.crash import crash_point
from splitfl.telemetry.history import History


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """A step that is written down and will be applied."""

    commit_number: int
    clip_coefficient: float
    durable_step: int
    learning_rate: float


class Steps:
    """A step counts from its record on, whatever dies."""

    def __init__(self, worker: BlocksWorker, ledger: Ledger, keeping: Keeping, history: History) -> None:
        self._worker = worker
        self._ledger = ledger
        self._keeping = keeping
        self._history = history
        self._decided: ReducedStep | None = None
        """Written down, and to be applied next."""

    def doers(self) -> Doers[Work]:
        """Return who does the work of steps."""
        return {
            work.Decide: lambda asked: self.decide(asked.contributions),
            work.ApplyStep: lambda asked: self.apply(asked.contributions),
            work.CloseStep: lambda asked: self.closed(asked.client_id, asked.step, asked.next_step),
            work.GiveUpStep: lambda asked: self.given_up(asked.client_id, asked.step),
        }

    def decide(self, contributions: Sequence[Contribution]) -> Decided:
        """Reduce a step's gradients and write its record."""
        step = self._reduce(contributions)
        crash_point("commit-before-record")
        number = self._ledger.commit(contributions, step)
        self._decided = step
        crash_point("commit-after-record")
        return Decided(
            commit_number=number,
            clip_coefficient=step.clip_coefficient,
            durable_step=step.step if self._ledger.keeps_records else self._ledger.state.durable_step,
            learning_rate=step.learning_rate,
        )

    def _reduce(self, contributions: Sequence[Contribution]) -> ReducedStep:
        """Add up a step's gradients; raise `Mishap`, with none of them left, where torch could not."""
        who = ", ".join(each.client_id for each in contributions)
        what = f"the server could not add up the gradients of step {contributions[0].step} of {who}"
        try:
            return done_for(partial(self._worker.reduce, contributions), what)
        except Mishap:
            for each in contributions:
                self._worker.discard(each.client_id)
            raise

    def apply(self, contributions: Sequence[Contribution]) -> str:
        """Apply what was decided; return why no snapshot could be taken if one was due, else ""."""
        step, self._decided = self._decided, None
        if step is None:  # it could not be decided
            return ""
        number = self._ledger.state.commit_number
        done_for_all(partial(self._worker.apply, step), f"the optimizer's step of commit {number} could not be taken")
        crash_point("commit-after-apply")
        self._note_applied(contributions)
        return self._keeping.snapshot() if self._ledger.is_due else ""

    def _note_applied(self, contributions: Sequence[Contribution]) -> None:
        if not self._history.is_on:
            return
        state = self._ledger.state
        self._history.note(
            "applied",
            commit_number=state.commit_number,
            round=state.round.number if state.round else 0,
            members=[
                {"client_id": c.client_id, "step": c.step, "num_label_tokens": c.num_label_tokens}
                for c in contributions
            ],
            digest=digest_in(self._worker.state(contributions[0].client_id)),
        )

    def closed(self, client_id: str, step: int, next_step: int) -> None:
        """Free a step that went on without its client, and write that it did."""
        self._worker.discard(client_id)
        self._ledger.write(log.Closed(client_id=client_id, next_step=next_step))
        self._history.note("step_closed", client_id=client_id, step=step, next_step=next_step)

    def given_up(self, client_id: str, step: int) -> None:
        """Free a step that its client gives up."""
        self._worker.discard(client_id)
        self._history.note("step_discarded", client_id=client_id, step=step)
