"""The worker's share of a step that several clients take together."""

import pytest
import torch
from conftest import tiny_config
from transformers import AutoModelForCausalLM

from server_backbone.worker import Contribution, Worker
from splitfl.config import RunConfig
from splitfl.models.cut import Cut
from splitfl.models.trainable import choose_trainable


@pytest.mark.parametrize("claimed", [1e20, 3.0])
def test_whoever_claims_huge_norms_does_not_stop_the_others(claimed: float) -> None:
    """By default nobody's norm counts for more than 10 where steps are clipped to 1."""
    torch.manual_seed(0)
    run = RunConfig()
    cut = Cut.of(AutoModelForCausalLM.from_config(tiny_config("llama")), bottom_layers=1, top_layers=1)
    choose_trainable(cut, run)
    worker = Worker(cut, run, torch.device("cpu"))
    num_tensors = len(cut.trainable("client"))
    norms = {"honest": [0.0] * num_tensors, "mallory": [claimed] + [-1.0] * (num_tensors - 1)}
    coefficient, _ = worker.reduce(
        [Contribution(slot=name, step=1, num_label_tokens=5, norms_P=each) for name, each in norms.items()]
    )
    assert coefficient == pytest.approx(1 / (min(claimed, 10.0) / 2), rel=1e-3)
