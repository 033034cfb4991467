"""The benchmark of the server modes runs from end to end on a toy model, and its numbers belong together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_tiny_run(tmp_path: Path) -> None:
    what = [
        "--tiny",
        "--clients",
        "2",
        "--modes",
        "sequential",
        "per_client",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.server_modes", *what, "--json", str(tmp_path / "out.json")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    runs = {run["server_mode"]: run for run in json.loads((tmp_path / "out.json").read_text())["runs"]}
    assert runs.keys() == {"sequential", "per_client"}
    assert all(run["client_steps"] == 2 * 12 and run["seconds"] > 0 for run in runs.values())
    assert runs["sequential"]["copies"] is None
    assert runs["per_client"]["copies"]["most_at_once"] == 2
    assert runs["per_client"]["eval_loss_before"] == runs["sequential"]["eval_loss_before"]
    assert runs["per_client"]["eval_loss_after"] < runs["per_client"]["eval_loss_before"]
