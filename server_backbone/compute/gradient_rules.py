"""What becomes of gradients between the members of a step and the optimizer: a list of rules, one small class each.

Each rule changes a `Draft` in its turn. Another one, such as noise on the sum for differential privacy, is a class and
a line of `rules_of_rounds`. Gradients that are not finite do not come here: `BlocksWorker.backward` refuses them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from server_backbone.compute.blocks_worker import Contribution
from splitfl.config.kind import BackboneKind
from splitfl.config.trees import RunConfig
from splitfl.models.cut import Cut
from splitfl.training.optimizer import NO_GRADIENT, clip_coefficient, norms_of, sum_dtype

Parameters = Mapping[str, nn.Parameter]


@dataclass(slots=True, kw_only=True, eq=False)
class Draft:
    """A step on its way from its members' gradients to one sum."""

    members: Sequence[Contribution]
    parts: Sequence[list[Tensor | None]]
    """Each member's gradients in the order of `parameters`, [] where it has none; a part that was added is let go."""
    parameters: Parameters
    """What the step moves."""
    common: Parameters
    """What all share: the same, or what the member's copy began with."""
    shares: list[float] = field(default_factory=list)
    """What each member counts; they add up to 1."""
    factors: list[float] = field(default_factory=list)
    """What each member's part is scaled by besides."""
    client_norms: list[Sequence[float]] = field(default_factory=list)
    """Norms of each member's gradients on its own side, as they count."""
    total: list[Tensor | None] = field(default_factory=list)
    """The sum, in the order of `parameters`."""
    clip_coefficient: float = 1.0

    def __post_init__(self) -> None:
        self.factors = [1.0] * len(self.members)
        self.client_norms = [each.norms_P for each in self.members]

    def gradients(self) -> dict[str, Tensor]:
        """Return the sum by name."""
        return {name: total for name, total in zip(self.parameters, self.total, strict=True) if total is not None}


class GradientRule(Protocol):
    """One thing that is done to the gradients of a step."""

    def __call__(self, draft: Draft) -> None:
        """Change the draft."""
        ...


class CountByLabelTokens:
    """A member counts by its label tokens, or all alike if there are none."""

    def __call__(self, draft: Draft) -> None:
        """Set the shares."""
        total = sum(each.num_label_tokens for each in draft.members)
        draft.shares = [each.num_label_tokens / total if total else 1.0 / len(draft.members) for each in draft.members]


@dataclass(frozen=True, slots=True)
class BoundMembers:
    """One member's gradients count with this norm at most, on either side; alone, the step's own clipping does."""

    limit: float

    def __call__(self, draft: Draft) -> None:
        """Scale the parts by a norm that nothing can change that a member says; and the norms that it claims."""
        if len(draft.members) > 1:
            draft.factors = [
                factor * self._tamed(part) for factor, part in zip(draft.factors, draft.parts, strict=True)
            ]
            draft.client_norms = [self._tamed_norms(norms) for norms in draft.client_norms]

    def _tamed(self, part: Sequence[Tensor | None]) -> float:
        gradients = [gradient for gradient in part if gradient is not None]
        if not gradients:
            return 1.0
        # they may lie on several devices
        norms = [torch.linalg.vector_norm(gradient, dtype=sum_dtype(gradient)).cpu() for gradient in gradients]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        return min(1.0, self.limit / norm) if norm > 0 else 1.0

    def _tamed_norms(self, norms: Sequence[float]) -> list[float]:
        """Scale one member's own norms likewise: a member that claims huge ones must not shrink the others' step."""
        total = math.sqrt(sum(norm * norm for norm in norms if norm != NO_GRADIENT))
        if total <= self.limit:
            return list(norms)
        return [norm if norm == NO_GRADIENT else norm * self.limit / total for norm in norms]


class AddUp:
    """The members' parts become one sum, in the order given.

    Sums are float32 at least and rounded once: in bfloat16 every addition would round to 8 bits, and the error grow
    with the clients. One member's gradient at a share of 1 comes through unchanged.
    """

    def __call__(self, draft: Draft) -> None:
        """Make the sum."""
        scales = [share * factor for share, factor in zip(draft.shares, draft.factors, strict=True)]
        parts = [(part, scale) for part, scale in zip(draft.parts, scales, strict=True) if part]
        draft.total = [self._sum(number, parts, p) for number, p in enumerate(draft.parameters.values())]

    def _sum(self, number: int, parts: Sequence[tuple[list[Tensor | None], float]], like: Tensor) -> Tensor | None:
        total: Tensor | None = None
        for part, scale in parts:
            gradient = part[number]
            if gradient is not None:
                scaled = gradient.to(sum_dtype(gradient)).mul_(scale)
                part[number] = None  # a sum of several is no time in memory with all that it is made of
                total = scaled if total is None else total.add_(scaled)
        return None if total is None else total.to(like.dtype)


@dataclass(frozen=True, slots=True)
class PullToCommon:
    """FedProx's mu (w - w0) where a copy drifts from the others', as each client does with its own layers."""

    mu: float

    def __call__(self, draft: Draft) -> None:
        """Add it to the sum."""
        for number, (name, parameter) in enumerate(draft.parameters.items()):
            pull = (parameter - draft.common[name]).mul_(self.mu)
            total = draft.total[number]
            draft.total[number] = pull if total is None else total.add_(pull)


@dataclass(frozen=True, slots=True)
class ClipWhole:
    """The step is clipped by the norm of the whole model.

    For the tensors here that is the norm of the sum. For the clients' tensors it is the weighted mean of their norms,
    an upper bound of the norm of their mean.
    """

    max_grad_norm: float
    is_here: Sequence[bool]
    """Of each tensor that trains, in the model's order: whether it is the server's."""

    def __call__(self, draft: Draft) -> None:
        """Set the coefficient; it is applied with the step, by both sides."""
        here = iter(norms_of(draft.total).tolist())
        theirs = iter(self._mean_norms(draft.client_norms, draft.shares))
        norms = [next(here) if is_here else next(theirs) for is_here in self.is_here]
        draft.clip_coefficient = clip_coefficient(norms, self.max_grad_norm)

    def _mean_norms(self, norms: Sequence[Sequence[float]], shares: Sequence[float]) -> list[float]:
        """Return the weighted mean of the clients' norms, tensor by tensor; one client's come through unchanged."""
        if len(norms) == 1:
            return list(norms[0])
        means = []
        for of_tensor in zip(*norms, strict=True):
            known = [(norm, share) for norm, share in zip(of_tensor, shares, strict=True) if norm != NO_GRADIENT]
            means.append(sum(norm * share for norm, share in known) if known else NO_GRADIENT)
        return means


class ClipAsTold:
    """The step is scaled as its own-loop client says."""

    def __call__(self, draft: Draft) -> None:
        """Set the coefficient."""
        scaling = draft.members[0].scaling
        draft.clip_coefficient = 1.0 if scaling is None else scaling.clip_coefficient


def rules_of_rounds(run: RunConfig, cut: Cut) -> Sequence[GradientRule]:
    """Return what becomes of the gradients of a step in a round."""
    rules = _added_up(run)
    if run.backbone_kind is BackboneKind.COPIES and run.proximal_mu:
        rules.append(PullToCommon(run.proximal_mu))
    is_here = [cut.side_of(name) == "server" for name in cut.trainable()]
    return [*rules, ClipWhole(run.optimizer.max_grad_norm, is_here)]


def rules_of_own_loops(run: RunConfig) -> Sequence[GradientRule]:
    """Return what becomes of the gradients of a step in a loop of a client's own."""
    return [*_added_up(run), ClipAsTold()]


def _added_up(run: RunConfig) -> list[GradientRule]:
    limit = run.federation.client_max_grad_norm
    bounds: list[GradientRule] = [BoundMembers(limit)] if limit else []
    return [CountByLabelTokens(), *bounds, AddUp()]
