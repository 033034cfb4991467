"""Which schedule a commit was made with: that of the last start before it, also after a rollback."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.replay import Horizon, horizon_of, horizons
from splitfl.config.trees import RunConfig


def started(num_training_steps: int, *, resumed_at: int | None = None) -> list[dict[str, Any]]:
    """Return the events of a start."""
    settings = {"optimizer": {"num_training_steps": num_training_steps}}
    events: list[dict[str, Any]] = [
        {"event": "run_started", "resumed": resumed_at is not None, "settings": settings},
    ]
    return events if resumed_at is None else [*events, {"event": "resumed", "commit_number": resumed_at}]


def written(folder: Path, events: list[dict[str, Any]]) -> Path:
    lines = [json.dumps({"time": 0.0, **event}) for event in events]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("events", "wanted"),
    [
        (started(40), {1: 40, 20: 40}),
        ([*started(20), *started(30, resumed_at=15)], {1: 20, 15: 20, 16: 30, 40: 30}),
        # killed before its first commit, and before it could say where it goes on
        ([*started(20), *started(30, resumed_at=0)], {1: 30}),
        ([*started(20), *started(30, resumed_at=9)[:1], *started(40, resumed_at=9)], {9: 20, 10: 40}),
        # rolled back from commit 20 to commit 8: what came later was made again
        ([*started(20), *started(30, resumed_at=15), *started(40, resumed_at=8)], {8: 20, 9: 40, 16: 40, 20: 40}),
    ],
)
def test_the_horizon_of_a_commit(tmp_path: Path, events: list[dict[str, Any]], wanted: dict[int, int]) -> None:
    found = horizons(written(tmp_path, events), RunConfig())
    assert {number: horizon_of(number, found) for number in wanted} == wanted


def test_without_events_the_settings_tell(tmp_path: Path) -> None:
    run = RunConfig.from_tree({"optimizer": {"num_training_steps": 7}}, source="test")
    assert horizons(tmp_path, run) == [Horizon(after_commit=0, num_training_steps=7)]
