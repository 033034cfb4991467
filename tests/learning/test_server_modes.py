"""The three server modes on real runs, and evaluation that leaves no trace."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, write_text
from safetensors.torch import load_file

from splitfl.telemetry.metrics import read_events


@pytest.fixture
def train(
    make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path
) -> Callable[..., tuple[Finished, dict[str, torch.Tensor]]]:
    """Train one model with these federation settings; returns what is left and what was trained."""

    def run(
        clients: int, data: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **federation: Any
    ) -> tuple[Finished, dict[str, torch.Tensor]]:
        directory = make_model("llama", name=f"model-{len(list(tmp_path.iterdir()))}", **(model or {}))
        finished = federate(
            {
                "model": {"model_name_or_path": str(directory)},
                "optimizer": {"learning_rate": 1e-2},
                "federation": {
                    "num_rounds": 2,
                    "local_steps": 3,
                    "per_device_train_batch_size": 2,
                    "min_available_clients": clients,
                    **federation,
                },
                "server": {"export_model": False},
            },
            {
                f"clinic-{number}": {
                    "path": write_text(tmp_path / f"{number}.txt", num_lines=12, seed=number),
                    **(data or {"eval_fraction": 0.25}),
                }
                for number in range(clients)
            },
        )
        assert finished.errors == {}
        return finished, load_file(finished.run_dir / "trained.safetensors")

    return run


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def steps_of(finished: Finished) -> list[dict[str, Any]]:
    return [event for event in read_events(finished.run_dir / "metrics.jsonl") if event["event"] == "step"]


def test_one_client_trains_alike_in_shared_and_sequential(train: Callable[..., Any]) -> None:
    _, shared = train(1, server_mode="shared")
    _, sequential = train(1, server_mode="sequential")
    assert equal(shared, sequential)


def test_shared_commits_a_step_once_for_all_clients(train: Callable[..., Any]) -> None:
    finished, _ = train(3, server_mode="shared")
    steps = steps_of(finished)
    assert len(steps) == 3 * 6
    assert sorted({step["commit_number"] for step in steps}) == list(range(1, 7))


def test_sequential_commits_each_clients_step_by_itself(train: Callable[..., Any]) -> None:
    finished, _ = train(3, server_mode="sequential")
    steps = steps_of(finished)
    assert [step["commit_number"] for step in steps] == list(range(1, 19))


def test_frozen_trains_the_clients_alone(train: Callable[..., Any]) -> None:
    _, shared = train(2, server_mode="shared")
    finished, frozen = train(2, server_mode="frozen")
    assert frozen.keys() < shared.keys()
    assert all(".layers.0." in name or ".layers.3." in name for name in frozen)
    assert len(steps_of(finished)) == 2 * 6


def test_a_shared_run_repeats_bit_for_bit(train: Callable[..., Any]) -> None:
    assert equal(train(3, server_mode="shared")[1], train(3, server_mode="shared")[1])


def test_evaluation_leaves_no_trace(train: Callable[..., Any]) -> None:
    """With dropout on, a single draw or step taken by an evaluation would change what is trained.

    One micro-batch a step: server and client are threads of one process here and share torch's generator.
    """
    train = functools.partial(train, gradient_accumulation_steps=1)
    model = {"attention_dropout": 0.2}
    never = {"eval_path": None, "eval_fraction": 0.0}
    finished, without = train(1, model=model, data=never)
    # the same training text, and another file for evaluation
    other = finished.run_dir.parent.parent / "other.txt"
    write_text(other, num_lines=5, seed=99)
    evaluated, with_evaluation = train(1, model=model, data={"eval_path": other}, evaluate="rounds")
    phases = [e["phase"] for e in read_events(evaluated.run_dir / "metrics.jsonl") if e["event"] == "evaluated"]
    assert phases == ["before", "round", "after"]
    assert equal(without, with_evaluation)
    _, dry = train(1, data=never)
    assert not equal(without, dry)  # the dropout was on


def test_merged_layers_are_equal_on_all_clients_and_the_report_says_so(train: Callable[..., Any]) -> None:
    finished, _ = train(3)
    report = json.loads((finished.run_dir / "report.json").read_text())
    assert [merge["equal"] for merge in report["merges"]] == [True, True]
    digests = [merge["digest"] for merge in report["merges"]]
    assert len(set(digests)) == 2
    assert all(set(merge["client_digests"].values()) == {merge["digest"]} for merge in report["merges"])
    assert report["steps"] == 6
    assert report["num_rounds"] == 2
    assert all(client["peak_rss_bytes"] > 0 and client["bytes_sent"] > 0 for client in report["clients"])
