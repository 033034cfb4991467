"""The comparison of split and full federated learning: its parts by themselves, and all arms on a toy model."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks import arithmetic
from benchmarks.split_vs_full import cells as cells_module
from benchmarks.split_vs_full import presets
from benchmarks.split_vs_full.__main__ import main
from benchmarks.split_vs_full.arms import ARMS, arms_of
from benchmarks.split_vs_full.cells import Bench
from benchmarks.split_vs_full.claims import claims_of
from benchmarks.split_vs_full.plan import Cell
from benchmarks.split_vs_full.relay import Relay
from benchmarks.split_vs_full.text import Source, source_of, write_clients
from splitfl.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def cell_of(arm: str, **changes: Any) -> Cell:
    plain = {"study": "arms", "table": "lora", "seed": 1, "num_clients": 2, "dealt": "natural"}
    return Cell(arm=arm, budget=presets.TINY.lora, **(plain | changes))


def found_of(arm: str, losses: list[float], **changes: Any) -> dict[str, Any]:
    """Make up what a cell has found; a model for each loss."""
    cell = dataclasses.asdict(cell_of(arm, **changes))
    use = dict.fromkeys(("bytes_up", "bytes_down", "peak_rss", "peak_rss_above_imports", "tree_peak_rss"), 100)
    use |= {"cpu_seconds": 10.0, "cpu_seconds_above_imports": 5.0}
    return {
        "cell": cell,
        "study": cell["study"],
        "status": "done",
        "models": {f"client-{n}": {"mean_loss": loss, "worst_loss": loss} for n, loss in enumerate(losses)},
        "clients": {"client-0": use},
        "rounds": [],
        "notes": {"positions_at_most": 10, "positions_per_client": 10},
    }


def verdicts(cells: list[dict[str, Any]]) -> dict[str, str]:
    shape = dataclasses.asdict(arithmetic.GPT2)
    return {claim.text: claim.verdict for claim in claims_of(cells, shape)}


def test_near_centralised_is_within_one_percent_on_every_seed() -> None:
    near = [found_of("split-shared", [2.01]), found_of("centralised", [2.0])]
    far = [found_of("split-shared", [2.05], seed=2), found_of("centralised", [2.0], seed=2)]
    (claim,) = [text for text in verdicts(near) if "1 % of centralised" in text and text.startswith("LoRA")]

    assert verdicts(near)[claim] == "shown"
    assert verdicts(near + far)[claim] == "not shown"
    assert verdicts([])[claim] == "not run"


def test_better_than_local_is_measured_against_the_best_client_and_the_spread() -> None:
    def on(seed: int, split: float, local: list[float]) -> list[dict[str, Any]]:
        return [found_of("split-shared", [split], seed=seed), found_of("local", local, seed=seed)]

    (claim,) = [text for text in verdicts([]) if "learns alone" in text and text.startswith("LoRA")]

    assert verdicts(on(1, 2.0, [2.2, 2.5]))[claim] == "not shown"  # one seed has no spread
    assert verdicts(on(1, 2.0, [2.2, 2.5]) + on(2, 2.1, [2.31, 2.5]))[claim] == "shown"
    assert verdicts(on(1, 2.0, [2.01, 2.5]) + on(2, 2.1, [2.4, 2.5]))[claim] == "not shown"
    assert verdicts(on(1, 2.0, [1.9, 2.5]) + on(2, 2.1, [1.9, 2.5]))[claim] == "not shown"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--alpha", "0"], "0 must be above 0"),
        (["--alpha", "nan"], "nan must be above 0"),
        (["--clients", "0"], "0 must be at least 1"),
        (["--num-rounds", "x"], "'x' is no whole number"),
        (["--seeds", "1", "-1"], "-1 must not be negative"),
        (["--tiny", "--data", "notes.jsonl"], "--tiny has made-up words of its own"),
        (["--data", "NOTES", "--alpha", "1"], "name its column with --label-field"),
        (["--data", "NOTES", "--client-field", "ward"], "no field 'ward'; the fields there are text"),
        (["--data", "none.jsonl"], "none.jsonl: no such file"),
        (["--tiny", "--no-run"], "nothing of this has been run"),
        (["--arms", "spilt"], "--arms spilt: unknown; known are base"),
    ],
    ids=" ".join,
)
def test_options_that_mean_nothing_are_refused(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "notes.jsonl"
    notes.write_text('{"text": "w1 w2"}\n', encoding="utf-8")
    given = [str(notes) if option == "NOTES" else option for option in options]

    with pytest.raises(SystemExit) as ended:
        main([*given, "--json", str(tmp_path / "r.json"), "--work", str(tmp_path)])

    assert ended.value.code in (2, 3)
    said = capsys.readouterr()
    assert sentence in said.out + said.err
    assert not (tmp_path / "r.json").exists()


def test_a_text_has_a_key_of_its_own() -> None:
    toy = source_of("toy")
    changed = dataclasses.replace(toy, records=[*toy.records[1:], {**toy.records[0], "completion": "w1"}])

    assert toy.key.startswith("toy-")
    assert toy.key == source_of("toy").key != changed.key
    assert "/" not in dataclasses.replace(toy, name="hpo (a, b/c)").key


def test_a_cell_has_a_name_of_its_own_and_a_study_is_no_part_of_it() -> None:
    cell = cell_of("split-shared")

    assert cell.key == dataclasses.replace(cell, study="modes").key
    others = [{"seed": 2}, {"num_clients": 4}, {"dealt": "iid"}, {"strategy": "FedProx"}, {"options": {"a": 1.0}}]
    assert len({cell.key, *(dataclasses.replace(cell, **other).key for other in others)}) == 6


def test_a_finished_arm_is_read_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    bench = Bench(work_dir=tmp_path, model_dir=tmp_path / "model", source=source_of("toy"), say=said.append)
    runs = []

    def run(self: Bench, cell: Cell, folder: Path) -> dict[str, Any]:
        runs.append(cell.arm)
        return {"status": "failed" if cell.arm == "flower" else "done"}

    monkeypatch.setattr(cells_module.Bench, "_run", run)
    for _ in range(2):
        assert bench.run(cell_of("base"))["status"] == "done"
        assert bench.run(cell_of("flower"))["status"] == "failed"

    assert runs == ["base", "flower", "flower"]  # what failed is tried again


def test_the_relay_counts_each_direction_and_changes_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, Relay(server.getsockname()[1]) as relay:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                while data := peer.recv(1 << 16):
                    peer.sendall(data[:10])

        threading.Thread(target=answer, daemon=True).start()
        with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as client:
            client.sendall(b"x" * 1000)
            assert client.recv(100) == b"x" * 10
        assert (relay.up, relay.down) == (1000, 10)


def test_every_record_is_dealt_once_and_held_out_text_is_not_trained_on(tmp_path: Path) -> None:
    source = source_of("toy")
    for dealt, num_clients in (("natural", 4), ("natural", 8), ("iid", 3), ("dirichlet:1", 4)):
        folder = tmp_path / f"{dealt.replace(':', '-')}-{num_clients}"
        clients = write_clients(source, folder, dealt=dealt, num_clients=num_clients, num_eval=4, seed=1)
        ids = [
            json.loads(line)["id"]
            for text in clients.values()
            for path in (text.train, text.eval)
            for line in path.read_text().splitlines()
        ]
        assert len(clients) == num_clients
        assert sorted(ids) == sorted(record["id"] for record in source.records)
        assert all(len(text.eval.read_text().splitlines()) == 4 for text in clients.values())


def test_natural_owners_are_not_divided_unevenly(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a multiple"):
        write_clients(source_of("toy"), tmp_path, dealt="natural", num_clients=6, num_eval=4, seed=1)


def test_a_skew_needs_a_label(tmp_path: Path) -> None:
    source = Source(name="mine", citation="", records=[{"text": "a"}] * 20, client_field="", label_field="")

    with pytest.raises(ConfigError, match="--label-field"):
        write_clients(source, tmp_path, dealt="dirichlet:0.1", num_clients=2, num_eval=1, seed=1)


def test_the_tables_have_the_arms_that_they_are_said_to_have() -> None:
    lora = ["base", "centralised", "local", "flower", *(f"split-{mode}" for mode in presets.MODES)]

    assert [arm.name for arm in arms_of("lora")] == lora
    assert [arm.name for arm in arms_of("full")] == ["centralised", "local", "flower", "split-shared"]
    assert [arm.name for arm in ARMS if arm.learns != "all"] == ["base", "split-frozen"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_arms_run_on_a_toy_model(tmp_path: Path) -> None:
    result = run_tiny(tmp_path)
    by_arm = {(found["cell"]["table"], found["cell"]["arm"]): found for found in result["cells"]}
    done = {arm: found for arm, found in by_arm.items() if found["status"] == "done"}

    assert set(by_arm) == {(table, arm.name) for table in ("lora", "full") for arm in arms_of(table)}
    assert {by_arm[arm]["status"] for arm in by_arm.keys() - done.keys()} <= {"not available"}
    assert set(by_arm) - set(done) <= {("lora", "split-per_client")}
    for table in ("lora", "full"):
        trained = {arm: found for (of, arm), found in done.items() if of == table and arm != "base"}
        equal = {found["num_learned"] for arm, found in trained.items() if arm != "split-frozen"}
        assert len(equal) == 1, "arms of a table train the same parameters"
        assert len({found["num_label_tokens"] for found in trained.values()}) == 1, "and learn from the same tokens"
        before = trained["centralised"]["rounds"][0]["mean_loss"]
        for arm, found in trained.items():
            for model in found["models"].values():
                assert model["mean_loss"] < before, arm
    for found in done.values():
        for client, counted in found.get("notes", {}).get("counted_by_splitfl", {}).items():
            use = found["clients"][client]
            assert use["bytes_up"] == pytest.approx(counted["up"], rel=0.01)
            down = counted["down"] - found["notes"]["bytes_of_files"][client]
            assert use["bytes_down"] == pytest.approx(down, rel=0.01)
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert all(arm.title[table] in page for table in ("lora", "full") for arm in arms_of(table))
    assert all((tmp_path / name).stat().st_size > 1000 for name in PLOTS)
    # the same command again runs nothing: every arm is read from its file
    assert run_tiny(tmp_path)["cells"] == result["cells"]
    assert run_tiny(tmp_path, "--no-run")["cells"] == [found for found in result["cells"] if found["status"] == "done"]


PLOTS = ("results-loss-against-bytes.png", "results-loss-against-wall.png", "results-memory.png")


def run_tiny(folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.split_vs_full", "--tiny", *options]
    files = ["--json", "result.json", "--write", "results.md", "--work", "work"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    done = subprocess.run(
        [*command, *files], cwd=folder, env=environment, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))
