"""A run on packed rows equals the unsplit model on the same rows bit for bit, each example once an epoch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, write_text
from parity.test_parity import batches_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.replay import quiet_replay
from client_edge.text.batches import Batch, TrainBatches
from splitfl.config.trees import ClientConfig, RunConfig
from splitfl.errors import ModelError

STEPS = 4
FULL = {"bottom": "full", "top": "full", "backbone": "full", "norm_head": True, "embeddings": True, "loss": "plain"}
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def settings(directory: Path, **text: Any) -> dict[str, Any]:
    return {
        "seed": 7,
        "model": {"model_name_or_path": str(directory)},
        "train": FULL,
        "optimizer": SGD,
        "federation": {"num_rounds": 2, "local_steps": STEPS // 2, "per_device_train_batch_size": 2},
        "text": {"max_seq_length": 24, "packing": True, **text},
        "storage": {"keep_snapshots": 0},
    }


def run_config(tree: dict[str, Any]) -> RunConfig:
    return RunConfig.from_tree({name: value for name, value in tree.items() if name != "server"}, source="test")


def positions_of(batch: Batch) -> torch.Tensor:
    """Count from 0 in each example, and in what pads a row, by the loop that nobody can get wrong."""
    lengths = iter(batch.example_lengths)
    rows = []
    for filled in batch.lengths_B:
        row: list[int] = []
        while len(row) < filled:
            row += range(next(lengths))
        rows.append(row + list(range(batch.input_ids_BS.shape[1] - filled)))
    return torch.tensor(rows)


def reference(directory: Path, attention: str, batches: TrainBatches) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train the whole model with plain SGD on the same rows."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention)
    optimizer = torch.optim.SGD(model.parameters(), lr=SGD["learning_rate"])
    losses = []
    for step in range(1, STEPS + 1):
        tokens = sum(batch.num_label_tokens for batch in batches.at(step))
        share = 0.0
        for batch in batches.at(step):
            inputs = {"input_ids": batch.input_ids_BS, "labels": batch.labels_BS, "position_ids": positions_of(batch)}
            loss = model.train()(**inputs, num_items_in_batch=tokens, use_cache=False).loss
            loss.backward()
            share += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(share)
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == kind]


CASES = [("llama", "sdpa"), ("gpt2", "eager"), ("gemma2", "eager"), ("gemma3_text", "sdpa")]


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_a_run_equals_the_unsplit_model(
    family: str, attention: str, make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path
) -> None:
    directory = make_model(family)
    data = write_text(tmp_path / "text.txt", num_lines=40, seed=3, lengths=(2, 16))
    tree = settings(directory)
    tree["model"]["attn_implementation"] = attention
    batches = batches_of(directory, data, run_config(tree))
    assert any(len(batch.example_lengths) > len(batch.lengths_B) for batch in batches.at(1))

    finished = federate(tree, {"clinic": {"path": data, "eval_fraction": 0.0}}, transport="tcp")

    assert finished.errors == {}
    losses, whole = reference(directory, attention, batches)
    assert [event["loss"] for event in events_of(finished.folders["clinic"], "step")] == losses
    split = load_file(finished.run_dir / "trained.safetensors")
    assert [name for name in whole if not torch.equal(split[name], whole[name])] == []


def test_a_run_tells_its_padding_and_counts_examples(
    make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path
) -> None:
    directory = make_model()
    data = write_text(tmp_path / "text.txt", num_lines=40, seed=3, lengths=(2, 16))
    shares = {}
    for packing in (False, True):
        tree = settings(directory, packing=packing)
        clients = {"clinic": {"path": data, "eval_fraction": 0.0}}
        finished = federate(tree, clients)
        assert finished.errors == {}
        batches = batches_of(directory, data, run_config(tree))
        sent = [batch for step in range(1, STEPS + 1) for batch in batches.at(step)]
        tokens, positions = (sum(getattr(batch, name) for batch in sent) for name in ("num_tokens", "num_positions"))
        report = json.loads((finished.run_dir / "report.json").read_text())
        (client,) = report["clients"]
        shares[packing] = client["padding_share"]
        assert client["padding_share"] == pytest.approx(1 - tokens / positions)
        assert client["num_examples"] == 40
        for folder in (finished.run_dir, finished.folders["clinic"]):
            steps = events_of(folder, "step")
            assert sum(event["num_tokens"] for event in steps) == tokens
            assert sum(event["num_positions"] for event in steps) == positions
        assert [merge["clients"] for merge in report["merges"]] == [{"clinic": 40}] * 2
    assert shares[True] < shares[False] / 2


@pytest.mark.parametrize("server_mode", ["shared", "per_client"])
def test_a_quiet_replay_of_a_run_on_packed_rows(
    server_mode: str, make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path
) -> None:
    directory = make_model()
    paths = {name: write_text(tmp_path / f"{name}.txt", num_lines=30, seed=at) for at, name in enumerate("ab")}
    tree = settings(directory, train_sampling_strategy="group_by_length")
    tree["federation"] |= {"min_available_clients": 2, "server_mode": server_mode}
    clients = {name: {"path": path, "eval_fraction": 0.0} for name, path in paths.items()}

    finished = federate(tree, clients)

    assert finished.errors == {}
    configs = [
        ClientConfig.from_tree({"client": {"client_id": name}, "data": clients[name]}, source="test") for name in "ab"
    ]
    replayed = quiet_replay(finished.run_dir, configs)
    assert replayed.problems == []
    assert len(replayed.server) == (STEPS if server_mode == "shared" else 2 * STEPS)
    assert len(replayed.merges) == 2


def test_a_family_that_cannot_is_refused_before_anybody_joins(
    make_model: Callable[..., Path], federate: Callable[..., Finished]
) -> None:
    finished = federate(settings(make_model("bloom")), {})
    (error,) = finished.errors.values()
    assert isinstance(error, ModelError)
    assert str(error) == "bloom attends across the examples that share a row: set text.packing to false"
    assert not (finished.run_dir / "config.toml").exists()


def test_a_client_that_cannot_is_refused(
    make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's blocks pass; another version of the library on the client would be found by its own check."""

    def refuse(base: object, *, max_seq_length: int) -> None:
        raise ModelError("no")

    monkeypatch.setattr("client_edge.layers.edge.check_packing", refuse)
    data = write_text(tmp_path / "text.txt", num_lines=4, seed=3)
    tree = settings(make_model())
    tree["federation"] |= {"wait_timeout": 2.0}
    finished = federate(tree, {"clinic": {"path": data, "eval_fraction": 0.0}})
    assert isinstance(finished.errors["clinic"], ModelError)
