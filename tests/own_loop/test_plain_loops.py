"""A torch loop of the user's own on a model from `connect` gives the unsplit model's losses and weights, bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from own_loop.host import FULL, Host, batches, differing, in_steps, parameters_of, trained_of, whole_model

import client_edge

ADAMW = {"lr": 5e-3, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("train", "tied", "blocks", "side", "every", "clip"),
    [
        ("lora", False, (1, 1), "right", 1, 0.5),
        ("full", True, (1, 1), "left", 2, 0.5),
        ("full", False, (0, 0), "right", 2, 0.0),
    ],
)
def test_equals_the_unsplit_model(
    train: str,
    tied: bool,
    blocks: tuple[int, int],
    side: str,
    every: int,
    clip: float,
    host: Callable[..., Host],
    tmp_path: Path,
) -> None:
    server = host(
        model={"tie_word_embeddings": tied},
        train=FULL if train == "full" else {},
        **{"model_": {}},
    )
    raise NotImplementedError
