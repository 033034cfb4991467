"""The client's training loop: rounds of steps, and everyone's layers in place of ours.

Where it begins is the session's affair: it may be run again after a lost connection, in the middle of a round.
"""

import logging
from dataclasses import dataclass

from client_edge.connection.endings import RoundClosed, StepClosed
from client_edge.layers.edge import Edge
from client_edge.link.link import Link
from client_edge.part.evaluations import Evaluations
from client_edge.part.own_log import OwnLog
from client_edge.part.step import train_step
from client_edge.records.journal import Journal
from client_edge.text.batches import TrainBatches
from splitfl.protocol.messages import Merged, RoundOpened, RoundsEnded

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Training:
    """This client's layers, trained around the remote backbone."""

    edge: Edge
    link: Link
    journal: Journal
    batches: TrainBatches
    evaluations: Evaluations
    own_log: OwnLog

    def run(self) -> None:
        """Train until the run's last round."""
        while not self.link.session.is_parting:
            # wait for the others, take over layers we may have missed
            round_ = self.link.session.open_round or self._next_round()
            if isinstance(round_, RoundsEnded):
                self._end(round_)
                return

            # local steps, then everyone's layers in place of ours
            merged = self._merge_of(round_)
            self.journal.loaded(self.link.unpack(merged.layers), merged.round_number, counted=merged.counted)

            # every client says what it holds now, so that anyone can see that all hold the same
            self.own_log.merged(merged, report_layers(self.edge, self.link, merged.round_number))

    def _next_round(self) -> RoundOpened | RoundsEnded:
        self.evaluations.between_rounds()
        answer = self.link.open_round(self._num_examples)
        if isinstance(answer, RoundOpened):
            if answer.layers:
                self.journal.loaded(self.link.unpack(answer.layers), answer.round_number - 1)
                report_layers(self.edge, self.link, answer.round_number - 1)
            self.own_log.round_opened(answer)
        return answer

    def _end(self, ended: RoundsEnded) -> None:
        if ended.layers:
            self.journal.loaded(self.link.unpack(ended.layers), ended.round_number)
            report_layers(self.edge, self.link, ended.round_number)
        self.own_log.rounds_ended(ended)

    def _merge_of(self, round_: RoundOpened) -> Merged:
        try:
            if not round_.num_steps or self.link.session.awaits_merge:
                return self.link.sit_out()
            self._take_steps(round_)
            num_tokens = self.journal.place.round_tokens
            return self.link.merge(self.edge.layers(), num_examples=self._num_examples, num_tokens=num_tokens)
        except RoundClosed as closed:
            log.warning("round %s closed without this client: %s", round_.round_number, closed)
            self.journal.refused()
            return closed.merged

    def _take_steps(self, round_: RoundOpened) -> None:
        end = round_.first_step + round_.num_steps
        while (number := self.link.session.next_step) < end:
            try:
                step = train_step(self.edge, self.link, self.journal, self.batches.at(number), number)
                self.own_log.stepped(step)
            except StepClosed as closed:
                # applied on neither side; the others went on, and so do we
                log.warning("step %s was given up: %s", number, closed)
                self.journal.refused()

    @property
    def _num_examples(self) -> int:
        return len(self.batches.dataset)


def report_layers(edge: Edge, link: Link, round_number: int) -> str:
    """Tell the server the digest of the layers held after a merge, and return it."""
    digest = edge.merged_digest()
    link.report("loaded", phase="round", round_number=round_number, metrics={}, digest=digest)
    return digest
