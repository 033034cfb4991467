"""Comparing rounds survives crashes: patience counts right, and the run ends with the same best round."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_tokenizer, write_text
from faults.town import Town
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from server_backbone.replay import replay

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "federation__num_rounds": 6,
    "federation__local_steps": 3,
    "federation__evaluate": "rounds",
    "federation__load_best_model_at_end": "true",
    "federation__early_stopping_patience": 2,
    "optimizer__learning_rate": 0.15,
    "optimizer__lr_scheduler_type": "constant",
    "optimizer__max_grad_norm": 0.0,
    "storage__snapshot_steps": 1000,
}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    """Return the same run with nothing happening to it."""
    folder = tmp_path_factory.mktemp("quiet")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    settings = {name.replace("__", "."): value for name, value in SETTINGS.items()}
    town = Town(folder, folder / "model", 2, settings, own=held_out(folder))
    try:
        town.keep_alive()
        yield town
    finally:
        town.end()


def held_out(folder: Path) -> dict[str, Any]:
    return {"data.eval_path": write_text(folder / "held-out.txt", num_lines=8, seed=77)}


def judged(run: Town) -> dict[int, tuple[float, int, int]]:
    return {e["round"]: (e["value"], e["best_round"], e["rounds_without_improvement"]) for e in run.events("judged")}


@pytest.mark.parametrize(
    ("crash", "settings"),
    [
        ({"server": "judge-before-record:2"}, {}),
        ({"server": "judge-after-record:2"}, {}),
        ({"server": "judge-after-record:3"}, {"storage__durability": "snapshot"}),
        ({"server": "end-after-record:1"}, {}),
        ({"server": "end-after-record:1"}, {"storage__durability": "snapshot"}),
        ({"server": "commit-after-apply:8", "clinic-1": "step-applied:13"}, {}),
    ],
    ids=str,
)
def test_the_run_ends_as_if_nothing_had_happened(
    town: Callable[..., Town], tmp_path: Path, quiet: Town, crash: dict[str, str], settings: dict[str, Any]
) -> None:
    run = town(2, own=held_out(tmp_path), crash=crash, **SETTINGS, **settings)
    run.keep_alive()
    assert judged(run) == judged(quiet)
    assert len(judged(quiet)) >= 3
    report, wanted = run.report(), quiet.report()
    assert report["best_round"] == wanted["best_round"]
    assert report["stopped_early"] == wanted["stopped_early"]
    assert report["best_round"] < max(judged(run)), "this test needs a run whose last round is not its best"
    then, now = (load_file(each.run_dir / "trained.safetensors") for each in (quiet, run))
    assert all(torch.equal(now[name], then[name]) for name in then)
    afters = [e for e in run.events("evaluated") if e["phase"] == "after"]
    bests = [e for e in run.events("evaluated") if (e["phase"], e["round"]) == ("round", report["best_round"])]
    assert {(e["client_id"], e["eval_loss"]) for e in afters} == {(e["client_id"], e["eval_loss"]) for e in bests}
    assert replay(run.run_dir).problems == []
