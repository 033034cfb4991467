"""A run in bfloat16 learns what one in float32 does, at half the bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, write_text
from safetensors.torch import load_file

from splitfl.telemetry.metrics import read_events


def test_half_the_bytes_and_nearly_the_losses(
    make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path
) -> None:
    directory = make_model("llama", hidden_size=64)
    data = write_text(tmp_path / "text.txt", num_lines=16, seed=3, lengths=(40, 40))

    def run(dtype: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        finished = federate(
            {
                "model": {"model_name_or_path": str(directory), "dtype": dtype},
                "train": {"bottom": "full", "top": "full", "backbone": "full", "norm_head": True},
                "optimizer": {"learning_rate": 1e-2},
                "federation": {"num_rounds": 1, "local_steps": 6},
                "server": {"export_model": False},
            },
            {"clinic": {"path": data, "eval_fraction": 0.0}},
            transport="tcp",
        )
        assert finished.errors == {}
        events = read_events(finished.folders["clinic"] / "metrics.jsonl")
        return [e for e in events if e["event"] == "step"], load_file(finished.run_dir / "trained.safetensors")

    full, _ = run("float32")
    half, trained = run("bfloat16")
    assert {tensor.dtype for tensor in trained.values()} == {torch.bfloat16}
    assert [step["loss"] for step in half] == pytest.approx([step["loss"] for step in full], rel=0.02)
    assert half[-1]["loss"] < half[0]["loss"]
    sent = [steps[-1]["bytes_sent"] - steps[0]["bytes_sent"] for steps in (full, half)]
    assert 0.5 <= sent[1] / sent[0] < 0.55
