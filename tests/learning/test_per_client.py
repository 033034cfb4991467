"""`per_client`: N clients with a backbone each, merged with the round, are FedAvg of N unsplit models, bit for bit.

The reference is plain transformers, torch and peft: whole models that train apart, each with its own AdamW, and a mean.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, write_text
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler
from unsplit import backward

from benchmarks.replay import quiet_replay
from client_edge.text.batches import Batch, TrainBatches
from client_edge.text.reading import read_examples
from server_backbone.replay import replay
from splitfl.config.own import ClientSection, DataSection
from splitfl.config.trees import ClientConfig, RunConfig
from splitfl.models.trainable import first_adapter_values
from splitfl.telemetry.metrics import read_events

Trained = dict[str, Tensor]
CLIENTS = {"ash": 12, "birch": 6, "cedar": 9}
ROUNDS, STEPS = 2, 3


@dataclass
class Unsplit:
    """One client's whole model, which nobody else touches."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Any
    start: Trained

    @classmethod
    def of(cls, directory: Path, run: RunConfig) -> "Unsplit":
        model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        if run.train.backbone == "lora":
            targets = list(run.lora.target_modules)
            model = get_peft_model(model, LoraConfig(r=run.lora.r, lora_alpha=run.lora.alpha, target_modules=targets))
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    first_adapter_values(name.removeprefix("base_model.model."), parameter.data, run.seed)
        else:
            model.requires_grad_(True)
        named = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = adamw(named, run)
        schedule = get_scheduler("linear", optimizer, run.optimizer.warmup_steps, run.total_steps)
        unsplit = cls(model.train(), named, optimizer, schedule, {})
        unsplit.begin(unsplit.weights(), resets=None)
        return unsplit

    def weights(self) -> Trained:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def begin(self, weights: Trained, *, resets: RunConfig | None) -> None:
        """Begin a round with everyone's weights."""
        self.start = weights
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])
        if resets is not None:
            self.optimizer.state.clear()

    def step(self, batches: Sequence[Batch], run: RunConfig) -> None:
        backward(self.model, batches)
        if run.proximal_mu:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.grad.add_((parameter - self.start[name]).mul_(run.proximal_mu))
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), run.optimizer.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def adamw(parameters: Mapping[str, nn.Parameter], run: RunConfig) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": run.optimizer.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=run.optimizer.learning_rate)


def apart(directory: Path, batches: Mapping[str, TrainBatches], weights: Mapping[str, int], run: RunConfig) -> Trained:
    """Train whole models apart, and average them at the end of each round."""
    models = {name: Unsplit.of(directory, run) for name in batches}
    merged = models["ash"].weights()
    total = sum(weights.values())
    for round_ in range(ROUNDS):
        for name, model in models.items():
            for step in range(round_ * STEPS + 1, (round_ + 1) * STEPS + 1):
                model.step(batches[name].at(step), run)
        for tensor in merged:
            mean = sum(model.weights()[tensor].double() * weights[name] for name, model in models.items()) / total
            merged[tensor] = mean.float()
        resets = run if run.federation.optimizer_state == "reset" else None
        for model in models.values():
            model.begin(dict(merged), resets=resets)
    return merged


def settings(directory: Path, train: str, **federation: Any) -> dict[str, Any]:
    full = train == "full"
    return {
        "seed": 7,
        "model": {"model_name_or_path": str(directory)},
        "train": {
            "bottom": train,
            "top": train,
            "backbone": train,
            "norm_head": full,
            "embeddings": full,
            "loss": "plain",
        },
        "lora": {"target_modules": ["q_proj", "v_proj"]},
        "optimizer": {"learning_rate": 5e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, "warmup_steps": 2},
        "federation": {
            "server_mode": "per_client",
            "num_rounds": ROUNDS,
            "local_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            **federation,
        },
        "text": {"max_seq_length": 32},
        "server": {"export_model": False},
    }


def batches_of(directory: Path, data: Path, client_id: str, run: RunConfig) -> TrainBatches:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    dataset = read_examples(
        data, section=DataSection(), tokenizer=tokenizer, max_seq_length=run.text.max_seq_length, append_eos=True
    )
    return TrainBatches.of(dataset, run, ClientSection(client_id=client_id))


def differing(first: Trained, second: Trained) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize(
    ("train", "federation", "strategy"),
    [
        ("lora", {}, {}),
        ("full", {"optimizer_state": "reset"}, {}),
        ("lora", {"strategy": "FedProx"}, {"proximal_mu": 2.0}),
    ],
    ids=["lora-keep", "full-reset", "lora-prox"],
)
def test_is_fed_avg_of_unsplit_models(
    train: str,
    federation: dict[str, Any],
    strategy: dict[str, Any],
    make_model: Callable[..., Path],
    federate: Callable[..., Finished],
    tmp_path: Path,
) -> None:
    directory = make_model("llama")
    tree = settings(directory, train, min_available_clients=len(CLIENTS), **federation) | {"strategy": strategy}
    run = RunConfig.from_tree({k: v for k, v in tree.items() if k != "server"}, source="test")
    data = {
        name: write_text(tmp_path / f"{name}.txt", num_lines=number, seed=number) for name, number in CLIENTS.items()
    }
    finished = federate(tree, {name: {"path": path, "eval_fraction": 0.0} for name, path in data.items()})
    assert finished.errors == {}
    batches = {name: batches_of(directory, path, name, run) for name, path in data.items()}
    assert differing(load_file(finished.run_dir / "trained.safetensors"), apart(directory, batches, CLIENTS, run)) == []


@pytest.mark.parametrize("train", ["lora", "full"])
def test_one_client_trains_alike_in_every_mode_that_learns(
    train: str, make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path
) -> None:
    directory = make_model("llama")
    data = {"path": write_text(tmp_path / "text.txt", num_lines=12, seed=1), "eval_fraction": 0.25}
    trained = []
    for server_mode in ("per_client", "sequential", "shared"):
        finished = federate(settings(directory, train, server_mode=server_mode), {"clinic": data})
        assert finished.errors == {}
        trained.append(load_file(finished.run_dir / "trained.safetensors"))
    assert differing(trained[0], trained[1]) == []
    assert differing(trained[0], trained[2]) == []


def test_a_client_sees_nothing_of_the_others_before_the_merge(
    make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path
) -> None:
    """Losses of the first round equal a client's alone; of the second round no more."""
    directory = make_model("llama")
    data = {
        name: {"path": write_text(tmp_path / f"{name}.txt", num_lines=number, seed=number), "eval_fraction": 0.0}
        for name, number in CLIENTS.items()
    }
    together = federate(settings(directory, "lora", min_available_clients=len(CLIENTS)), data)
    alone = federate(settings(directory, "lora"), {"ash": data["ash"]})
    assert together.errors == alone.errors == {}

    def losses(finished: Finished) -> list[float]:
        return [event["loss"] for event in steps_of(finished) if event["client_id"] == "ash"]

    assert losses(together)[:STEPS] == losses(alone)[:STEPS]
    assert losses(together)[STEPS:] != losses(alone)[STEPS:]


@pytest.mark.parametrize(
    ("train", "sections"),
    [
        ("lora", {"federation": {"fraction_train": 0.67}}),
        ("full", {"federation": {"fraction_train": 0.67, "optimizer_state": "reset", "strategy": "FedAvgM"}}),
        ("lora", {"federation": {"strategy": "Krum", "weight_by": "num_tokens"}, "merge": {"parts": []}}),
    ],
    ids=["sitting-out", "momentum", "krum-and-personal-ends"],
)
def test_log_and_texts_lead_to_the_same_bits(
    train: str,
    sections: dict[str, Any],
    make_model: Callable[..., Path],
    federate: Callable[..., Finished],
    tmp_path: Path,
) -> None:
    """The log done again meets every snapshot, in the middle of a round too; trained again, every merge is the same."""
    directory = make_model("llama")
    data = {
        name: {"path": write_text(tmp_path / f"{name}.txt", num_lines=number, seed=number), "eval_fraction": 0.0}
        for name, number in CLIENTS.items()
    }
    federation = {"num_rounds": 3, "min_available_clients": len(CLIENTS)} | sections["federation"]
    tree = settings(directory, train, **federation) | {
        "merge": sections.get("merge", {}),
        "storage": {"snapshot_steps": 2, "keep_snapshots": 0, "fsync": "never"},
    }
    finished = federate(tree, data)
    assert finished.errors == {}
    found = replay(finished.run_dir)
    assert (found.problems, found.commits) == ([], len(steps_of(finished)))
    assert found.snapshots_equal > 6
    trees = [{"client": {"client_id": name}, "data": data[name]} for name in CLIENTS]
    replayed = quiet_replay(finished.run_dir, [ClientConfig.from_tree(each, source="test") for each in trees])
    assert replayed.problems == []
    assert len(replayed.merges) == 3
    if "merge" in sections:
        assert all(".layers.1." in name or ".layers.2." in name for name in found_in(finished))


def found_in(finished: Finished) -> Trained:
    return load_file(finished.run_dir / "trained.safetensors")


def steps_of(finished: Finished) -> list[dict[str, Any]]:
    return [event for event in read_events(finished.run_dir / "metrics.jsonl") if event["event"] == "step"]


def test_a_run_ends_with_its_best_round(
    make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path
) -> None:
    """With a learning rate that ruins the model, that is an early one, and the copies since are forgotten."""
    directory = make_model("llama")
    data = {
        name: {"path": write_text(tmp_path / f"{name}.txt", num_lines=12, seed=number), "eval_fraction": 0.25}
        for name, number in CLIENTS.items()
    }
    federation = {"num_rounds": 4, "min_available_clients": 3, "evaluate": "rounds", "load_best_model_at_end": True}
    tree = settings(directory, "lora", **federation)
    tree["optimizer"] = {"learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    finished = federate(tree | {"storage": {"keep_snapshots": 0, "fsync": "never"}}, data)
    assert finished.errors == {}
    report = json.loads((finished.run_dir / "report.json").read_text())
    losses = [each["measures"]["eval_loss"]["mean"] for each in report["federated"] if each["phase"] == "round"]
    assert report["best_round"] == 1 + losses.index(min(losses)) < 4
    assert replay(finished.run_dir).problems == []
