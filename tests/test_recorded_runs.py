"""Runs that an earlier splitfl has recorded: their logs are read, and lead to the same bits (tests/recorded)."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.replay import Replayed, quiet_replay
from server_backbone.records.entries import Committed
from server_backbone.replay import replay
from splitfl.config.trees import ClientConfig
from splitfl.durability.record import pack
from splitfl.durability.store import Store

RECORDED = Path(__file__).parent / "recorded"
RUNS = ("buffered", "copies", "rounds")
CLIENTS = ("clinic-0", "clinic-1")
COMMITS = {"buffered": 18, "copies": 16, "rounds": 8}
RECORDED_WITH = "AVX512"


@pytest.fixture(params=RUNS)
def recorded(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a copy of a run's folder, at home where it lies now."""
    folder = tmp_path / str(request.param)
    shutil.copytree(RECORDED / str(request.param), folder)
    for path in (*folder.glob("*.toml"), folder / "run" / "config.toml"):
        text = path.read_text().replace("MODEL", str(RECORDED / "model")).replace("FOLDER", str(folder))
        path.write_text(text)
    return folder


def test_its_log_leads_to_its_snapshots_and_to_what_was_saved(recorded: Path) -> None:
    found = replay(recorded / "run")
    assert found.problems == []
    assert found.commits == COMMITS[recorded.name]
    assert found.snapshots_equal >= 2


def test_a_commit_that_is_left_out_of_a_log_is_found(recorded: Path) -> None:
    state = recorded / "run" / "state"
    store = Store.reading(state)
    for generation in store.generations():
        entries = list(store.entries_of(generation))
        if sum(entry.kind == Committed.kind for entry in entries) > 1:
            break
    gone = next(entry for entry in entries if entry.kind == Committed.kind)
    entries.remove(gone)
    (state / f"log-{generation:08d}.bin").write_bytes(
        b"".join(bytes(part) for entry in entries for part in pack(entry))
    )
    number = gone.fields["number"]
    assert f"commit {number + 1} after commit {number - 1}" in replay(recorded / "run").problems


def test_training_it_again_gives_the_same_weights(recorded: Path) -> None:
    replayed = quiet_replay(recorded / "run", [ClientConfig.load(recorded / f"{name}.toml") for name in CLIENTS])
    assert len(replayed.server) == COMMITS[recorded.name]
    if torch.backends.cpu.get_cpu_capability() != RECORDED_WITH:
        pytest.skip(f"recorded with {RECORDED_WITH}: other instructions round otherwise")
    assert replayed.problems == []
    assert differences(recorded, replayed) == []


def differences(recorded: Path, replayed: Replayed) -> list[str]:
    found = [
        f"server, commit {number}"
        for number, digest in noted(recorded / "run" / "history.jsonl", "commit_number")
        if replayed.server.get(number) != digest
    ]
    for name in CLIENTS:
        found += [
            f"{name}, step {number}"
            for number, digest in noted(recorded / name / "history.jsonl", "step")
            if replayed.clients[name].get(number) != digest
        ]
    return found


def noted(path: Path, key: str) -> list[tuple[int, str]]:
    notes = [json.loads(line) for line in path.read_text().splitlines()]
    found = [(note[key], note["digest"]) for note in notes if note["event"] == "applied"]
    assert found
    return found
