"""The top's share of a step is put off while the server waits for the bottom, and nothing ever sees that."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from client_edge.layers.edge import Edge
from splitfl.config.trees import RunConfig
from splitfl.models.cut import Cut

IDS_BS = torch.arange(3, 11).reshape(1, 8)


def straight_on(hidden_BSD: Tensor, _mask: Tensor | None, _positions: Tensor | None, *, training: bool) -> Tensor:
    return hidden_BSD


def logits_of(client: Edge) -> Tensor:
    model = client.model(straight_on).eval()
    with torch.no_grad():
        logits_BSV: Tensor = model(IDS_BS, use_cache=False).logits
    return logits_BSV


@pytest.fixture
def stepped() -> Callable[[], Edge]:
    def build() -> Edge:
        torch.manual_seed(0)
        cut = Cut.of(AutoModelForCausalLM.from_config(tiny_config("llama")), bottom_layers=1, top_layers=1)
        client = Edge(cut, RunConfig.from_tree({}, source="test"), "a", torch.device("cpu"))
        client.set_gradients({name: torch.ones_like(layer) for name, layer in client.layers().items()})
        client.step(1, 1.0)
        return client

    return build


def test_a_moment_of_waiting_is_used(stepped: Callable[[], Edge]) -> None:
    client = stepped()
    weights = {id(p): p.detach().clone() for p in client.model(straight_on).lm_head.parameters()}
    client.catch_up()
    assert all(not torch.equal(weights[id(p)], p) for p in client.model(straight_on).lm_head.parameters())


@pytest.mark.parametrize("reader", [Edge.digest, Edge.merged_digest, logits_of, lambda client: str(client.layers())])
def test_who_reads_the_weights_finds_the_whole_step(stepped: Callable[[], Edge], reader: Callable[[Edge], Any]) -> None:
    at_once, caught_up = stepped(), stepped()
    caught_up.catch_up()
    found, expected = reader(at_once), reader(caught_up)
    assert torch.equal(found, expected) if isinstance(found, Tensor) else found == expected
