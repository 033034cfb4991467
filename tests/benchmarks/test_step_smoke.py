"""The step benchmark runs from end to end on a toy model, and what it says about it adds up."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.material import LLAMA_34M, TINY, write_lines, write_model
from benchmarks.step import FULL, SMOKE, TARGETS, Target

ROOT = Path(__file__).resolve().parents[2]


def run_tiny(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.step", "--tiny", "--json", str(folder / "step.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "losses equal bit for bit" in done.stdout
    return json.loads((folder / "step.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_tiny_run_compares_equal_training(tmp_path: Path) -> None:
    result = run_tiny(tmp_path)
    (bursts,) = result["rounds"]

    assert result["losses_equal"] is True
    assert len(set(bursts["split"]["losses"])) == SMOKE.num_steps
    assert set(bursts) == {"split", "micro_batches", "one_batch"}
    for kind, burst in bursts.items():
        assert len(burst["steps"]) == SMOKE.num_steps - SMOKE.num_warm_up
        for step in burst["steps"]:
            # a side cannot compute longer than the step takes; the server's last moments may count to the next step
            assert 0 < max(step["compute_seconds"].values()) <= step["seconds"] * 1.1
            assert (step["wire_bytes"] > 0) is (kind == "split")
    assert result["unsplit_seconds"] == min(result["unsplit_seconds_by_kind"].values())
    # no micro-batch is missing from a step's bytes, nor is a merge or a file among them
    assert result["payload_bytes_per_step"] == 4 * 4 * 16 * 64 * 4
    assert 1.0 < result["wire_over_payload"] < 1.05
    assert result.keys() >= {"machine", "versions", "date", "threads", "undisturbed", *(t.key for t in TARGETS)}


@pytest.mark.parametrize("at_least", [True, False])
def test_target_is_met_on_its_own_side_of_the_bound(at_least: bool) -> None:
    target = Target(key="ratio", title="a ratio", bound=0.9, at_least=at_least)
    assert [target.is_met(value) for value in (0.89, 0.9, 0.91)] == [not at_least, True, at_least]


def test_model_has_the_size_that_is_claimed(tmp_path: Path) -> None:
    assert write_model(tmp_path / "model", TINY) == _num_parameters(TINY)
    assert _num_parameters(LLAMA_34M) == 33_694_208
    assert FULL.shape is LLAMA_34M


def test_every_line_is_a_full_row(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_model(tmp_path / "model", TINY)
    write_lines(tmp_path / "text.txt", TINY, num_lines=20)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = [tokenizer(line)["input_ids"] for line in (tmp_path / "text.txt").read_text().splitlines()]
    assert {len(row) for row in rows} == {TINY.seq_length - 1}  # the client adds the end-of-sequence token
    assert len({tuple(row) for row in rows}) == 20
    assert not any(tokenizer.unk_token_id in row for row in rows)


def _num_parameters(shape: Any) -> int:
    """Count a Llama's tensors by hand: four projections, three of the gated layer and two norms a block."""
    block = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size + 2 * shape.hidden_size
    return shape.num_blocks * block + 2 * shape.vocab_size * shape.hidden_size + shape.hidden_size
