"""The only owner of the backbone: takes activations and a mask, gives activations back, and steps when told.

It does not know who asked: gradients are kept in slots, and what a slot stands for is the caller's affair. One thread
uses it. Shapes: B micro-batch, S sequence, D hidden width, P tensors that train.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from splitfl.config import RunConfig
from splitfl.models.cut import Cut, mask_of
from splitfl.training.optimizer import NO_GRADIENT, PartOptimizer, clip_coefficient
from splitfl.training.seeds import seed_dropout
from splitfl.training.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """One slot's share in a commit."""

    slot: str
    step: int
    num_label_tokens: int
    norms_P: Sequence[float]
    """Norms of the client's own gradients, in the model's order, -1 where there is none."""


@dataclass(slots=True)
class _Slot:
    """What one slot has under way: graphs between forward and backward, and the gradients of its open step."""

    graphs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    gradients: list[Tensor | None] = field(default_factory=list)


class Worker:
    """The backbone, its optimizer, and the graphs that wait for their gradients."""

    def __init__(self, cut: Cut, run: RunConfig, device: torch.device) -> None:
        """Take a cut whose server side is filled."""
        self._run = run
        self._device = device
        self._backbone = cut.backbone()
        self._trainable = cut.trainable("server")
        self._parameters = list(self._trainable.values())
        self._is_mine = [cut.side_of(name) == "server" for name in cut.trainable()]
        self._optimizer = PartOptimizer(self._trainable, run.optimizer, run.total_steps)
        self._needs_backward = run.backbone_trains or run.bottom_trains
        self._slots: dict[str, _Slot] = {}
        self._reduced = (0, 1.0)  # step and clip coefficient
        self.compute = Stopwatch()

    def evaluate(self, hidden_BSD: Tensor, lengths_B: Sequence[int], left_padded: bool) -> Tensor:
        """Run forward without dropout and keep nothing."""
        self._backbone.eval()
        with self.compute.running(), torch.inference_mode():
            return self._run_blocks(hidden_BSD.to(self._device), lengths_B, left_padded)

    def forward(
        self,
        slot: str,
        request_id: int,
        hidden_BSD: Tensor,
        lengths_B: Sequence[int],
        left_padded: bool,
        *,
        step: int,
        micro_batch: int,
    ) -> Tensor:
        """Run forward in training and keep the graph for `backward`, if anything is to learn from it."""
        self._backbone.train()
        seed_dropout(self._run.seed, "server", slot, step, micro_batch)
        with self.compute.running(), torch.set_grad_enabled(self._needs_backward):
            given_BSD = hidden_BSD.to(self._device).requires_grad_(self._run.bottom_trains)
            got_BSD = self._run_blocks(given_BSD, lengths_B, left_padded)
        if self._needs_backward:
            self._slots.setdefault(slot, _Slot()).graphs[request_id] = (given_BSD, got_BSD)
        return got_BSD.detach()

    def backward(self, slot: str, request_id: int, gradient_BSD: Tensor) -> Tensor | None:
        """Run backward, add to the slot's gradients, and return the gradient of what came in if anybody needs it."""
        own = self._slots[slot]
        given_BSD, got_BSD = own.graphs.pop(request_id)
        with self.compute.running(), self._gradients_of(own):
            got_BSD.backward(gradient_BSD.to(self._device))
        return given_BSD.grad

    def reduce(self, contributions: Sequence[Contribution]) -> float:
        """Add up several slots' gradients, weighted by label tokens, and return the clip coefficient; `apply` is next.

        The norm that is clipped by is that of the whole model: the reduced backbone gradient's per-tensor norms, and
        for the client-side tensors the same weighted mean of the clients' norms, an upper bound of the norm of their
        mean.
        """
        with self.compute.running():
            total = sum(c.num_label_tokens for c in contributions)
            shares = [c.num_label_tokens / total if total else 1.0 / len(contributions) for c in contributions]
            self._sum_gradients(
                [(self._slots.pop(c.slot, _Slot()), share) for c, share in zip(contributions, shares, strict=True)]
            )
            mine, theirs = iter(self._optimizer.norms().tolist()), iter(_mean_norms(contributions, shares))
            norms = [next(mine) if is_mine else next(theirs) for is_mine in self._is_mine]
            coefficient = clip_coefficient(norms, self._run.optimizer.max_grad_norm)
        self._reduced = (contributions[0].step, coefficient)
        return coefficient

    def apply(self) -> None:
        """Take the optimizer step with what `reduce` has left."""
        step, coefficient = self._reduced
        with self.compute.running():
            self._optimizer.step(step, coefficient)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1."""
        return self._optimizer.learning_rate(step)

    def discard(self, slot: str) -> None:
        """Free a slot's graphs and gradients."""
        self._slots.pop(slot, None)

    def trained(self) -> dict[str, Tensor]:
        """Return a copy of what trains here, by its name in the whole model."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self._trainable.items()}

    def _run_blocks(self, hidden_BSD: Tensor, lengths_B: Sequence[int], left_padded: bool) -> Tensor:
        side: Literal["left", "right"] = "left" if left_padded else "right"
        mask_BS = mask_of(lengths_B, hidden_BSD.shape[1], side, self._device)
        return self._backbone(hidden_BSD, mask_BS)

    @contextmanager
    def _gradients_of(self, slot: _Slot) -> Iterator[None]:
        """Let autograd add to a slot's gradients: they are the parameters' own while it runs."""
        for parameter, gradient in zip(self._parameters, slot.gradients or [None] * len(self._parameters), strict=True):
            parameter.grad = gradient
        try:
            yield
        finally:
            slot.gradients = [parameter.grad for parameter in self._parameters]
            for parameter in self._parameters:
                parameter.grad = None

    def _sum_gradients(self, slots: Sequence[tuple[_Slot, float]]) -> None:
        """Set each parameter's gradient to the weighted sum over the slots, in the order given."""
        for number, parameter in enumerate(self._parameters):
            total: Tensor | None = None
            for slot, share in slots:
                gradient = slot.gradients[number] if slot.gradients else None
                if gradient is not None:
                    scaled = gradient.mul_(share)
                    total = scaled if total is None else total.add_(scaled)
            parameter.grad = total


def _mean_norms(contributions: Sequence[Contribution], shares: Sequence[float]) -> list[float]:
    """Return the weighted mean of the clients' norms, tensor by tensor; one client's come through unchanged."""
    if len(contributions) == 1:
        return list(contributions[0].norms_P)
    means = []
    for norms in zip(*(c.norms_P for c in contributions), strict=True):
        known = [(norm, share) for norm, share in zip(norms, shares, strict=True) if norm != NO_GRADIENT]
        means.append(sum(norm * share for norm, share in known) if known else NO_GRADIENT)
    return means
