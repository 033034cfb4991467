"""`splitfl purge` takes all that was learned from text, and leaves the report and the model."""

from pathlib import Path

from splitfl.command_line import run_one
from splitfl.commands.purge import Purge

LEARNED = (
    "state/log-1.bin",
    "uploads/clinic.safetensors",
    "versions/00001.safetensors",
    "adapters.safetensors",
    "trained.safetensors",
    "trained-clinic.safetensors",
    "best-00002.safetensors",
    "history.jsonl",
)
LEFT = ("metrics.jsonl", "report.json", "report.html", "config.toml", "model/model.safetensors")


def test_what_goes_and_what_stays(tmp_path: Path) -> None:
    for name in (*LEARNED, *LEFT):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert run_one("purge", Purge(), [str(tmp_path)]) == 0
    assert all((tmp_path / name).exists() for name in LEARNED)
    assert run_one("purge", Purge(), [str(tmp_path), "--yes"]) == 0
    assert [name for name in LEARNED if (tmp_path / name).exists()] == []
    assert [name for name in LEFT if not (tmp_path / name).exists()] == []
