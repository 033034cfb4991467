"""`splitfl simulate`: one command, real processes, one file dealt to the clients."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
def test_simulate_deals_by_a_field_and_trains(make_model: Callable[..., Path], tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"note {number} of this ward", "ward": f"w{number % 3}"}) for number in range(30)]
    data = tmp_path / "notes.jsonl"
    data.write_text("\n".join(lines) + "\n")
    config = tmp_path / "server.toml"
    config.write_text(
        f"""
        [server]
        runs_dir = "{tmp_path}/runs"
        run_id = "try"
        cache_dir = "{tmp_path}/cache"
        [model]
        model_name_or_path = "{make_model()}"
        [federation]
        num_rounds = 1
        local_steps = 2
        per_device_train_batch_size = 2
        """
    )
    command = [sys.executable, "-m", "splitfl", "simulate", "--config", str(config), "--data", str(data)]
    options = ["--num-clients", "3", "--partition", "field:ward", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [client["client_id"] for client in report["clients"]] == ["client-0", "client-1", "client-2"]
    assert all(client["num_examples"] == 9 for client in report["clients"])  # ten each, one held out
    assert all(client["eval_loss_after"] is not None for client in report["clients"])
    assert set(report["pids"]) == {"server", "client-0", "client-1", "client-2"}
    assert len(set(report["pids"].values())) == 4
    assert report["peak_pss_bytes"] > 0
    assert (tmp_path / "runs" / "try" / "report.html").is_file()
    assert (tmp_path / "runs" / "try" / "model" / "config.json").is_file()
    wards = [
        {json.loads(line)["ward"] for line in path.read_text().splitlines()}
        for path in sorted((tmp_path / "runs" / "try" / "partitions").iterdir())
    ]
    assert [len(ward) for ward in wards] == [1, 1, 1]

    again = subprocess.run([*command, *options], capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path)
    assert again.returncode == 2
    assert "holds a run" in again.stderr


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--num-clients", "0"], 2, "must be at least 1"),
        (["--num-clients", "99"], 2, "99"),
        (["--eval-fraction", "2"], 2, "--eval-fraction 2: must be at least 0 and below 1"),
        (["--partition", "field:nothing"], 2, "nothing"),
        (["--partition", "nonesuch"], 2, "iid"),
    ],
)
def test_bad_options_start_nothing(
    options: list[str], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from splitfl.command_line import run_one
    from splitfl.commands.simulate import Simulate

    data = tmp_path / "notes.txt"
    data.write_text("one\ntwo\nthree\n")
    config = tmp_path / "server.toml"
    config.write_text(f'[server]\nruns_dir = "{tmp_path}/runs"\n[model]\nmodel_name_or_path = "x"\n')
    assert run_one("simulate", Simulate(), ["--config", str(config), "--data", str(data), *options]) == code
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
