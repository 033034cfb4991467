"""A copy of what trains for each client: micro-batches overlap in any order, and a merge ends copies without harm."""

from typing import Any

import pytest
import torch
from conftest import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from server_backbone.compute.blocks_worker import COMMON, Contribution, MicroBatch, Positions
from server_backbone.compute.copies import digest_in, weights_in
from server_backbone.compute.gradient_rules import ClipWhole, rules_of_rounds
from server_backbone.compute.worker import Worker, worker_of
from splitfl.config.trees import RunConfig
from splitfl.models.cut import Cut
from splitfl.models.layout import Layout
from splitfl.models.trainable import choose_trainable, first_adapter_values

LAYOUT = Layout(lengths_B=(5, 5))


def made(train: str = "lora", family: str = "llama", **federation: Any) -> Worker:
    torch.manual_seed(0)
    tree = {"train": {"backbone": train}, "federation": {"server_mode": "per_client", **federation}}
    run = RunConfig.from_tree(tree, source="test")
    cut = Cut.of(AutoModelForCausalLM.from_config(tiny_config(family)), bottom_layers=1, top_layers=1)
    choose_trainable(cut, run)
    cut.fill("server", lambda names, values: first_adapter_values(names[0], values, 0), torch.device("cpu"))
    return worker_of(cut, run, rules_of_rounds(run, cut), torch.device("cpu"))


def hidden(client: str, number: int, batch: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(sum(map(ord, client)) * 100 + number)
    return torch.randn(batch, 5, 32, generator=draw)


def forward(worker: Worker, client: str, number: int, step: int) -> Tensor:
    batch = MicroBatch(
        hidden_BSD=hidden(client, number), layout=LAYOUT, request_id=number, step=step, micro_batch=number % 2
    )
    return worker.forward(client, batch)


def backward(worker: Worker, client: str, number: int) -> Tensor | None:
    return worker.backward(client, number, hidden(client + "'", number)).gradient_BSD


def commit(worker: Worker, client: str, step: int) -> None:
    worker.apply(worker.reduce([contribution(worker, client, step)]))


def contribution(worker: Worker, client: str, step: int) -> Contribution:
    clip = worker._rules[-1]
    assert isinstance(clip, ClipWhole)
    norms = [1.0] * clip.is_here.count(False)
    return Contribution(client_id=client, step=step, num_label_tokens=5, norms_P=norms)


def merge(worker: Worker, *clients: str) -> None:
    """Make the mean of these clients' copies everyone's."""
    copies = [weights_in(worker.state(client)) for client in clients]
    names = weights_in(worker.state(COMMON))
    worker.merged({name: sum(copy[name] for copy in copies) / len(copies) for name in names})


def num_of(worker: Worker) -> int:
    """Return how many tensors train."""
    return len(weights_in(worker.state(COMMON)))


def evaluate(worker: Worker, client: str) -> Tensor:
    return worker.evaluate(client, MicroBatch(hidden_BSD=hidden("x", 1), layout=LAYOUT))


def decode(worker: Worker, client: str, number: int) -> Tensor | str:
    positions = Positions(hidden_BSD=hidden("x", number), lengths_B=(5, 5), beams_B=(0, 1))
    return worker.generations.decode(client, 1, positions)


def two_steps(worker: Worker, client: str) -> list[Tensor | None]:
    """Do what `test_interleaved` does of one client, alone."""
    seen: list[Tensor | None] = []
    for step in (1, 2):
        for number in (2 * step, 2 * step + 1):
            seen.append(forward(worker, client, number, step))
            seen.append(backward(worker, client, number))
        commit(worker, client, step)
    return seen


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_interleaved_clients_are_those_who_run_apart(train: str, family: str) -> None:
    together = made(train, family)
    seen: dict[str, list[Tensor | None]] = {"a": [], "b": []}
    # a's first step runs while b's graphs live, and the other way round
    seen["b"].append(forward(together, "b", 2, 1))
    seen["a"].append(forward(together, "a", 2, 1))
    seen["a"].append(backward(together, "a", 2))
    seen["a"].append(forward(together, "a", 3, 1))
    seen["b"].append(backward(together, "b", 2))
    seen["b"].append(forward(together, "b", 3, 1))
    seen["a"].append(backward(together, "a", 3))
    commit(together, "a", 1)
    seen["a"].append(forward(together, "a", 4, 2))
    seen["b"].append(backward(together, "b", 3))
    commit(together, "b", 1)
    seen["b"].append(forward(together, "b", 4, 2))
    for client, number in (("a", 4), ("b", 4)):
        seen[client].append(backward(together, client, number))
    for client in "ab":
        seen[client].append(forward(together, client, 5, 2))
    for client in "ba":
        seen[client].append(backward(together, client, 5))
    commit(together, "b", 2)
    commit(together, "a", 2)

    for client in "ab":
        alone = made(train, family)
        expected = two_steps(alone, client)
        assert all(torch.equal(x, y) for x, y in zip(seen[client], expected, strict=True) if x is not None)
        assert digest_in(together.state(client)) == digest_in(alone.state(client))
    assert digest_in(together.state("a")) != digest_in(together.state("b"))
    assert digest_in(together.state(COMMON)) == digest_in(made(train, family).state(COMMON))


def test_a_client_evaluates_and_generates_with_its_own() -> None:
    worker = made()
    first = evaluate(worker, "a")
    begun = decode(worker, "b", 1)
    two_steps(worker, "a")
    assert not torch.equal(evaluate(worker, "a"), first)
    assert torch.equal(evaluate(worker, "b"), first)
    assert isinstance(begun, Tensor)
    assert isinstance(decode(worker, "b", 2), Tensor)  # what a learned is not b's affair
    merge(worker, "a")
    assert "has learned since" in str(decode(worker, "b", 3))
    of_all = [evaluate(worker, client) for client in ("a", "b", "new")]
    assert torch.equal(of_all[0], of_all[1])
    assert torch.equal(of_all[0], of_all[2])
    assert not torch.equal(of_all[0], first)


def test_a_merge_under_a_live_graph_harms_nobody() -> None:
    """A late client computes for nothing; its next round begins with the merged weights."""
    worker = made("full")
    two_steps(worker, "a")
    forward(worker, "late", 2, 1)
    merge(worker, "a")
    assert backward(worker, "late", 2) is not None
    forward(worker, "late", 3, 1)
    worker.discard("late")
    merged = digest_in(worker.state(COMMON))
    forward(worker, "late", 6, 3)
    backward(worker, "late", 6)
    assert digest_in(worker.state("late")) == merged
    commit(worker, "late", 3)
    assert digest_in(worker.state("late")) != merged
    assert digest_in(worker.state(COMMON)) == merged


@pytest.mark.parametrize("optimizer_state", ["keep", "reset"])
def test_a_state_leads_back_to_every_copy(optimizer_state: str) -> None:
    worker = made(optimizer_state=optimizer_state)
    two_steps(worker, "a")
    merge(worker, "a")
    assert sum("own/a/" in name for name in worker.state()) == (0 if optimizer_state == "reset" else 3 * num_of(worker))
    two_steps(worker, "b")
    forward(worker, "a", 6, 3)  # has begun a step, and moved nothing yet
    kept = {name: tensor.clone() for name, tensor in worker.state().items()}
    again = made(optimizer_state=optimizer_state)
    again.load(kept)
    assert again.state().keys() == kept.keys()
    worker.discard("a")
    for each in (worker, again):
        for client in "ab":
            forward(each, client, 6, 3)
            backward(each, client, 6)
            commit(each, client, 3)
    after, expected = again.state(), worker.state()
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], expected[name]) for name in after)


def test_a_round_forgets_those_who_are_not_in_it() -> None:
    worker = made()
    for client in ("a", "b"):
        two_steps(worker, client)
    merge(worker, "a", "b")
    worker.begin_round(["b", "c"])
    assert {name.split("/")[1] for name in worker.state() if name.startswith("own/")} == {"b"}


def test_a_step_that_is_reduced_and_not_applied_leaves_nothing() -> None:
    worker = made()
    forward(worker, "a", 2, 1)
    backward(worker, "a", 2)
    before = digest_in(worker.state("a"))
    assert any(gradient.any() for gradient in worker.reduce([contribution(worker, "a", 1)]).gradients.values())
    assert not worker.reduce([contribution(worker, "a", 1)]).gradients
    assert digest_in(worker.state("a")) == before
