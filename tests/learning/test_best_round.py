"""Runs that end early, and with their best round: what is exported, held and said is of that round."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, tiny_tokenizer, write_text
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from splitfl.telemetry.metrics import Event, read_events


@pytest.fixture
def run(make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path) -> Callable[..., Finished]:
    """Train two clients that learn too fast to get better for long."""

    def go(clients: int = 2, sections: dict[str, Any] | None = None, **federation: Any) -> Finished:
        tree = {
            "model": {"model_name_or_path": str(make_model("llama", name=f"m{len(list(tmp_path.iterdir()))}"))},
            "optimizer": {"learning_rate": 0.15, "lr_scheduler_type": "constant", "max_grad_norm": 0.0},
            "federation": {
                "num_rounds": 5,
                "local_steps": 3,
                "per_device_train_batch_size": 4,
                "min_available_clients": clients,
                "evaluate": "rounds",
                **federation,
            },
            **(sections or {}),
        }
        finished = federate(
            tree,
            {
                f"clinic-{number}": {
                    "path": write_text(tmp_path / f"{number}.txt", num_lines=12, seed=number),
                    "eval_path": write_text(tmp_path / f"held-{number}.txt", num_lines=6 + number, seed=9 + number),
                }
                for number in range(clients)
            },
        )
        assert finished.errors == {}
        return finished

    return go


def named(finished: Finished, name: str) -> list[Event]:
    return [event for event in read_events(finished.run_dir / "metrics.jsonl") if event["event"] == name]


def losses(finished: Finished, phase: str) -> dict[tuple[int, str], float]:
    return {
        (event["round"], event["client_id"]): event["eval_loss"]
        for event in named(finished, "evaluated")
        if event["phase"] == phase
    }


def value(finished: Finished, round_number: int) -> float:
    """Weigh the clients' losses of a round by their label tokens."""
    found = [e for e in named(finished, "evaluated") if e["phase"] != "before" and e["round"] == round_number]
    tokens = sum(event["num_eval_tokens"] for event in found)
    return sum(event["eval_loss"] * event["num_eval_tokens"] for event in found) / tokens


def test_the_run_ends_with_its_best_round(run: Callable[..., Finished]) -> None:
    finished = run(load_best_model_at_end=True)
    judged = named(finished, "judged")
    assert [event["round"] for event in judged] == [1, 2, 3, 4, 5]
    assert [event["value"] for event in judged] == pytest.approx([value(finished, n) for n in range(1, 6)])
    best = min(range(1, 6), key=lambda number: value(finished, number))
    assert best < 5, "this test needs a run whose last round is not its best"
    (ended,) = named(finished, "rounds_ended")
    assert (ended["best_round"], ended["reason"], ended["round"]) == (best, "", 5)
    # what clients hold at the end is what they held after the best round, and the backbone is of that moment too
    after, then = losses(finished, "after"), losses(finished, "round")
    assert set(after) == {(best, "clinic-0"), (best, "clinic-1")}
    assert after == {key: then[key] for key in after}
    report = json.loads((finished.run_dir / "report.json").read_text())
    assert (report["best_round"], report["complete"], report["num_rounds"]) == (best, True, 5)
    assert not list(finished.run_dir.glob("best-*"))


def test_scaffold_ends_with_its_best_round(run: Callable[..., Finished]) -> None:
    """Its merged layers come with controls, the best round's as well."""
    sgd = {
        "learning_rate": 4.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "weight_decay": 0,
    }
    finished = run(
        sections={"optimizer": sgd}, load_best_model_at_end=True, strategy="SCAFFOLD", weight_by="uniform", num_rounds=8
    )
    (ended,) = named(finished, "rounds_ended")
    assert 0 < ended["best_round"] < 8, "this test needs a run whose last round is not its best"
    after, then = losses(finished, "after"), losses(finished, "round")
    assert after == {(ended["best_round"], name): then[ended["best_round"], name] for name in ("clinic-0", "clinic-1")}


def test_the_exported_model_is_of_the_best_round(run: Callable[..., Finished], tmp_path: Path) -> None:
    finished = run(load_best_model_at_end=True)
    model = AutoModelForCausalLM.from_pretrained(finished.run_dir / "model").eval()
    for (_, client_id), wanted in losses(finished, "after").items():
        total, count = 0.0, 0
        for line in (tmp_path / f"held-{client_id[-1]}.txt").read_text().splitlines():
            ids = torch.tensor([[*tiny_tokenizer()(line, add_special_tokens=False)["input_ids"], 2]])
            with torch.no_grad():
                total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        assert total / count == pytest.approx(wanted, rel=1e-5)


def test_patience_ends_the_run_early_with_the_last_merge(run: Callable[..., Finished]) -> None:
    whole, stopped = run(num_rounds=6), run(num_rounds=6, early_stopping_patience=1)
    assert named(whole, "judged") == []
    judged = named(stopped, "judged")
    last = next(n for n in range(2, 7) if value(whole, n) >= min(value(whole, m) for m in range(1, n)))
    assert last < 6, "this test needs a run that gets worse before its end"
    assert judged[-1]["round"] == last
    assert judged[-1]["rounds_without_improvement"] == 1
    (ended,) = named(stopped, "rounds_ended")
    assert ended["reason"].startswith("eval_loss has not improved for 1 round (early_stopping_patience = 1)")
    assert ended["best_round"] == 0
    report = json.loads((stopped.run_dir / "report.json").read_text())
    assert (report["complete"], report["num_rounds"], report["num_rounds_planned"]) == (True, last, 6)
    assert report["stopped_early"] == ended["reason"]
    # up to there it is the run that does not stop: comparing leaves no trace
    then = {key: loss for key, loss in losses(whole, "round").items() if key[0] <= last}
    assert len(then) == 2 * last
    assert losses(stopped, "round") == then
    assert set(losses(stopped, "after").values()) == {loss for key, loss in then.items() if key[0] == last}
    assert (stopped.run_dir / "finished").exists()
    assert (stopped.run_dir / "model" / "config.json").exists()


def test_early_and_with_the_best(run: Callable[..., Finished]) -> None:
    finished = run(early_stopping_patience=2, load_best_model_at_end=True, metric_for_best_model="token_accuracy")
    (ended,) = named(finished, "rounds_ended")
    best = named(finished, "judged")[-1]["best_round"]
    assert ended["best_round"] == best
    accuracies = {
        e["client_id"]: e["token_accuracy"]
        for e in named(finished, "evaluated")
        if (e["phase"], e["round"]) == ("round", best)
    }
    assert accuracies == {
        e["client_id"]: e["token_accuracy"] for e in named(finished, "evaluated") if e["phase"] == "after"
    }


@pytest.mark.parametrize("federation", [{"server_mode": "frozen"}, {"server_mode": "sequential"}])
def test_in_other_server_modes(run: Callable[..., Finished], federation: dict[str, Any]) -> None:
    finished = run(1, load_best_model_at_end=True, num_rounds=3, **federation)
    (ended,) = named(finished, "rounds_ended")
    after, then = losses(finished, "after"), losses(finished, "round")
    assert after == {key: then[key] for key in after}
    assert {key[0] for key in after} == {ended["best_round"]}
    trained = load_file(finished.run_dir / "trained.safetensors")
    assert trained


def test_nobody_measures(make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path) -> None:
    data = {"path": write_text(tmp_path / "a.txt", num_lines=8, seed=1), "eval_fraction": 0.0}
    finished = federate(
        {
            "model": {"model_name_or_path": str(make_model())},
            "federation": {
                "num_rounds": 2,
                "local_steps": 1,
                "evaluate": "rounds",
                "early_stopping_patience": 1,
                "load_best_model_at_end": True,
            },
        },
        {"clinic": data},
    )
    assert finished.errors == {}
    assert [event["value"] for event in named(finished, "judged")] == [None, None]
    report = json.loads((finished.run_dir / "report.json").read_text())
    assert (report["num_rounds"], report["best_round"], report["complete"]) == (2, None, True)
