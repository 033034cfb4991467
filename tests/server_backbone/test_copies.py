"""A copy of what trains for each client: micro-batches overlap in any order, and a merge ends copies without harm."""

from typing import Any

import pytest
import torch
from conftest import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from server_backbone.compute.worker import Contribution, Worker
from splitfl.config.trees import RunConfig
from splitfl.models.cut import Cut
from splitfl.models.layout import Layout
from splitfl.models.trainable import choose_trainable, first_adapter_values

LAYOUT = Layout(lengths_B=(5, 5))


def worker_of(train: str = "lora", family: str = "llama", **federation: Any) -> Worker:
    torch.manual_seed(0)
    tree = {"train": {"backbone": train}, "federation": {"server_mode": "per_client", **federation}}
    run = RunConfig.from_tree(tree, source="test")
    cut = Cut.of(AutoModelForCausalLM.from_config(tiny_config(family)), bottom_layers=1, top_layers=1)
    choose_trainable(cut, run)
    cut.fill("server", lambda names, values: first_adapter_values(names[0], values, 0), torch.device("cpu"))
    return Worker(cut, run, torch.device("cpu"))


def hidden(client: str, number: int, batch: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(sum(map(ord, client)) * 100 + number)
    return torch.randn(batch, 5, 32, generator=draw)


def forward(worker: Worker, client: str, number: int, step: int) -> Tensor:
    return worker.forward(client, number, hidden(client, number), LAYOUT, step=step, micro_batch=number % 2)


def backward(worker: Worker, client: str, number: int) -> Tensor | None:
    return worker.backward(client, number, hidden(client + "'", number))


def commit(worker: Worker, client: str, step: int) -> None:
    worker.reduce([contribution(worker, client, step)])
    assert worker.apply()


def contribution(worker: Worker, client: str, step: int) -> Contribution:
    norms = [1.0] * worker._is_mine.count(False)
    return Contribution(slot=client, step=step, num_label_tokens=5, norms_P=norms)


def merge(worker: Worker, *clients: str) -> None:
    """Make the mean of these clients' copies everyone's."""
    copies = [worker.to_merge(client) for client in clients]
    worker.merged({name: sum(copy[name] for copy in copies) / len(copies) for name in worker.before_merge()})


def num_of(worker: Worker) -> int:
    """Return how many tensors train."""
    return len(worker.trained())


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
    together = worker_of(train, family)
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
        alone = worker_of(train, family)
        expected = two_steps(alone, client)
        assert all(torch.equal(x, y) for x, y in zip(seen[client], expected, strict=True) if x is not None)
        assert together.digest(client) == alone.digest(client)
    assert together.digest("a") != together.digest("b")
    assert together.digest() == worker_of(train, family).digest()


def test_a_client_evaluates_and_generates_with_its_own() -> None:
    worker = worker_of()
    first = worker.evaluate("a", hidden("x", 1), LAYOUT)
    begun = worker.decode("b", 1, hidden("x", 1), (5, 5), (0, 1))
    two_steps(worker, "a")
    assert not torch.equal(worker.evaluate("a", hidden("x", 1), LAYOUT), first)
    assert torch.equal(worker.evaluate("b", hidden("x", 1), LAYOUT), first)
    assert isinstance(begun, Tensor)
    assert isinstance(worker.decode("b", 1, hidden("x", 2), (5, 5), (0, 1)), Tensor)  # what a learned is not b's affair
    merge(worker, "a")
    assert "has learned since" in str(worker.decode("b", 1, hidden("x", 3), (5, 5), (0, 1)))
    of_all = [worker.evaluate(client, hidden("x", 1), LAYOUT) for client in ("a", "b", "new")]
    assert torch.equal(of_all[0], of_all[1])
    assert torch.equal(of_all[0], of_all[2])
    assert not torch.equal(of_all[0], first)


def test_a_merge_under_a_live_graph_harms_nobody() -> None:
    """Whoever is late computes for nothing; its next round begins with the merged weights."""
    worker = worker_of("full")
    two_steps(worker, "a")
    forward(worker, "late", 2, 1)
    merge(worker, "a")
    assert backward(worker, "late", 2) is not None
    forward(worker, "late", 3, 1)
    worker.discard("late")
    merged = worker.digest()
    forward(worker, "late", 6, 3)
    backward(worker, "late", 6)
    assert worker.digest("late") == merged
    commit(worker, "late", 3)
    assert worker.digest("late") != merged
    assert worker.digest() == merged


@pytest.mark.parametrize("optimizer_state", ["keep", "reset"])
def test_a_state_leads_back_to_every_copy(optimizer_state: str) -> None:
    worker = worker_of(optimizer_state=optimizer_state)
    two_steps(worker, "a")
    merge(worker, "a")
    assert sum("own/a/" in name for name in worker.state()) == (0 if optimizer_state == "reset" else 3 * num_of(worker))
    two_steps(worker, "b")
    forward(worker, "a", 6, 3)  # has begun a step, and moved nothing yet
    kept = {name: tensor.clone() for name, tensor in worker.state().items()}
    again = worker_of(optimizer_state=optimizer_state)
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
    worker = worker_of()
    for client in ("a", "b"):
        two_steps(worker, client)
    merge(worker, "a", "b")
    worker.begin_round(["b", "c"])
    assert {name.split("/")[1] for name in worker.state() if name.startswith("own/")} == {"b"}


def test_a_step_that_cannot_be_written_is_withdrawn() -> None:
    worker = worker_of()
    forward(worker, "a", 2, 1)
    backward(worker, "a", 2)
    before = worker.digest("a")
    worker.reduce([contribution(worker, "a", 1)])
    worker.withdraw()
    assert not worker.apply()
    assert worker.digest("a") == before
