"""The client's training loop: rounds, steps, and the two directions of a micro-batch.

One step: every micro-batch goes forward here (bottom), there (backbone), here (top and loss), and back the same way,
with up to `link.max_in_flight` of them under way at once; then the commit, which both sides apply or neither.

Where it begins is the session's affair: `train` may be called again after a lost connection, in the middle of a round.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from client_edge.connection.endings import RoundClosed, StepClosed
from client_edge.layers.edge import Edge, MicroBatch
from client_edge.link.link import Activations, Gradient, Link
from client_edge.part.journal import Journal
from client_edge.text.batches import Batch, TrainBatches
from splitfl.protocol.messages import Merged, RoundOpened, RoundsEnded

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a committed step was."""

    step: int
    loss: float
    """Mean over the step's label tokens."""
    num_label_tokens: int
    num_tokens: int
    num_positions: int
    """Tokens and padding."""

    @classmethod
    def of(cls, step: int, loss: float, batches: Sequence[Batch]) -> "Step":
        """Count what the step's micro-batches hold."""
        return cls(
            step=step,
            loss=loss,
            num_label_tokens=sum(batch.num_label_tokens for batch in batches),
            num_tokens=sum(batch.num_tokens for batch in batches),
            num_positions=sum(batch.num_positions for batch in batches),
        )


class Observer(Protocol):
    """Is told how the training goes."""

    def between_rounds(self) -> None:
        """No round is open."""

    def round_opened(self, round_: RoundOpened) -> None:
        """A round has begun."""

    def rounds_ended(self, ended: RoundsEnded) -> None:
        """There is no further round; the layers to end with are loaded."""

    def stepped(self, step: Step) -> None:
        """A step is committed."""

    def merged(self, merged: Merged, digest: str) -> None:
        """Everyone's layers are loaded; `digest` is over them."""


def train(
    edge: Edge, link: Link, journal: Journal, batches: TrainBatches, *, num_examples: int, observer: Observer
) -> None:
    """Train this client's layers around the remote backbone until the run's last round."""
    while not link.session.is_parting:
        # wait for the others, take over layers we may have missed
        round_ = link.session.open_round
        if round_ is None:
            observer.between_rounds()
            answer = link.open_round(num_examples)
            if isinstance(answer, RoundsEnded):
                _end_rounds(edge, link, journal, answer, observer)
                return
            round_ = answer
            if round_.layers:
                journal.loaded(link.realise(round_.layers), round_.round_number - 1)
                report_layers(edge, link, round_.round_number - 1)
            observer.round_opened(round_)

        # local steps, then everyone's layers in place of ours
        try:
            merged = _train_round(edge, link, journal, batches, round_, num_examples, observer)
        except RoundClosed as closed:
            log.warning("round %s closed without this client: %s", round_.round_number, closed)
            journal.refused()
            merged = closed.merged
        journal.loaded(link.realise(merged.layers), merged.round_number, counted=merged.counted)

        # every client says what it holds now, so that anyone can see that all hold the same
        observer.merged(merged, report_layers(edge, link, merged.round_number))


def report_layers(edge: Edge, link: Link, round_number: int) -> str:
    """Tell the server the digest of the layers held after a merge, and return it."""
    digest = edge.merged_digest()
    link.report("loaded", phase="round", round_number=round_number, metrics={}, digest=digest)
    return digest


def _end_rounds(edge: Edge, link: Link, journal: Journal, ended: RoundsEnded, observer: Observer) -> None:
    if ended.layers:
        journal.loaded(link.realise(ended.layers), ended.round_number)
        report_layers(edge, link, ended.round_number)
    observer.rounds_ended(ended)


def _train_round(
    edge: Edge,
    link: Link,
    journal: Journal,
    batches: TrainBatches,
    round_: RoundOpened,
    num_examples: int,
    observer: Observer,
) -> Merged:
    if not round_.num_steps or link.session.awaits_merge:
        return link.sit_out()
    end = round_.first_step + round_.num_steps
    while (step := link.session.next_step) < end:
        try:
            observer.stepped(train_step(edge, link, journal, batches.at(step), step))
        except StepClosed as closed:
            # applied on neither side; the others went on, and so do we
            log.warning("step %s was given up: %s", step, closed)
            journal.refused()
    return link.merge(edge.layers(), num_examples=num_examples, num_tokens=journal.place.round_tokens)


def train_step(edge: Edge, link: Link, journal: Journal, batches: Sequence[Batch], step: int) -> Step:
    """Run one step's micro-batches through both sides and commit it."""
    num_label_tokens = sum(batch.num_label_tokens for batch in batches)
    under_way: dict[int, MicroBatch] = {}
    to_send = list(enumerate(batches))
    loss = 0.0
    while to_send or under_way:
        # forward here, as far ahead as the server lets us
        while to_send and link.session.has_credit:
            link.connection.stop.check()  # nothing is half done between two micro-batches
            number, batch = to_send.pop(0)
            micro_batch = edge.bottom_forward(batch, step=step, number=number)
            request_id = link.send_forward(micro_batch.hidden_BSD.detach(), batch.layout, step=step, micro_batch=number)
            under_way[request_id] = micro_batch

        # the top's share of the last step, while the server computes
        edge.catch_up()

        # whatever comes back next: activations to take the loss of, or a gradient to finish with
        match link.receive():
            case Activations(request_id=request_id, hidden_BSD=hidden_BSD):
                share, gradient_BSD = edge.top_loss_and_backward(
                    under_way[request_id], hidden_BSD, step=step, num_label_tokens=num_label_tokens
                )
                loss += share
                if link.session.terms.needs_backward:
                    link.send_backward(request_id, gradient_BSD)
                else:
                    edge.bottom_backward(under_way.pop(request_id), None)
            case Gradient(request_id=request_id, gradient_BSD=back_BSD):
                edge.bottom_backward(under_way.pop(request_id), back_BSD)

    # all that is done to gradients before their norms are taken
    edge.finish_gradients(step)

    # commit: written down here, then both sides step, or neither
    journal.asking(step=step, num_label_tokens=num_label_tokens, loss=loss)
    committed = link.commit(num_label_tokens=num_label_tokens, loss=loss, norms_P=edge.optimizer.norms())
    journal.acknowledged(commit_number=committed.commit_number, clip_coefficient=committed.clip_coefficient)
    return Step.of(step, loss, batches)
