"""SCAFFOLD in a client's part of a model: c - c_i in the gradients of what is merged, settled with the merge."""

from typing import Any

import pytest
import torch
from conftest import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from client_edge.layers.edge import Edge
from splitfl.config.trees import RunConfig
from splitfl.models.cut import Cut

RATE = 0.5
SETTINGS: dict[str, Any] = {
    "federation": {"strategy": "SCAFFOLD", "weight_by": "uniform"},
    "optimizer": {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant"},
}


def edge(**sections: Any) -> Edge:
    torch.manual_seed(0)
    cut = Cut.of(AutoModelForCausalLM.from_config(tiny_config("llama")), bottom_layers=1, top_layers=1)
    return Edge(cut, RunConfig.from_tree({**SETTINGS, **sections}, source="test"), "a", torch.device("cpu"))


def corrections(client: Edge) -> set[float]:
    client.discard()
    client.finish_gradients(1)
    found = {round(float(value), 4) for gradient in client.gradients().values() for value in gradient.unique()}
    client.discard()
    return found


def step(client: Edge, gradient: float, *, clip_coefficient: float = 1.0) -> None:
    """Take a step along gradients that are all the same, corrected."""
    client.set_gradients({name: torch.full_like(layer, gradient) for name, layer in client.layers().items()})
    client.finish_gradients(1)
    client.step(1, clip_coefficient)


def load(client: Edge, control: float, *, counted: bool) -> None:
    """Take over a merge: the layers as they are, and a control."""
    layers = list(client.layers().values())
    client.load([*layers, *(torch.full(layer.shape, control) for layer in layers)], counted=counted)


def test_at_first_there_is_nothing_to_correct() -> None:
    assert corrections(edge()) == {0.0}


def test_a_round_that_counted_leaves_the_mean_gradient_as_its_own() -> None:
    client = edge()
    for gradient in (1.0, 2.0, 6.0):
        step(client, gradient)
    load(client, 10.0, counted=True)
    assert corrections(client) == {7.0}
    step(client, 5.0)  # applied as 5 + 10 - 3 = 12; the 5 are settled
    load(client, 10.0, counted=True)
    assert corrections(client) == {5.0}


def test_what_was_clipped_counts_for_what_it_was_clipped_to() -> None:
    client = edge()
    step(client, 4.0, clip_coefficient=0.25)
    step(client, 1.0, clip_coefficient=0.75)
    load(client, 0.0, counted=True)
    assert corrections(client) == {-1.75}


def test_a_round_that_did_not_count_leaves_its_own_as_it_was() -> None:
    client = edge()
    step(client, 3.0)
    load(client, 10.0, counted=False)
    assert corrections(client) == {10.0}
    step(client, 5.0)  # and the steps that did not count are not counted with the next
    load(client, 10.0, counted=True)
    assert corrections(client) == {5.0}


def test_it_is_added_to_what_is_there_and_before_norms_are_taken() -> None:
    client = edge()
    load(client, 2.0, counted=False)
    client.set_gradients({name: torch.ones_like(layer) for name, layer in client.layers().items()})
    client.finish_gradients(1)
    sizes = [layer.numel() for layer in client.layers().values()]
    assert client.optimizer.norms().tolist() == pytest.approx([3.0 * size**0.5 for size in sizes], rel=1e-5)


def test_a_restart_in_the_middle_of_a_round_changes_nothing() -> None:
    def settled(client: Edge) -> dict[str, Tensor]:
        step(client, 2.0, clip_coefficient=0.5)
        load(client, 1.0, counted=True)
        return {name: tensor.clone() for name, tensor in client.state().items()}

    through, before, after = edge(), edge(), edge()
    for client in (through, before):
        load(client, 2.0, counted=False)
        step(client, 7.0)
    after.restore({name: tensor.clone() for name, tensor in before.state().items()})
    expected, found = settled(through), settled(after)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_not_merged_is_not_corrected() -> None:
    client = edge(merge={"parts": ["top"]})
    load(client, 2.0, counted=False)
    client.discard()
    client.finish_gradients(1)
    assert client.gradients().keys() == client.layers().keys()
    assert all(".layers.0." not in name for name in client.layers())


def test_controls_are_no_part_of_what_is_uploaded_or_compared() -> None:
    client = edge()
    layers, digest = client.layers(), client.merged_digest()
    load(client, 2.0, counted=False)
    assert client.layers().keys() == layers.keys()
    assert client.merged_digest() == digest


def test_no_other_strategy_has_any() -> None:
    client = edge(federation={"strategy": "FedAvg"})
    client.finish_gradients(1)
    assert client.gradients() == {}
    assert not any("control" in name or "round_start" in name for name in client.state())
