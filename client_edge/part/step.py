"""One training step of a client: micro-batches through both sides, then the commit, which both apply or neither.

Every micro-batch goes forward here (bottom), there (backbone), here (top and loss), and back the same way, with up to
`link.max_in_flight` of them under way at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from client_edge.layers.edge import Edge, MicroBatch
from client_edge.link.link import Activations, Gradient, Link
from client_edge.records.journal import Journal
from client_edge.text.batches import Batch


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
