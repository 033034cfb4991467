"""The client's part of the model: bottom, top, their optimizer, and what a micro-batch needs between its four visits.

Shapes: B micro-batch, S sequence, D hidden width, P tensors that train on the client.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from client_edge.layers.controls import Controls
from client_edge.text.batches import Batch
from splitfl.config.trees import RunConfig
from splitfl.models.cut import Cut
from splitfl.models.packing import check_packing
from splitfl.protocol.tensors import digest_of
from splitfl.training.optimizer import PartOptimizer
from splitfl.training.seeds import seed_dropout
from splitfl.training.stopwatch import Stopwatch
from splitfl.training.terms import merged_layers

_ROUND_START = "round_start/"


@dataclass(slots=True, kw_only=True)
class MicroBatch:
    """One micro-batch under way: forward here, there, here, and the same way back."""

    batch: Batch
    number: int
    """Its place in the step, from 0."""
    hidden_BSD: Tensor
    """The bottom's activations, with their graph if anything below the cut trains."""
    tied_gradients: list[Tensor | None]
    """The head's gradients of tensors that the bottom has too, until the bottom's are added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """How well the label tokens of one batch of an evaluation are predicted."""

    loss: float
    """Sum over the label tokens."""
    num_correct: int
    """Label tokens whose logit is the largest."""
    losses_B: tuple[float, ...]
    """Sum over each row's label tokens: minus the log-likelihood of the row's labels."""


class Edge:
    """Bottom and top of one client."""

    def __init__(self, cut: Cut, run: RunConfig, client_id: str, device: torch.device) -> None:
        """Take a cut whose client side is filled; raise `ModelError` if it cannot train on rows as the run has them."""
        self._run = run
        self._client_id = client_id
        self._device = device
        self._bottom = cut.bottom()
        self._top = cut.top()
        if run.text.packing:
            for segment in (self._bottom, self._top):
                check_packing(segment.base, max_seq_length=run.text.max_seq_length)
        self.takes_plain_loss = run.train.loss == "plain" or not self._top.chunk_the_loss()
        self._trainable = cut.trainable("client")
        self._merged = merged_layers(run, cut)
        self._tied = _shared(self._bottom, self._top)
        self._embedded: dict[int, list[Tensor | None]] = {}
        if not self.takes_plain_loss and device.type != "mps":  # which has no sparse tensors
            _give_sparse_gradients(self._bottom, self._tied)
        in_bottom = set(self._bottom.parameters())
        self._only_top = [p for p in self._trainable.values() if p not in in_bottom]
        self._half_done: tuple[int, float, float, list[Tensor | None]] | None = None
        self.optimizer = PartOptimizer(self._trainable, run.optimizer, run.num_training_steps)
        self.compute = Stopwatch()
        self._controls = Controls(self._merged if run.has_controls else {})
        self._round_start: dict[str, Tensor] = {}
        self._mark_round_start()

    def bottom_forward(self, batch: Batch, *, step: int, number: int) -> MicroBatch:
        """Embed a micro-batch and run the first blocks."""
        self._bottom.train()
        self._seed("bottom", step, number)
        with self.compute.running(), torch.set_grad_enabled(self._run.bottom_trains):
            hidden_BSD = self._run_bottom(batch)
        return MicroBatch(batch=batch, number=number, hidden_BSD=hidden_BSD, tied_gradients=[])

    def top_loss_and_backward(
        self, micro_batch: MicroBatch, hidden_BSD: Tensor, *, step: int, num_label_tokens: int
    ) -> tuple[float, Tensor]:
        """Run the last blocks and the loss, and backward through them.

        Returns the micro-batch's share of the step's mean loss over `num_label_tokens`, and the gradient with respect
        to `hidden_BSD`.
        """
        self.finish_step()
        batch = micro_batch.batch
        self._top.train()
        self._seed("top", step, micro_batch.number)
        tied = self._tied_set_aside(micro_batch) if self.takes_plain_loss else nullcontext()
        with self.compute.running(), tied:
            given_BSD = hidden_BSD.to(self._device).requires_grad_()
            loss = self._loss(batch, given_BSD, num_label_tokens)
            loss.backward()
        if given_BSD.grad is None:
            raise RuntimeError("the loss does not depend on the activations")
        return loss.item(), given_BSD.grad

    def bottom_backward(self, micro_batch: MicroBatch, gradient_BSD: Tensor | None) -> None:
        """Run backward through the first blocks, if anything there trains, and add tied gradients together."""
        tied = self._tied_brought_back if self.takes_plain_loss else self._embedding_set_aside
        with self.compute.running(), tied(micro_batch):
            if gradient_BSD is not None:
                micro_batch.hidden_BSD.backward(gradient_BSD.to(self._device))

    def finish_gradients(self) -> None:
        """Complete the gradients of a step all of whose micro-batches have gone their way."""
        embedded, self._embedded = self._embedded, {}
        for number in sorted(embedded):
            for parameter, rows in zip(self._tied, embedded[number], strict=True):
                if rows is not None:
                    parameter.grad = _sum(parameter.grad, rows)

    def evaluate_bottom(self, batch: Batch) -> Tensor:
        """Run the first blocks without dropout or graph."""
        self._bottom.eval()
        with self.compute.running(), torch.inference_mode():
            return self._run_bottom(batch)

    def evaluate_top(self, batch: Batch, hidden_BSD: Tensor) -> Scored:
        """Return how well the batch's label tokens are predicted."""
        self.finish_step()
        self._top.eval()
        with self.compute.running(), torch.inference_mode():
            labels_BS = batch.labels_BS.to(self._device)
            scores = self._top.scores(hidden_BSD.to(self._device), self._where(batch)[0], labels_BS)
            losses_B = torch.zeros(len(labels_BS), dtype=torch.float64)
            losses_B.index_add_(0, scores.rows_N.cpu(), scores.losses_N.cpu().double())
            return Scored(
                loss=float(scores.loss), num_correct=int(scores.hits_N.sum()), losses_B=tuple(losses_B.tolist())
            )

    def add_proximal_term(self) -> None:
        """Add mu (w - w0) to a step's gradients, w0 being the layers of the last merge, before norms are taken.

        The gradient of mu/2 |w - w0|² (Li et al. 2020, arXiv:1812.06127, equation 2). Does nothing unless the strategy
        is FedProx.
        """
        if not self._run.proximal_mu:
            return
        self.finish_step()
        with torch.no_grad():
            for name, start in self._round_start.items():
                parameter = self._merged[name]
                pull = (parameter - start).mul_(self._run.proximal_mu)
                parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)

    def add_controls(self) -> None:
        """Add SCAFFOLD's c - c_i to a step's gradients, before norms are taken; nothing with any other strategy."""
        self.finish_step()
        self._controls.correct()

    def step(self, step: int, clip_coefficient: float, learning_rate: float | None = None) -> None:
        """Apply the gradients of a step that the server has acknowledged to the bottom, and keep the top's for later.

        With this learning rate, or else the schedule's.

        The server waits for the next activations, which only the bottom makes; `finish_step` must follow.
        """
        self.finish_step()
        rate = self.optimizer.learning_rate(step) if learning_rate is None else learning_rate
        self._controls.stepped(rate * clip_coefficient)
        with self.compute.running():
            later = _take(self._only_top)
            self.optimizer.step(step, clip_coefficient, rate)  # what has no gradient is left as it is
        self._half_done = (step, clip_coefficient, rate, later)

    def finish_step(self) -> None:
        """Apply to the top what `step` has kept, if it has; whatever uses the top's weights calls this first."""
        if self._half_done is None:
            return
        step, clip_coefficient, rate, later = self._half_done
        self._half_done = None
        with self.compute.running():
            _put(self._only_top, later)  # the bottom has no gradient yet: its backward comes after the top's
            self.optimizer.step(step, clip_coefficient, rate)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the step that is done, by their tensors' names; they are the live ones."""
        return {name: p.grad for name, p in self._trainable.items() if p.grad is not None}

    def set_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Put a record's gradients where the step will find them."""
        self.finish_step()
        for name, parameter in self._trainable.items():
            gradient = gradients.get(name)
            parameter.grad = None if gradient is None else gradient.to(self._device)

    def discard(self) -> None:
        """Forget the gradients of a step that is applied nowhere; what is acknowledged is finished first."""
        self.optimizer.discard()
        self._embedded.clear()
        self.finish_step()

    def forget_step(self, *, keeps_gradients: bool) -> None:
        """Drop what was under way when the connection was lost; a step that is asked for keeps its gradients."""
        if not keeps_gradients:
            self.discard()

    def state(self) -> dict[str, Tensor]:
        """Return weights and optimizer state by name, to be written down before anything else happens here."""
        self.finish_step()
        starts = {_ROUND_START + name: start for name, start in self._round_start.items()}
        return self.optimizer.state() | starts | self._controls.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state` has returned."""
        self._half_done = None
        self.optimizer.load_state(state)
        for name, start in self._round_start.items():
            start.copy_(state[_ROUND_START + name])
        self._controls.restore(state)

    def begin_again(self, first_layers: Mapping[str, Tensor]) -> None:
        """Go back to before the first step: to these layers, with nothing that was learned or gathered since."""
        self._half_done = None
        self._embedded.clear()
        self.optimizer.load_state(first_layers)
        self._controls.forget()
        self._mark_round_start()

    def digest(self) -> str:
        """Return the SHA-256 (hex) over what trains here, in the model's order."""
        self.finish_step()
        return digest_of(self._trainable.values())

    def merged_digest(self) -> str:
        """Return the SHA-256 (hex) over what is merged: equal on all clients after a merge."""
        self.finish_step()
        return digest_of(self._merged.values())

    def layers(self) -> dict[str, Tensor]:
        """Return a copy of what is merged, by its name in the whole model, in its order."""
        self.finish_step()
        return {name: p.detach().to("cpu", copy=True) for name, p in self._merged.items()}

    def load(self, layers: Sequence[Tensor], *, counted: bool = False) -> None:
        """Write merged layers over those here; behind them come their controls, where the strategy has any.

        `counted` says whether the merge has taken what is here.
        """
        self.finish_step()
        self._controls.settle(self._round_start, counted=counted)
        with torch.no_grad():
            for parameter, layer in zip(self._merged.values(), layers[: len(self._merged)], strict=True):
                parameter.copy_(layer)
        self._controls.load(layers[len(self._merged) :])
        self._mark_round_start()
        if self._run.federation.optimizer_state == "reset":
            self.optimizer.reset_state()

    def _mark_round_start(self) -> None:
        if self._run.proximal_mu or self._run.has_controls:
            self._round_start = {name: p.detach().clone() for name, p in self._merged.items()}

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

    @contextmanager
    def _tied_set_aside(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Keep the head's gradients of tied tensors out of the sum until the embedding's can be added first.

        The whole model adds both of one micro-batch before it accumulates them; another order gives other bits.
        """
        before = _take(self._tied)
        try:
            yield
        finally:
            micro_batch.tied_gradients = _take(self._tied)
            _put(self._tied, before)

    @contextmanager
    def _tied_brought_back(self, micro_batch: MicroBatch) -> Iterator[None]:
        before = _take(self._tied)
        _put(self._tied, micro_batch.tied_gradients)
        micro_batch.tied_gradients = []  # a head's gradient is as large as the head: nobody else may hold it
        try:
            yield
        finally:
            now = _take(self._tied)
            _put(self._tied, [_sum(old, new) for old, new in zip(before, now, strict=True)])

    @contextmanager
    def _embedding_set_aside(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Keep the embedding's gradients of tied tensors out of the head's sum until the step's end.

        They are some rows where the head's are a whole matrix; so no second matrix is ever needed, however many
        micro-batches are under way, and the order of the sum does not depend on how they overlap.
        """
        before = _take(self._tied)
        try:
            yield
        finally:
            self._embedded[micro_batch.number] = _take(self._tied)
            _put(self._tied, before)


def _give_sparse_gradients(bottom: nn.Module, tied: Sequence[nn.Parameter]) -> None:
    for module in bottom.modules():
        if isinstance(module, nn.Embedding) and any(module.weight is parameter for parameter in tied):
            module.sparse = True


def _shared(bottom: nn.Module, top: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that train in both segments."""
    in_bottom = set(bottom.parameters())
    return [parameter for parameter in top.parameters() if parameter in in_bottom and parameter.requires_grad]


def _take(parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    gradients = [parameter.grad for parameter in parameters]
    _put(parameters, [None] * len(parameters))
    return gradients


def _put(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _sum(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old.add_(new)
