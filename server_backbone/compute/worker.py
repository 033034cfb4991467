"""The worker of one process: it computes with the blocks, keeps graphs and gradients by client, and steps when told.

Shapes: B micro-batch, S sequence, D hidden width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from server_backbone.compute.blocks import Blocks
from server_backbone.compute.blocks_worker import Backpropagated, Contribution, MicroBatch, ReducedStep, Used
from server_backbone.compute.copies import Copies, Copy
from server_backbone.compute.generations import Generations
from server_backbone.compute.gradient_rules import Draft, GradientRule
from server_backbone.compute.placement import DeviceMap
from splitfl.config.trees import RunConfig
from splitfl.models.cut import Cut
from splitfl.protocol.tensors import OutOfBounds
from splitfl.training.kinds import shared_parts
from splitfl.training.optimizer import norms_of
from splitfl.training.seeds import seed_dropout


@dataclass(slots=True, kw_only=True, eq=False)
class _UnderWay:
    """One client's work under way: graphs between forward and backward, and the gradients of its open step."""

    copy: Copy
    """Whose weights the graphs were made with."""
    graphs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    gradients: list[Tensor | None] = field(default_factory=list)


class Worker:
    """The `BlocksWorker` of a server whose blocks are in its own process."""

    def __init__(self, blocks: Blocks, copies: Copies, rules: Sequence[GradientRule], run: RunConfig) -> None:
        """`rules` say what becomes of a step's gradients."""
        self._run = run
        self._copies = copies
        self._rules = rules
        self._sends_gradients = shared_parts(run).sends_gradients(run)
        self._needs_backward = run.backbone_trains or self._sends_gradients
        self._under_way: dict[str, _UnderWay] = {}
        self.blocks = blocks
        self.generations = Generations(blocks, copies)

    @property
    def used(self) -> Used:
        """The cost of computing so far."""
        return Used(compute_seconds=self.blocks.compute.seconds, most_copies=self._copies.most_held)

    def evaluate(self, client_id: str, batch: MicroBatch) -> Tensor:
        """Return the activations BSD without dropout, and keep nothing."""
        with torch.inference_mode():
            return self.blocks.run(self._copies.serving(client_id).parameters, batch, trains=False)

    def forward(self, client_id: str, batch: MicroBatch) -> Tensor:
        """Return the activations BSD in training, and keep the graph for `backward` if anything learns from it."""
        mine = self._under_way.get(client_id) or _UnderWay(copy=self._copies.training(client_id))
        seed_dropout(self._run.seed, "server", client_id, batch.step, batch.micro_batch)
        with torch.set_grad_enabled(self._needs_backward):
            given_BSD = batch.hidden_BSD.to(self.blocks.device).requires_grad_(self._sends_gradients)
            got_BSD = self.blocks.run(mine.copy.parameters, replace(batch, hidden_BSD=given_BSD), trains=True)
        if self._needs_backward:
            mine.graphs[batch.request_id] = (given_BSD, got_BSD)
            self._under_way[client_id] = mine
        return got_BSD.detach()

    def backward(self, client_id: str, request_id: int, gradient_BSD: Tensor) -> Backpropagated:
        """Run backward, free the graph, and add to the client's gradients; see `BlocksWorker`."""
        mine = self._under_way[client_id]
        given_BSD, got_BSD = mine.graphs.pop(request_id)
        with self.blocks.compute.running():
            with _gradients_of(mine):
                got_BSD.backward(gradient_BSD.to(self.blocks.device))
            norms_Q = norms_of(mine.gradients)
            if not bool(norms_Q.isfinite().all()):
                raise OutOfBounds("activations and a gradient of which the backbone's gradients are not finite")
        return Backpropagated(gradient_BSD=given_BSD.grad, norms_Q=norms_Q)

    def reduce(self, contributions: Sequence[Contribution]) -> ReducedStep:
        """Add up what several clients have contributed to a step, by the rules, and keep none of it."""
        first = contributions[0]
        with self.blocks.compute.running(), torch.no_grad():
            copy = self._copies.training(first.client_id)  # several members have it in common
            parts = [self._part(each.client_id) for each in contributions]
            draft = Draft(
                members=contributions, parts=parts, parameters=copy.parameters, common=self._copies.common.parameters
            )
            for rule in self._rules:
                rule(draft)
        return ReducedStep(
            client_id=first.client_id,
            step=first.step,
            clip_coefficient=draft.clip_coefficient,
            learning_rate=self._learning_rate_of(first),
            gradients=draft.gradients(),
        )

    def apply(self, step: ReducedStep) -> None:
        """Take the optimizer's step, of `reduce` or of a record; once, since the gradients are scaled in place."""
        copy = self._copies.training(step.client_id)
        with self.blocks.compute.running():
            for name, parameter in copy.parameters.items():
                gradient = step.gradients.get(name)
                parameter.grad = None if gradient is None else gradient.to(parameter.device)
            copy.optimizer.step(step.step, step.clip_coefficient, step.learning_rate)
        if copy.parameters:
            self._copies.moved(copy)

    def discard(self, client_id: str) -> None:
        """Free a client's graphs and gradients."""
        self._under_way.pop(client_id, None)

    def state(self, client_id: str | None = None) -> dict[str, Tensor]:
        """Return weights and moments by name, the live tensors: of everything, or of one client."""
        return self._copies.state() if client_id is None else self._copies.serving(client_id).optimizer.state()

    def load(self, state: Mapping[str, Tensor], client_id: str | None = None) -> None:
        """Go back to what `state` has returned; graphs that were made with other weights are freed."""
        if client_id is None or not self._copies.are_per_client:
            self._under_way.clear()
            self._copies.load(state)
        else:
            self.discard(client_id)
            self._copies.load_own(client_id, state)

    def begin_round(self, clients: Sequence[str]) -> None:
        """Forget what is kept of other clients than these from one round to the next."""
        self._copies.begin_round(clients)

    def merged(self, weights: Mapping[str, Tensor]) -> None:
        """Have every client go on from these weights, or from the common ones if there are none; copies end."""
        if weights or self._copies.are_per_client:
            self._copies.merge_into(weights)

    def _part(self, client_id: str) -> list[Tensor | None]:
        """Take a client's gradients of its step, and forget the step."""
        mine = self._under_way.pop(client_id, None)
        return mine.gradients if mine is not None else []

    def _learning_rate_of(self, contribution: Contribution) -> float:
        """Return the learning rate that a step is applied with: its client's own, or the schedule's."""
        if contribution.scaling is not None:
            return contribution.scaling.learning_rate
        return self._copies.common.optimizer.learning_rate(contribution.step)


def worker_of(
    cut: Cut,
    run: RunConfig,
    rules: Sequence[GradientRule],
    device: torch.device,
    device_map: DeviceMap | None = None,
) -> Worker:
    """Put the worker of this process together; the cut's server side is filled, where a device map says if any."""
    blocks = Blocks(cut, device, device_map)
    return Worker(blocks, Copies(blocks.trainable, run), rules, run)


@contextmanager
def _gradients_of(mine: _UnderWay) -> Iterator[None]:
    """Let autograd add to a client's gradients: they are the parameters' own while it runs."""
    parameters = list(mine.copy.parameters.values())
    for parameter, gradient in zip(parameters, mine.gradients or [None] * len(parameters), strict=True):
        parameter.grad = gradient
    try:
        yield
    finally:
        mine.gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
