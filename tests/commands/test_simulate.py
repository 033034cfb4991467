"""`splitfl simulate`: one command, real processes, one file dealt to the clients."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import free_port


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
        keys = "{tmp_path}/keys-for-other-machines"
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


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_a_terminals_ctrl_c_stops_all_processes_in_order_and_a_second_one_at_once(
    make_model: Callable[..., Path], tmp_path: Path, times: int
) -> None:
    """A terminal sends it to the whole process group."""
    data, config = tmp_path / "notes.txt", tmp_path / "server.toml"
    data.write_text("\n".join(f"note number {number}" for number in range(40)) + "\n")
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
        local_steps = 100000
        """
    )
    command = [sys.executable, "-m", "splitfl", "simulate", "--config", str(config), "--data", str(data)]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        server = _server_that_trains(tmp_path / "runs" / "try" / "metrics.jsonl")
        if times == 2:
            os.kill(server, signal.SIGSTOP)  # it does not end in order
        os.killpg(process.pid, signal.SIGINT)
        if times == 2:
            time.sleep(1.0)
            assert process.poll() is None
            os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    finally:
        process.send_signal(signal.SIGTERM)  # which ends all of them, if an assertion came first
        process.communicate()
    assert process.returncode == (130 if times == 1 else 137), said
    deadline = time.monotonic() + 30
    while Path(f"/proc/{server}").exists() and "Z" not in Path(f"/proc/{server}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < deadline, "the server still runs"
        time.sleep(0.1)
    assert (tmp_path / "runs" / "try" / "report.json").exists() == (times == 1)
    if times == 1:
        report = json.loads((tmp_path / "runs" / "try" / "report.json").read_text())
        assert (report["complete"], report["stopped"].startswith("stopped by its operator")) == (False, True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_servers_port_is_none_that_a_connection_may_be_given() -> None:
    """Else a connection may have it when the server comes, or when it comes again: "address is in use"."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(1024 <= free_port() < lowest for _ in range(100))


def _server_that_trains(metrics: Path) -> int:
    """Wait for a run's first step; return its server's process."""
    deadline = time.monotonic() + 100
    while not metrics.exists() or '"step"' not in metrics.read_text():
        assert time.monotonic() < deadline, "no step"
        time.sleep(0.1)
    events = map(json.loads, metrics.read_text().splitlines())
    return int(next(event["pid"] for event in events if event["event"] == "run_started"))


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
