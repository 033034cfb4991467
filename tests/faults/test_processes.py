"""Processes that die, freeze or are stopped: everyone else goes on or says what happened, and nobody hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port, write_text

from splitfl.telemetry.metrics import Event, read_events

pytestmark = pytest.mark.slow

HEARTBEAT_TIMEOUT_S = 3.0


class Town:
    """A server and clinics as real processes, which a test may harm."""

    def __init__(self, folder: Path, model: Path, clients: int, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.run_dir = folder / "runs" / "run"
        self.processes: dict[str, subprocess.Popen[str]] = {}
        port = free_port()
        overrides = {
            "server.address": f"tcp://127.0.0.1:{port}",
            "server.runs_dir": folder / "runs",
            "server.run_id": "run",
            "server.cache_dir": folder / "cache",
            "server.num_threads": 1,
            "model.model_name_or_path": model,
            "federation.num_rounds": 2,
            "federation.local_steps": 60,
            "federation.min_available_clients": clients,
            "link.heartbeat_interval": 0.5,
            "link.heartbeat_timeout": HEARTBEAT_TIMEOUT_S,
            "link.slowest_link_bytes_per_second": 1e7,
            **settings,
        }
        self._start("server", "server_backbone", overrides)
        for number in range(clients):
            self._start(
                f"clinic-{number}",
                "client_edge",
                {
                    "client.client_id": f"clinic-{number}",
                    "client.server_address": f"tcp://127.0.0.1:{port}",
                    "client.output_dir": folder / "clients",
                    "client.cache_dir": folder / "cache",
                    "client.num_threads": 1,
                    "data.path": write_text(folder / f"{number}.txt", num_lines=30, seed=number),
                    "data.eval_fraction": 0.0,
                },
            )

    def _start(self, name: str, module: str, overrides: dict[str, Any]) -> None:
        config = self.folder / f"{name}.toml"
        config.write_text("")
        sets = [argument for key, value in overrides.items() for argument in ("--set", f"{key}={value}")]
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", module, "--config", str(config), *sets],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def events(self, kind: str) -> list[Event]:
        path = self.run_dir / "metrics.jsonl"
        return [event for event in read_events(path) if event["event"] == kind] if path.exists() else []

    def wait_for(self, kind: str, count: int, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while len(self.events(kind)) < count:
            assert time.monotonic() < deadline, f"no {count} events of {kind} within {timeout_s} s"
            time.sleep(0.05)

    def end_of(self, name: str, timeout_s: float = 60.0) -> tuple[int, str]:
        """Return a process's exit code and the last line of what it said."""
        _, errors = self.processes[name].communicate(timeout=timeout_s)
        return self.processes[name].returncode, (errors.strip().splitlines() or [""])[-1]

    def report(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "report.json").read_text())


@pytest.fixture
def town(tmp_path: Path, make_model: Callable[..., Path]) -> Iterator[Callable[..., Town]]:
    with _ending() as towns:

        def start(clients: int, **settings: Any) -> Town:
            named = {key.replace("__", "."): value for key, value in settings.items()}
            towns.append(Town(tmp_path, make_model("llama"), clients, named))
            return towns[-1]

        yield start


@contextmanager
def _ending() -> Iterator[list[Town]]:
    towns: list[Town] = []
    try:
        yield towns
    finally:
        for process in (process for town in towns for process in town.processes.values()):
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()


def test_a_killed_client_is_noticed_and_the_others_finish(town: Callable[..., Town]) -> None:
    run = town(3, federation__num_rounds=1, federation__local_steps=100)
    run.wait_for("step", 30)
    run.processes["clinic-1"].kill()
    killed_at = time.time()
    run.wait_for("client_left", 1)
    (left,) = run.events("client_left")
    assert left["client_id"] == "clinic-1"
    assert "fell silent" in left["reason"]
    assert left["time"] - killed_at <= HEARTBEAT_TIMEOUT_S + 2
    assert run.end_of("server")[0] == 0
    assert run.end_of("clinic-0")[0] == run.end_of("clinic-2")[0] == 0
    (merge,) = run.report()["merges"]
    assert (merge["absent"], sorted(merge["clients"])) == (["clinic-1"], ["clinic-0", "clinic-2"])


def test_too_few_clients_left_keep_the_old_layers_and_say_so(town: Callable[..., Town]) -> None:
    run = town(2, federation__min_train_clients=2, federation__wait_timeout=4)
    run.wait_for("step", 20)
    run.processes["clinic-1"].kill()
    run.wait_for("merged", 1)
    (merged,) = run.events("merged")
    assert merged["accepted"] is False
    assert "min_train_clients = 2" in merged["reason"]
    code, said = run.end_of("server")
    assert code == 9
    assert "waited 4 s (federation.wait_timeout) for 2 clients; ready: clinic-0" in said
    code, said = run.end_of("clinic-0")
    assert (code, "wait_timeout" in said) == (8, True)


def test_a_killed_server_is_noticed(town: Callable[..., Town]) -> None:
    run = town(1)
    run.wait_for("step", 10)
    run.processes["server"].kill()
    code, said = run.end_of("clinic-0", timeout_s=HEARTBEAT_TIMEOUT_S + 7)
    assert code == 7
    assert "has been silent for" in said


def test_a_stopped_server_tells_its_clients(town: Callable[..., Town]) -> None:
    run = town(2)
    run.wait_for("step", 10)
    run.processes["server"].send_signal(signal.SIGTERM)
    assert run.end_of("server", timeout_s=15) == (130, "splitfl server: interrupted")
    for name in ("clinic-0", "clinic-1"):
        code, said = run.end_of(name, timeout_s=15)
        assert (code, "stopped by the operator" in said) == (8, True)
    assert run.report()["complete"] is False
    assert not (run.run_dir / "model").exists()


def test_a_stopped_client_says_goodbye(town: Callable[..., Town]) -> None:
    run = town(2, federation__num_rounds=1)
    run.wait_for("step", 10)
    run.processes["clinic-0"].send_signal(signal.SIGINT)
    assert run.end_of("clinic-0", timeout_s=10)[0] == 130
    run.wait_for("client_left", 1, timeout_s=HEARTBEAT_TIMEOUT_S)
    assert run.events("client_left")[0]["reason"] == "stopped by its operator"
    assert run.end_of("server")[0] == run.end_of("clinic-1")[0] == 0


def test_a_frozen_client_misses_steps_and_comes_back(town: Callable[..., Town]) -> None:
    """Its step is closed without it, applied on neither side; thawed, it goes on with the others' next one."""
    patient = {"link__heartbeat_timeout": 60, "federation__step_timeout": 1.0, "federation__local_steps": 60}
    run = town(2, **patient)
    run.wait_for("step", 10)
    os.kill(run.processes["clinic-0"].pid, signal.SIGSTOP)
    run.wait_for("step_refused", 1)
    os.kill(run.processes["clinic-0"].pid, signal.SIGCONT)
    assert run.end_of("server")[0] == run.end_of("clinic-0")[0] == run.end_of("clinic-1")[0] == 0
    steps = run.events("step")
    refused = {event["step"] for event in run.events("step_refused")}
    mine = [event["step"] for event in steps if event["client_id"] == "clinic-0"]
    assert mine == sorted(set(mine))  # each at most once, in order
    assert not refused & set(mine)
    assert max(mine) > max(refused)
    assert [merge["equal"] for merge in run.report()["merges"]] == [True, True]
