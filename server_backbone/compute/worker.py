"""The only owner of the backbone: takes activations and a mask, gives activations back, and steps when told.

It does not know who asked: gradients are kept in slots, and what a slot stands for is the caller's affair. One thread
uses it. Shapes: B micro-batch, S sequence, D hidden width, P tensors that train.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from server_backbone.compute.copies import Copies, Copy
from server_backbone.compute.placement import DeviceMap, connect_devices
from splitfl.config.trees import RunConfig
from splitfl.errors import DataError, RemoteProtocolError
from splitfl.models.cut import Cut
from splitfl.models.far_cache import BackboneCache
from splitfl.models.layout import Layout
from splitfl.models.packing import check_packing
from splitfl.protocol.tensors import OutOfBounds, digest_of
from splitfl.training.optimizer import NO_GRADIENT, clip_coefficient, norms_of, sum_dtype
from splitfl.training.seeds import seed_dropout
from splitfl.training.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """How a client's own loop scales a step of the backbone."""

    learning_rate: float
    clip_coefficient: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """One slot's share in a commit."""

    slot: str
    step: int
    num_label_tokens: int
    norms_P: Sequence[float]
    """Norms of the client's own gradients, in the model's order, -1 where there is none."""
    scaling: Scaling | None = None
    """What a client's own loop has decided; None where the run's settings do."""


@dataclass(slots=True)
class _Slot:
    """What one slot has under way: graphs between forward and backward, and the gradients of its open step."""

    copy: Copy
    """Whose weights the graphs were made with."""
    graphs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    gradients: list[Tensor | None] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Generation:
    """A cache, and which weights it was made with."""

    cache: BackboneCache
    version: int
    adapters_off: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reduced:
    """A step whose gradients lie on the parameters, to be applied or withdrawn."""

    copy: Copy
    step: int
    clip_coefficient: float
    learning_rate: float | None


class Worker:
    """The backbone, its optimizers, and the graphs that wait for their gradients."""

    def __init__(self, cut: Cut, run: RunConfig, device: torch.device, device_map: DeviceMap | None = None) -> None:
        """Take a cut whose server side is filled, where a device map says if there is one."""
        self._run = run
        self._device = device
        self._backbone = cut.backbone()
        if device_map is not None:
            connect_devices(self._backbone, device_map)
        self._copies = Copies(self._backbone, cut.trainable("server"), run)
        self._is_mine = [cut.side_of(name) == "server" for name in cut.trainable()]
        self._sends_gradients = run.bottom_trains or run.has_own_loops
        self._needs_backward = run.backbone_trains or self._sends_gradients
        self._adapted = [module for module in self._backbone.modules() if isinstance(module, BaseTunerLayer)]
        self._slots: dict[str, _Slot] = {}
        self._generations: dict[tuple[str, int], _Generation] = {}
        self._reduced: _Reduced | None = None
        self.compute = Stopwatch()

    def check_packing(self) -> None:
        """Raise `ModelError` if the blocks do not keep examples apart that share a row."""
        check_packing(self._backbone.base, max_seq_length=self._run.text.max_seq_length)

    def evaluate(self, slot: str, hidden_BSD: Tensor, layout: Layout, *, adapters_off: bool = False) -> Tensor:
        """Run forward without dropout and keep nothing."""
        self._copies.use(self._copies.serving(slot))
        self._backbone.eval()
        with self.compute.running(), self._adapters(off=adapters_off), torch.inference_mode():
            return self._run_blocks(hidden_BSD.to(self._device), layout)

    def decode(
        self,
        slot: str,
        cache_id: int,
        hidden_BSD: Tensor,
        lengths_B: tuple[int, ...],
        beams_B: tuple[int, ...],
        *,
        adapters_off: bool = False,
    ) -> Tensor | str:
        """Run new positions of a generation behind its cache, a new one if there is none; or return why not.

        A generation keeps the adapters with which it began. Raises `RemoteProtocolError` for rows padded behind a
        token, `ModelError` where no cache can be kept.
        """
        copy = self._copies.serving(slot)
        generation = self._generations.get((slot, cache_id))
        if generation is None:
            cache = self._backbone.new_cache()
            generation = _Generation(cache=cache, version=copy.version, adapters_off=adapters_off)
            self._generations[slot, cache_id] = generation
        if generation.version != copy.version:
            self.end_cache(slot, cache_id)
            return "the backbone has learned since this generation began: begin it anew"
        self._copies.use(copy)
        self._backbone.eval()
        try:
            with self.compute.running(), self._adapters(off=generation.adapters_off), torch.inference_mode():
                return self._backbone.decode(generation.cache, hidden_BSD.to(self._device), lengths_B, beams_B)
        except DataError as error:
            raise RemoteProtocolError(str(error)) from None

    def end_cache(self, slot: str, cache_id: int) -> None:
        """Free a cache."""
        self._generations.pop((slot, cache_id), None)

    def end_caches(self, slot: str) -> None:
        """Free all caches of a slot."""
        for key in [key for key in self._generations if key[0] == slot]:
            del self._generations[key]

    def forward(
        self,
        slot: str,
        request_id: int,
        hidden_BSD: Tensor,
        layout: Layout,
        *,
        step: int,
        micro_batch: int,
        adapters_off: bool = False,
    ) -> Tensor:
        """Run forward in training and keep the graph for `backward`, if anything is to learn from it."""
        own = self._slots.get(slot) or _Slot(copy=self._copies.training(slot))
        self._copies.use(own.copy)
        self._backbone.train()
        seed_dropout(self._run.seed, "server", slot, step, micro_batch)
        with (
            self.compute.running(),
            self._adapters(off=adapters_off),
            torch.set_grad_enabled(self._needs_backward),
        ):
            given_BSD = hidden_BSD.to(self._device).requires_grad_(self._sends_gradients)
            got_BSD = self._run_blocks(given_BSD, layout)
        if self._needs_backward:
            own.graphs[request_id] = (given_BSD, got_BSD)
            self._slots[slot] = own
        return got_BSD.detach()

    def backward(self, slot: str, request_id: int, gradient_BSD: Tensor) -> Tensor | None:
        """Run backward, add to the slot's gradients, and return the gradient of what came in if anybody needs it.

        Raises `OutOfBounds` for gradients of the backbone that are not finite: in a sum with others they would be
        everybody's.
        """
        own = self._slots[slot]
        given_BSD, got_BSD = own.graphs.pop(request_id)
        with self.compute.running():
            with _gradients_of(own):
                got_BSD.backward(gradient_BSD.to(self._device))
            if not bool(norms_of(own.gradients).isfinite().all()):
                raise OutOfBounds("activations and a gradient of which the backbone's gradients are not finite")
        return given_BSD.grad

    def norms(self, slot: str) -> Tensor:
        """Return the norm of each of the slot's gradients of the step so far (float32, Q), -1 where there is none."""
        return norms_of(self._slots[slot].gradients)

    def reduce(self, contributions: Sequence[Contribution]) -> tuple[float, dict[str, Tensor]]:
        """Add up several slots' gradients, weighted by label tokens; `apply` is next.

        Returns the clip coefficient and the sum by tensor name, before clipping: what a record of the step holds.

        The norm that is clipped by is that of the whole model: the reduced backbone gradient's per-tensor norms, and
        for the client-side tensors the same weighted mean of the clients' norms, an upper bound of the norm of their
        mean.
        """
        with self.compute.running():
            total = sum(c.num_label_tokens for c in contributions)
            shares = [c.num_label_tokens / total if total else 1.0 / len(contributions) for c in contributions]
            copy = self._copies.training(contributions[0].slot)  # several members have it in common
            slots = [self._slots.pop(c.slot, _Slot(copy=copy)) for c in contributions]
            limit = self._member_limit(len(slots))
            scales = [share * _tamed(slot, limit) for slot, share in zip(slots, shares, strict=True)]
            _sum_gradients(copy, list(zip(slots, scales, strict=True)))
            self._add_proximal_term(copy)
            scaling = contributions[0].scaling
            coefficient = self._clip(copy, contributions, shares) if scaling is None else scaling.clip_coefficient
        self._reduced = _Reduced(
            copy=copy,
            step=contributions[0].step,
            clip_coefficient=coefficient,
            learning_rate=None if scaling is None else scaling.learning_rate,
        )
        return coefficient, {name: p.grad for name, p in copy.parameters.items() if p.grad is not None}

    def withdraw(self) -> None:
        """Forget what `reduce` has left of a step that could not be written down, or not even be added up."""
        self._copies.discard_gradients()
        self._reduced = None

    def apply(self) -> bool:
        """Take the optimizer step with what `reduce` has left; return False if that was withdrawn."""
        if self._reduced is None:
            return False
        reduced, self._reduced = self._reduced, None
        with self.compute.running():
            reduced.copy.optimizer.step(reduced.step, reduced.clip_coefficient, reduced.learning_rate)
        if reduced.copy.parameters:
            self._copies.moved(reduced.copy)
        return True

    def redo(
        self,
        slot: str,
        step: int,
        clip_coefficient: float,
        gradients: Mapping[str, Tensor],
        learning_rate: float | None,
    ) -> None:
        """Take the optimizer step that a record holds; `slot` is any of its members."""
        copy = self._copies.training(slot)
        for name, parameter in copy.parameters.items():
            gradient = gradients.get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        copy.optimizer.step(step, clip_coefficient, learning_rate)
        self._copies.moved(copy)

    @property
    def has_copies(self) -> bool:
        """Whether each client trains a copy of its own."""
        return self._copies.are_per_client

    @property
    def most_copies(self) -> int:
        """How many clients' copies were held at once at most."""
        return self._copies.most_held

    def begin_round(self, clients: Sequence[str]) -> None:
        """Forget what is kept of other clients than these from one round to the next."""
        self._copies.begin_round(clients)

    def to_merge(self, slot: str) -> Mapping[str, Tensor]:
        """Return what this client's steps have made of the backbone, the live tensors; {} where all share one."""
        return _values(self._copies.serving(slot)) if self.has_copies else {}

    def before_merge(self) -> Mapping[str, Tensor]:
        """Return what the clients' copies have begun with, by the names of `to_merge`."""
        return _values(self._copies.common) if self.has_copies else {}

    def merged(self, weights: Mapping[str, Tensor]) -> None:
        """Have every client go on from these weights, from those of the last merge if there are none."""
        if self.has_copies:
            self._copies.merge_into(weights)

    def state(self) -> dict[str, Tensor]:
        """Return weights and optimizer state by name, to be written down before anything else happens here."""
        return self._copies.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state` has returned."""
        self._slots.clear()
        self._copies.load(state)

    def to_keep(self, slot: str) -> dict[str, Tensor]:
        """Return what this client has to find again when it goes back: its copy, or what all share."""
        return self._copies.serving(slot).optimizer.state() if self.has_copies else self.state()

    def go_back(self, slot: str, kept: Mapping[str, Tensor]) -> None:
        """Bring this client back to what `to_keep` has returned."""
        if not self.has_copies:
            self.load(kept)
            return
        self.discard(slot)
        self._copies.load_own(slot, kept)

    def digest(self, slot: str = "") -> str:
        """Return the SHA-256 (hex) over what trains here, in the model's order: of one client's copy if it has one."""
        return digest_of(self._copies.serving(slot).parameters.values())

    def learning_rate_of(self, contribution: Contribution) -> float:
        """Return the learning rate that a step is applied with: its client's own, or the schedule's."""
        if contribution.scaling is not None:
            return contribution.scaling.learning_rate
        return self._copies.common.optimizer.learning_rate(contribution.step)

    def discard(self, slot: str) -> None:
        """Free a slot's graphs and gradients."""
        self._slots.pop(slot, None)

    def owners(self) -> Sequence[str]:
        """Name the clients that have trained a copy of their own since the last merge."""
        return self._copies.owners()

    def trained(self, slot: str = "") -> dict[str, Tensor]:
        """Return a copy of what trains here, by its name in the whole model: of one client's copy if it has one."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self._copies.serving(slot).parameters.items()}

    def load_trained(self, trained: Mapping[str, Tensor]) -> None:
        """Take over what `trained` has returned; nothing is trained behind that."""
        self._slots.clear()
        self._copies.merge_into(trained)

    def _run_blocks(self, hidden_BSD: Tensor, layout: Layout) -> Tensor:
        length = hidden_BSD.shape[1]
        return self._backbone(hidden_BSD, layout.mask(length, self._device), layout.position_ids(length, self._device))

    @contextmanager
    def _adapters(self, *, off: bool) -> Iterator[None]:
        """Have the backbone's adapters sit out what is run inside, as peft's `disable_adapter` does."""
        if not off:
            yield
            return
        for layer in self._adapted:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._adapted:
                layer.enable_adapters(True)

    def _add_proximal_term(self, copy: Copy) -> None:
        """Add FedProx's mu (w - w0) where a copy drifts from the others', as each client does with its own layers."""
        mu = self._run.proximal_mu
        if copy is self._copies.common or not mu or self._run.has_own_loops:
            return
        with torch.no_grad():
            for name, parameter in copy.parameters.items():
                pull = (parameter - self._copies.common.parameters[name]).mul_(mu)
                parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)

    def _clip(self, copy: Copy, contributions: Sequence[Contribution], shares: Sequence[float]) -> float:
        limit = self._member_limit(len(contributions))
        client_norms = [_tamed_norms(each.norms_P, limit) for each in contributions]
        mine, theirs = iter(copy.optimizer.norms().tolist()), iter(_mean_norms(client_norms, shares))
        norms = [next(mine) if is_mine else next(theirs) for is_mine in self._is_mine]
        return clip_coefficient(norms, self._run.optimizer.max_grad_norm)

    def _member_limit(self, num_members: int) -> float:
        """Return the norm that one member's part counts with at most; alone, the step's own clipping does."""
        limit = self._run.federation.client_max_grad_norm
        return limit if num_members > 1 and limit else math.inf


def _values(copy: Copy) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in copy.parameters.items()}


@contextmanager
def _gradients_of(slot: _Slot) -> Iterator[None]:
    """Let autograd add to a slot's gradients: they are the parameters' own while it runs."""
    parameters = list(slot.copy.parameters.values())
    for parameter, gradient in zip(parameters, slot.gradients or [None] * len(parameters), strict=True):
        parameter.grad = gradient
    try:
        yield
    finally:
        slot.gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None


def _sum_gradients(copy: Copy, slots: Sequence[tuple[_Slot, float]]) -> None:
    """Set each parameter's gradient to the weighted sum over the slots, in the order given.

    Sums are float32 at least and rounded once: in bfloat16 every addition would round to 8 bits, and the error grow
    with the clients. One slot's gradient at a share of 1 comes through unchanged.
    """
    for number, parameter in enumerate(copy.parameters.values()):
        total: Tensor | None = None
        for slot, share in slots:
            gradient = slot.gradients[number] if slot.gradients else None
            if gradient is not None:
                scaled = gradient.to(sum_dtype(gradient)).mul_(share)
                slot.gradients[number] = None  # a sum of several is no time in memory with all that it is made of
                total = scaled if total is None else total.add_(scaled)
        parameter.grad = None if total is None else total.to(parameter.dtype)


def _tamed(slot: _Slot, limit: float) -> float:
    """Return what to scale one member's gradient of the backbone by, whose norm nothing that it says can change."""
    gradients = [gradient for gradient in slot.gradients if gradient is not None]
    if limit == math.inf or not gradients:
        return 1.0
    # they may lie on several devices
    norms = [torch.linalg.vector_norm(gradient, dtype=sum_dtype(gradient)).cpu() for gradient in gradients]
    norm = float(torch.linalg.vector_norm(torch.stack(norms)))
    return min(1.0, limit / norm) if norm > 0 else 1.0


def _tamed_norms(norms: Sequence[float], limit: float) -> list[float]:
    """Return one member's own norms, scaled likewise: whoever claims huge ones must not shrink the others' step."""
    total = math.sqrt(sum(norm * norm for norm in norms if norm != NO_GRADIENT))
    if total <= limit:
        return list(norms)
    return [norm if norm == NO_GRADIENT else norm * limit / total for norm in norms]


def _mean_norms(norms: Sequence[Sequence[float]], shares: Sequence[float]) -> list[float]:
    """Return the weighted mean of the clients' norms, tensor by tensor; one client's come through unchanged."""
    if len(norms) == 1:
        return list(norms[0])
    means = []
    for of_tensor in zip(*norms, strict=True):
        known = [(norm, share) for norm, share in zip(of_tensor, shares, strict=True) if norm != NO_GRADIENT]
        means.append(sum(norm * share for norm, share in known) if known else NO_GRADIENT)
    return means
