"""The learning rate of a step, by its number alone: transformers' curve, and what comes after its end."""

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from splitfl.config.identity import OptimizerSection
from splitfl.training.optimizer import PartOptimizer

NUM_STEPS, WARMUP = 10, 3


def rates(kind: str, steps: range) -> list[float]:
    section = OptimizerSection(learning_rate=0.5, lr_scheduler_type=kind, warmup_steps=WARMUP)
    optimizer = PartOptimizer({"weight": nn.Parameter(torch.zeros(2))}, section, NUM_STEPS)
    return [optimizer.learning_rate(step) for step in steps]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "constant"])
def test_is_that_of_the_library(kind: str) -> None:
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = get_scheduler(kind, reference, num_warmup_steps=WARMUP, num_training_steps=NUM_STEPS)
    wanted = []
    for _ in range(NUM_STEPS):
        wanted.append(schedule.get_last_lr()[0])
        reference.step()
        schedule.step()
    assert rates(kind, range(1, NUM_STEPS + 1)) == pytest.approx(wanted)


@pytest.mark.parametrize(("kind", "last"), [("linear", 0.0), ("cosine", 0.0), ("constant", 0.5)])
def test_stays_at_the_curves_end(kind: str, last: float) -> None:
    assert rates(kind, range(NUM_STEPS + 1, 3 * NUM_STEPS)) == pytest.approx([last] * (2 * NUM_STEPS - 1))
