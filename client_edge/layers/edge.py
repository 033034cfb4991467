"""The client's part of the model: bottom, top, their optimizer, and what a micro-batch needs between its four visits.

Shapes: B micro-batch, S sequence, D hidden width, P tensors that train on the client.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from client_edge.layers.controls import Controls
from client_edge.layers.gradient_rules import GradientRule, Proximal
from client_edge.layers.tied import Tied, put, take, tied_gradients
from client_edge.text.batches import Batch
from splitfl.config.trees import RunConfig
from splitfl.models.cut import Cut
from splitfl.models.packing import check_packing
from splitfl.models.stand_in import RemoteBlocks
from splitfl.protocol.tensors import digest_of
from splitfl.training.optimizer import PartOptimizer
from splitfl.training.seeds import seed_dropout
from splitfl.training.stopwatch import Stopwatch
from splitfl.training.terms import merged_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One micro-batch under way: forward here, there, here, and the same way back."""

    batch: Batch
    number: int
    """Its place in the step, from 0."""
    hidden_BSD: Tensor
    """The bottom's activations, with their graph if anything below the cut trains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """How well the label tokens of one batch of an evaluation are predicted."""

    loss: float
    """Sum over the label tokens."""
    num_correct: int
    """Label tokens whose logit is the largest."""
    losses_B: tuple[float, ...]
    """Sum over each row's label tokens: minus the log-likelihood of the row's labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _PutOff:
    """A step that the bottom has taken and the top has not."""

    step: int
    clip_coefficient: float
    learning_rate: float
    gradients: list[Tensor | None]
    """Of what only the top has."""


class Edge:
    """Bottom and top of one client."""

    def __init__(self, cut: Cut, run: RunConfig, client_id: str, device: torch.device) -> None:
        """Take a cut whose client side is filled; raise `ModelError` if it cannot train on rows as the run has them."""
        self._run = run
        self._client_id = client_id
        self._device = device
        self._cut = cut
        self._bottom = cut.bottom()
        self._top = cut.top()
        if run.text.packing:
            for segment in (self._bottom, self._top):
                check_packing(segment.base, max_seq_length=run.text.max_seq_length)
        self.takes_plain_loss = run.train.loss == "plain" or not self._top.chunk_the_loss()
        self._trainable = cut.trainable("client")
        self._merged = merged_layers(run, cut)
        self._tied = tied_gradients(self._bottom, self._top, device, takes_plain_loss=self.takes_plain_loss)
        self._rules = tuple(rules_of(run, self._merged, self._tied))
        in_bottom = set(self._bottom.parameters())
        self._only_top = [p for p in self._trainable.values() if p not in in_bottom]
        self._put_off: _PutOff | None = None
        self.optimizer = PartOptimizer(self._trainable, run.optimizer, run.num_training_steps)
        self.compute = Stopwatch()

    def bottom_forward(self, batch: Batch, *, step: int, number: int) -> MicroBatch:
        """Embed a micro-batch and run the first blocks."""
        self._bottom.train()
        self._seed("bottom", step, number)
        with self.compute.running(), torch.set_grad_enabled(self._run.bottom_trains):
            hidden_BSD = self._run_bottom(batch)
        return MicroBatch(batch=batch, number=number, hidden_BSD=hidden_BSD)

    def top_loss_and_backward(
        self, micro_batch: MicroBatch, hidden_BSD: Tensor, *, step: int, num_label_tokens: int
    ) -> tuple[float, Tensor]:
        """Run the last blocks and the loss, and backward through them.

        Returns the micro-batch's share of the step's mean loss over `num_label_tokens`, and the gradient with respect
        to `hidden_BSD`.
        """
        self._finish_step()
        batch = micro_batch.batch
        self._top.train()
        self._seed("top", step, micro_batch.number)
        with self.compute.running(), self._tied.at_the_top(micro_batch.number):
            given_BSD = hidden_BSD.to(self._device).requires_grad_()
            loss = self._loss(batch, given_BSD, num_label_tokens)
            loss.backward()
        if given_BSD.grad is None:
            raise RuntimeError("the loss does not depend on the activations")
        return loss.item(), given_BSD.grad

    def bottom_backward(self, micro_batch: MicroBatch, gradient_BSD: Tensor | None) -> None:
        """Run backward through the first blocks, if anything there trains, and add tied gradients together."""
        with self.compute.running(), self._tied.at_the_bottom(micro_batch.number):
            if gradient_BSD is not None:
                micro_batch.hidden_BSD.backward(gradient_BSD.to(self._device))

    def finish_gradients(self, step: int) -> None:
        """Complete the gradients of a step all of whose micro-batches have gone their way, rule after rule."""
        self._finish_step()
        for rule in self._rules:
            rule.change(step)

    def evaluate_bottom(self, batch: Batch) -> Tensor:
        """Run the first blocks without dropout or graph."""
        self._bottom.eval()
        with self.compute.running(), torch.inference_mode():
            return self._run_bottom(batch)

    def evaluate_top(self, batch: Batch, hidden_BSD: Tensor) -> Scored:
        """Return how well the batch's label tokens are predicted."""
        self._finish_step()
        self._top.eval()
        with self.compute.running(), torch.inference_mode():
            labels_BS = batch.labels_BS.to(self._device)
            scores = self._top.scores(hidden_BSD.to(self._device), self._where(batch)[0], labels_BS)
            losses_B = torch.zeros(len(labels_BS), dtype=torch.float64)
            losses_B.index_add_(0, scores.rows_N.cpu(), scores.losses_N.cpu().double())
            return Scored(
                loss=float(scores.loss), num_correct=int(scores.hits_N.sum()), losses_B=tuple(losses_B.tolist())
            )

    def model(self, remote: RemoteBlocks) -> PreTrainedModel:
        """Return the whole model, with `remote` in its middle; it runs with all steps applied."""
        model = self._cut.client_model(remote)
        model.register_forward_pre_hook(lambda *_: self._finish_step())
        return model

    def step(self, step: int, clip_coefficient: float, learning_rate: float | None = None) -> None:
        """Apply the gradients of a step that the server has acknowledged, with this learning rate or the schedule's.

        The server waits for the next activations, which only the bottom makes. So the top's are put off, until
        `catch_up` or until something here needs the top's weights.
        """
        self._finish_step()
        rate = self.optimizer.learning_rate(step) if learning_rate is None else learning_rate
        for rule in self._rules:
            rule.stepped(rate * clip_coefficient)
        with self.compute.running():
            later = take(self._only_top)
            self.optimizer.step(step, clip_coefficient, rate)  # what has no gradient is left as it is
        self._put_off = _PutOff(step=step, clip_coefficient=clip_coefficient, learning_rate=rate, gradients=later)

    def catch_up(self) -> None:
        """Apply what a step has put off: for a moment in which this side only waits."""
        self._finish_step()

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the step that is done, by their tensors' names; they are the live ones."""
        return {name: p.grad for name, p in self._trainable.items() if p.grad is not None}

    def set_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Put a record's gradients where the step will find them."""
        self._finish_step()
        for name, parameter in self._trainable.items():
            gradient = gradients.get(name)
            parameter.grad = None if gradient is None else gradient.to(self._device)

    def discard(self) -> None:
        """Forget the gradients of a step that is applied nowhere; acknowledged steps are finished first."""
        self.optimizer.discard()
        for rule in self._rules:
            rule.discard()
        self._finish_step()

    def state(self) -> dict[str, Tensor]:
        """Return weights and optimizer state by name, to be written down before anything else happens here."""
        self._finish_step()
        state = self.optimizer.state()
        for rule in self._rules:
            state |= rule.state()
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state` has returned."""
        self._put_off = None
        self.optimizer.load_state(state)
        for rule in self._rules:
            rule.restore(state)

    def begin_again(self, first_layers: Mapping[str, Tensor]) -> None:
        """Go back to before the first step: to these layers, with nothing that was learned or gathered since."""
        self._put_off = None
        self.optimizer.load_state(first_layers)
        for rule in self._rules:
            rule.discard()
            rule.forget()

    def digest(self) -> str:
        """Return the SHA-256 (hex) over what trains here, in the model's order."""
        self._finish_step()
        return digest_of(self._trainable.values())

    def merged_digest(self) -> str:
        """Return the SHA-256 (hex) over what is merged: equal on all clients after a merge."""
        self._finish_step()
        return digest_of(self._merged.values())

    def layers(self) -> dict[str, Tensor]:
        """Return a copy of what is merged, by its name in the whole model, in its order."""
        self._finish_step()
        return {name: p.detach().to("cpu", copy=True) for name, p in self._merged.items()}

    def load(self, layers: Sequence[Tensor], *, counted: bool = False) -> None:
        """Write merged layers over those here; after them come tensors for the rules, where the strategy has any.

        `counted` says whether the merge has taken what is here.
        """
        self._finish_step()
        for rule in self._rules:
            rule.round_ends(counted=counted)
        with torch.no_grad():
            for parameter, layer in zip(self._merged.values(), layers[: len(self._merged)], strict=True):
                parameter.copy_(layer)
        for rule in self._rules:
            rule.round_begins(layers[len(self._merged) :])
        if self._run.federation.optimizer_state == "reset":
            self.optimizer.reset_state()

    def _finish_step(self) -> None:
        """Apply to the top what `step` has put off, if it has; whatever uses the top's weights calls this first."""
        put_off, self._put_off = self._put_off, None
        if put_off is None:
            return
        with self.compute.running():
            put(self._only_top, put_off.gradients)  # the bottom has none yet: its backward comes after the top's
            self.optimizer.step(put_off.step, put_off.clip_coefficient, put_off.learning_rate)

    def _run_bottom(self, batch: Batch) -> Tensor:
        mask_BS, position_ids_BS = self._where(batch)
        hidden_BSD: Tensor = self._bottom(batch.input_ids_BS.to(self._device), mask_BS, position_ids_BS)
        return hidden_BSD

    def _loss(self, batch: Batch, hidden_BSD: Tensor, num_items: int) -> Tensor:
        mask_BS, position_ids_BS = self._where(batch)
        return self._top.loss(hidden_BSD, mask_BS, batch.labels_BS.to(self._device), num_items, position_ids_BS)

    def _where(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        length = batch.input_ids_BS.shape[1]
        return batch.layout.mask(length, self._device), batch.layout.position_ids(length, self._device)

    def _seed(self, part: str, step: int, number: int) -> None:
        seed_dropout(self._run.seed, part, self._client_id, step, number)


def rules_of(run: RunConfig, merged: Mapping[str, nn.Parameter], tied: Tied) -> Iterator[GradientRule]:
    """Yield what is done to the gradients of every step before their norms are taken, in this order."""
    yield tied
    if run.proximal_mu:
        yield Proximal(run.proximal_mu, merged)
    if run.has_controls:
        yield Controls(merged)
