"""A client with too little memory sends a step in smaller pieces: the same step, to rounding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, write_text

from splitfl.config.trees import ClientConfig
from splitfl.errors import ConfigError
from splitfl.models.checkpoint import TensorFile
from splitfl.models.export import trained_file
from splitfl.telemetry.metrics import read_events


def test_one_of_two_clients_sends_single_rows(
    federate: Callable[..., Finished], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    data: dict[str, Any] = {
        f"clinic-{number}": {
            "path": str(write_text(tmp_path / f"{number}.txt", num_lines=30, seed=number)),
            "eval_fraction": 0.2,
        }
        for number in range(2)
    }
    settings: dict[str, Any] = {
        "model": {"model_name_or_path": str(make_model())},
        "optimizer": {"learning_rate": 1e-2},
        "federation": {"num_rounds": 1, "local_steps": 4, "min_available_clients": 2},
    }
    whole = federate(settings, data)
    data["clinic-1"]["client"] = {"micro_batch_rows": 1}
    pieces = federate(settings, data)
    assert whole.errors == pieces.errors == {}
    one, other = (TensorFile(each.run_dir / trained_file()) for each in (whole, pieces))
    assert any(float(one[name].abs().max()) > 1e-3 for name in one if "lora_B" in name)  # they begin at zero
    for name in one:
        torch.testing.assert_close(other[name], one[name], atol=1e-4, rtol=1e-3)
    positions = [_positions(each.folders["clinic-1"]) for each in (whole, pieces)]
    assert positions[1] < positions[0]  # single rows are not padded, so it has been done


def _positions(folder: Path) -> int:
    return sum(event["num_positions"] for event in read_events(folder / "metrics.jsonl") if event["event"] == "step")


def test_rows_below_zero_are_refused() -> None:
    with pytest.raises(ConfigError, match="micro_batch_rows"):
        ClientConfig.from_tree({"client": {"client_id": "a", "micro_batch_rows": -1}}, source="test")
