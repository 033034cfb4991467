"""SCAFFOLD on a real split run, some clients a round, against algorithm 1 on whole models in plain torch.

The reference uses nothing of splitfl's but the batches and who was drawn for a round. The backbone is frozen, so each
client's loss is its own and the paper's algorithm applies to the client-side layers as it stands.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, write_text
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from unsplit import backward

from client_edge.text.batches import Batch, TrainBatches
from client_edge.text.reading import read_examples
from splitfl.config.own import DataSection
from splitfl.telemetry.metrics import read_events

CLIENTS = ("ash", "birch", "cedar", "date")
ROUNDS, STEPS, SEED, SERVER_RATE = 4, 3, 5, 0.8
Layers = dict[str, Tensor]


def settings(directory: Path, optimizer: dict[str, Any]) -> dict[str, Any]:
    return {
        "seed": SEED,
        "model": {"model_name_or_path": str(directory)},
        "train": {"bottom": "full", "top": "full", "norm_head": True, "loss": "plain"},
        "optimizer": {"optim": "sgd", **optimizer},
        "federation": {
            "server_mode": "frozen",
            "num_rounds": ROUNDS,
            "local_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "min_available_clients": len(CLIENTS),
            "fraction_train": 0.5,
            "strategy": "SCAFFOLD",
            "weight_by": "uniform",
        },
        "strategy": {"server_learning_rate": SERVER_RATE},
        "server": {"export_model": False},
    }


class Whole:
    """The unsplit model, of which the layers with these names train."""

    def __init__(self, directory: Path, names: list[str]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.parameters = {name: p for name, p in self.model.named_parameters() if name in names}
        assert sorted(self.parameters) == sorted(names)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in names)

    def layers(self) -> Layers:
        return {name: parameter.detach().double() for name, parameter in self.parameters.items()}

    def gradients(self, at: Layers, batches: list[Batch]) -> Layers:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(at[name])
        self.model.zero_grad()
        backward(self.model, batches)
        return {name: p.grad.double() for name, p in self.parameters.items() if p.grad is not None}


def algorithm_1(
    whole: Whole,
    batches: dict[str, TrainBatches],
    drawn: list[list[str]],
    rate: Callable[[int], float],
    max_norm: float,
) -> Layers:
    """Return x after the last round; a clipped step is one of a smaller learning rate."""
    names = list(whole.parameters)
    x = whole.layers()
    c = {name: torch.zeros_like(x[name]) for name in names}
    own = {client: {name: torch.zeros_like(x[name]) for name in names} for client in batches}
    for number, sampled in enumerate(drawn):
        ways, changes = [], []
        for client in sampled:
            y, total = dict(x), 0.0
            for step in range(number * STEPS + 1, (number + 1) * STEPS + 1):
                gradients = whole.gradients(y, list(batches[client].at(step)))
                steps = {name: gradients[name] - own[client][name] + c[name] for name in names}
                norm = float(torch.stack([each.norm() for each in steps.values()]).norm())
                eta = rate(step) * (min(1.0, max_norm / norm) if max_norm else 1.0)
                y = {name: y[name] - eta * steps[name] for name in names}
                total += eta
            new = {name: own[client][name] - c[name] + (x[name] - y[name]) / total for name in names}
            ways.append({name: y[name] - x[name] for name in names})
            changes.append({name: new[name] - own[client][name] for name in names})
            own[client] = new
        share = len(sampled) / len(batches)
        x = {name: x[name] + SERVER_RATE * torch.stack([way[name] for way in ways]).mean(0) for name in names}
        c = {name: c[name] + share * torch.stack([change[name] for change in changes]).mean(0) for name in names}
    return x


@pytest.mark.parametrize(
    ("optimizer", "max_norm"),
    [
        ({"learning_rate": 0.3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}, 0.0),
        ({"learning_rate": 0.3, "lr_scheduler_type": "linear", "max_grad_norm": 0.6}, 0.6),
    ],
)
def test_a_split_run_comes_to_the_same(
    make_model: Callable[..., Path],
    federate: Callable[..., Finished],
    tmp_path: Path,
    optimizer: dict[str, Any],
    max_norm: float,
) -> None:
    directory = make_model("llama")
    texts = {
        client: write_text(tmp_path / f"{client}.txt", num_lines=9 + number, seed=number)
        for number, client in enumerate(CLIENTS)
    }
    finished = federate(
        settings(directory, optimizer), {client: {"path": text, "eval_fraction": 0.0} for client, text in texts.items()}
    )
    assert finished.errors == {}
    trained = load_file(finished.run_dir / "trained.safetensors")
    events = list(read_events(finished.run_dir / "metrics.jsonl"))
    drawn = [event["trainers"] for event in events if event["event"] == "round_opened"]
    assert [len(trainers) for trainers in drawn] == [2] * ROUNDS
    assert len(set().union(*drawn)) > 2  # somebody trained whose controls had been waiting

    tokenizer = AutoTokenizer.from_pretrained(directory)
    batches = {
        client: TrainBatches(
            read_examples(text, section=DataSection(), tokenizer=tokenizer, max_seq_length=512, append_eos=True),
            seed=SEED,
            client_id=client,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )
        for client, text in texts.items()
    }
    total_steps, peak = ROUNDS * STEPS, optimizer["learning_rate"]

    def rate(step: int) -> float:
        return peak if optimizer["lr_scheduler_type"] == "constant" else peak * (total_steps - step + 1) / total_steps

    whole = Whole(directory, list(trained))
    before = whole.layers()
    expected = algorithm_1(whole, batches, drawn, rate, max_norm)
    moved = max(float((expected[name] - before[name]).abs().max()) for name in expected)
    off = max(float((trained[name].double() - expected[name]).abs().max()) for name in expected)
    assert moved > 0.05
    assert off < 2e-6, off
