"""How far uploaded layers may have moved: no optimizer goes beyond it, and what is not training does."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from splitfl.config.identity import OptimizerSection
from splitfl.errors import RemoteProtocolError
from splitfl.federation.movement import Bound
from splitfl.training.optimizer import PartOptimizer, clip_coefficient

STEPS = 40


def bound(max_update: float = 10.0, **optimizer: Any) -> Bound:
    return Bound(optimizer=OptimizerSection(**optimizer), max_update=max_update)


def alike(step: int, weight: Tensor) -> Tensor:
    """Return gradients that all point one way: AdamW's fastest straight line."""
    return torch.ones_like(weight)


def seldom(step: int, weight: Tensor) -> Tensor:
    """Return nothing for long, then a burst: AdamW's largest steps."""
    return torch.full_like(weight, 1e3 if step > STEPS - 4 else 1e-6)


def unlike(step: int, weight: Tensor) -> Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)) * 2.0**step


GRADIENTS = [alike, seldom, unlike]


def trained(start: Tensor, gradient: Callable[[int, Tensor], Tensor], section: OptimizerSection) -> Tensor:
    weight = nn.Parameter(start.clone())
    optimizer = PartOptimizer({"w": weight}, section, STEPS)
    for step in range(1, STEPS + 1):
        weight.grad = gradient(step, start)
        optimizer.step(step, clip_coefficient(optimizer.norms().tolist(), section.max_grad_norm))
    return weight.detach()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("start", [torch.zeros(50, 3), torch.randn(20, 8), torch.ones(7), torch.tensor(0.0)])
@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e-3},
        {"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.0},
        {"learning_rate": 0.3, "optim": "sgd"},
    ],
)
def test_training_never_meets_it(
    settings: dict[str, Any], start: Tensor, gradient: Callable[[int, Tensor], Tensor]
) -> None:
    section = OptimizerSection(lr_scheduler_type="constant", **settings)
    after = trained(start, gradient, section)
    assert not torch.equal(after, start)
    share = bound(**settings).check({"w": after}, {"w": start}, STEPS * section.learning_rate)
    assert 0 < share < 1


def test_the_share_of_what_is_allowed_is_the_farthest_tensors() -> None:
    begun = {"a": torch.zeros(4), "b": torch.full((4,), 2.0)}
    layers = {"a": torch.full((4,), 0.01), "b": torch.full((4,), 3.0)}
    assert bound().check(layers, begun, path=0.01) == pytest.approx(1.0 / 2.1)
    assert bound().check(begun, begun, path=0.01) == 0
    assert bound().check({"a": begun["a"]}, begun, path=0.0) == 0


@pytest.mark.parametrize(
    ("begun", "layer", "settings"),
    [
        (torch.zeros(8, 4), torch.full((8, 4), 1e5), {}),
        (torch.zeros(8, 4), torch.full((8, 4), 0.11), {}),
        (torch.ones(8, 4), -torch.full((8, 4), 1.2), {}),
        # at SGD's rates the norm that is clipped to bounds it: 1 over all 32 values a step
        (torch.zeros(8, 4), torch.full((8, 4), 0.2), {"optim": "sgd"}),
        (torch.zeros(8, 4, dtype=torch.bfloat16), torch.full((8, 4), 1e5, dtype=torch.bfloat16), {}),
    ],
)
def test_what_no_training_makes_is_refused(begun: Tensor, layer: Tensor, settings: dict[str, Any]) -> None:
    rule = (
        r"layers that no training here makes: top has moved by .* \(root mean square\) since the last merge, more than"
    )
    with pytest.raises(RemoteProtocolError, match=rule + r" the .* that strategy.max_update = 10 allows"):
        bound(**settings).check({"top": layer}, {"top": begun}, path=0.01)


def test_it_can_be_turned_off_or_not_be_known() -> None:
    far = {"w": torch.full((4,), 1e5)}, {"w": torch.zeros(4)}
    assert bound(max_update=0.0).check(*far, path=0.01) == 0
    assert bound().check(*far, path=math.inf) == 0


def test_large_tensors_are_looked_at_whole() -> None:
    begun = torch.zeros(3, 1 << 20)
    layer = begun.clone()
    layer[2, -1] = 1e4  # 5.6 as a root mean square
    with pytest.raises(RemoteProtocolError, match=r"moved by 5\.64"):
        bound().check({"w": layer}, {"w": begun}, path=0.01)
