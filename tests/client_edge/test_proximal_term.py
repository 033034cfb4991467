"""FedProx on the client: mu (w - w0) in the gradients, w0 being what the last merge brought, across a restart."""

from typing import Any

import pytest
import torch
from conftest import tiny_config
from transformers import AutoModelForCausalLM

from client_edge.layers.edge import Edge
from splitfl.config.trees import RunConfig
from splitfl.models.cut import Cut


def edge(**sections: Any) -> Edge:
    torch.manual_seed(0)
    cut = Cut.of(AutoModelForCausalLM.from_config(tiny_config("llama")), bottom_layers=1, top_layers=1)
    prox = {"federation": {"strategy": "FedProx"}, "strategy": {"proximal_mu": 0.5}}
    return Edge(cut, RunConfig.from_tree({**prox, **sections}, source="test"), "a", torch.device("cpu"))


def moved(client: Edge, by: float) -> None:
    """Change the merged weights, as steps would."""
    state = client.state()
    with torch.no_grad():
        for name in client.layers():
            state[name].add_(by)


def pulls(client: Edge) -> set[float]:
    client.discard()
    client.finish_gradients(1)
    return {round(float(value), 5) for gradient in client.gradients().values() for value in gradient.unique()}


def test_the_pull_is_mu_times_the_way_from_the_last_merge() -> None:
    client = edge()
    assert pulls(client) == {0.0}
    moved(client, 2.0)
    assert pulls(client) == {1.0}
    client.load(list(client.layers().values()))
    assert pulls(client) == {0.0}


def test_it_is_added_to_what_is_there() -> None:
    client = edge()
    moved(client, 2.0)
    client.set_gradients({name: torch.ones_like(layer) for name, layer in client.layers().items()})
    client.finish_gradients(1)
    assert all(torch.allclose(gradient, torch.tensor(2.0)) for gradient in client.gradients().values())


def test_a_restart_knows_where_the_round_began() -> None:
    before, after = edge(), edge()
    moved(before, 2.0)
    after.restore({name: tensor.clone() for name, tensor in before.state().items()})
    assert pulls(after) == {1.0}


def test_what_is_not_merged_is_not_pulled() -> None:
    client = edge(merge={"parts": ["top"]})
    client.discard()
    client.finish_gradients(1)
    assert client.gradients().keys() == client.layers().keys()
    assert all(".layers.0." not in name and "embed" not in name for name in client.layers())


@pytest.mark.parametrize(
    "sections", [{"strategy": {"proximal_mu": 0.0}}, {"federation": {"strategy": "FedAvg"}, "strategy": {}}]
)
def test_without_it_no_gradient_appears(sections: dict[str, Any]) -> None:
    client = edge(**sections)
    client.finish_gradients(1)
    assert client.gradients() == {}
    assert not any(name.startswith("round_start/") for name in client.state())
