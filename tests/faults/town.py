"""A server and clinics as real processes, which a test may harm and start again with the same command."""

import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from conftest import free_port, write_text
from forked import Forked

from benchmarks.history import Verdict, check
from benchmarks.replay import differences
from splitfl.config.trees import ClientConfig
from splitfl.telemetry.history import HISTORY_FILE
from splitfl.telemetry.metrics import Event, read_events

HEARTBEAT_TIMEOUT_S = 3.0


class Town:
    """A server and clinics."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        clients: int,
        settings: dict[str, Any],
        *,
        own: dict[str, Any] | None = None,
        crash: dict[str, str] | None = None,
        pause: dict[str, str] | None = None,
        starts: bool = True,
        ports: dict[str, int] | None = None,
    ) -> None:
        """`own` are settings of every client, `crash` and `pause` the points at which a process ends, or sleeps in, its
        first life; `pauses_next` is for later ones.

        `ports` are where a client finds the server if not at its own.
        """
        self.folder = folder
        self.model = model
        self.run_dir = folder / "runs" / "run"
        self.port = free_port()
        self.processes: dict[str, Forked] = {}
        self._numbers = itertools.count()
        self.names = [f"clinic-{number}" for number in range(clients)]
        self._crash = dict(crash or {})
        self._pause = dict(pause or {})
        self._keeps_records = settings.get("storage.durability", "redo") == "redo"
        self._write(
            "server",
            {
                "server.address": f"tcp://127.0.0.1:{self.port}",
                "server.runs_dir": folder / "runs",
                "server.run_id": "run",
                "server.cache_dir": folder / "cache",
                "server.num_threads": 1,
                "server.history": "true",
                "server.export_model": "false",
                "model.model_name_or_path": model,
                "federation.num_rounds": 2,
                "federation.local_steps": 60,
                "federation.min_available_clients": clients,
                "federation.step_timeout": 20,
                "link.heartbeat_interval": 0.5,
                "link.heartbeat_timeout": HEARTBEAT_TIMEOUT_S,
                "link.slowest_link_bytes_per_second": 1e7,
                "storage.keep_snapshots": 0,
                "storage.snapshot_steps": 25,
                **settings,
            },
        )
        for number, name in enumerate(self.names):
            self._write(
                name,
                {
                    "client.client_id": name,
                    "client.server_address": f"tcp://127.0.0.1:{(ports or {}).get(name, self.port)}",
                    "client.output_dir": folder / "clients",
                    "client.cache_dir": folder / "cache",
                    "client.num_threads": 1,
                    "client.history": "true",
                    "data.path": write_text(folder / f"{number}.txt", num_lines=30, seed=number),
                    "data.eval_fraction": 0.0,
                    **(own or {}),
                },
            )
        if starts:
            for name in ("server", *self.names):
                self.start(name)

    def config(self, name: str) -> Path:
        return self.folder / f"{name}.toml"

    def _write(self, name: str, settings: dict[str, Any]) -> None:
        sections: dict[str, list[str]] = {}
        for key, value in settings.items():
            section, _, field = key.partition(".")
            is_bare = isinstance(value, int | float) or value in ("true", "false")
            sections.setdefault(section, []).append(f"{field} = {value}" if is_bare else f"{field} = {str(value)!r}")
        text = "\n".join(f"[{section}]\n" + "\n".join(lines) for section, lines in sections.items())
        self.config(name).write_text(text + "\n", encoding="utf-8")

    def start(self, name: str) -> None:
        """Start a process, or start it again with the same command."""
        module = "server_backbone" if name == "server" else "client_edge"
        self._go(name).unlink(missing_ok=True)
        harm = {"SPLITFL_CRASH": self._crash.pop(name, ""), "SPLITFL_PAUSE": self._pause.pop(name, "")}
        self.processes[name] = Forked(
            module,
            "--config",
            str(self.config(name)),
            said=self.folder / f"{name}-{next(self._numbers)}.said",
            env={
                **os.environ,
                **{variable: points for variable, points in harm.items() if points},
                "SPLITFL_GO": str(self._go(name)),
            },
        )

    def pauses_next(self, name: str, points: str) -> None:
        """Have a process pause at these points when it is started the next time."""
        self._pause[name] = points

    def go_on(self, name: str) -> None:
        """End the pause that a process is in, and let it come by the next ones as if there were none."""
        self._go(name).touch()

    def _go(self, name: str) -> Path:
        return self.folder / f"{name}.go"

    def events(self, kind: str) -> list[Event]:
        path = self.run_dir / "metrics.jsonl"
        return [event for event in read_events(path) if event["event"] == kind] if path.exists() else []

    def wait_for(self, kind: str, count: int, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while len(self.events(kind)) < count:
            assert time.monotonic() < deadline, f"no {count} events of {kind} within {timeout_s} s"
            time.sleep(0.05)

    def wait_for_client(self, name: str, kind: str, count: int, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while [event["client_id"] for event in self.events(kind)].count(name) < count:
            assert time.monotonic() < deadline, f"no {count} events of {kind} of {name} within {timeout_s} s"
            time.sleep(0.05)

    def wait_until_it_pauses(self, name: str) -> None:
        """Wait until a process has come to its point; it stays there until `go_on`, or for as long as was asked."""
        self.wait_until_it_says(name, "paused at")

    def wait_until_it_says(self, name: str, text: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.processes[name].said():
            assert time.monotonic() < deadline, f"{name} has not said {text!r} within {timeout_s} s"
            time.sleep(0.02)

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """Stop a process in order that pauses: the signal is noted there, and acted on when it goes on."""
        self.processes[name].send_signal(number)
        self.wait_until_it_says(name, "stopping where nothing is half done")
        self.go_on(name)

    def end_of(self, name: str, timeout_s: float = 60.0) -> tuple[int, str]:
        """Return a process's exit code and the last line of what it said."""
        code = self.processes[name].wait(timeout_s)
        return code, (self.processes[name].said().strip().splitlines() or [""])[-1]

    def keep_alive(self, timeout_s: float = 90.0) -> None:
        """Start every process again that ends before the run's end, until all have ended in order."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended = {name: process.poll() for name, process in self.processes.items()}
            # a server that was killed after the run's end finds nothing to go on with
            is_over = ended["server"] == 0 or "holds a finished run" in self.processes["server"].said()
            if is_over and not self._wait_for_clients():
                return
            for name, code in ended.items():
                if code not in (None, 0) and not (is_over and name == "server"):
                    self.said = self.processes[name].said()
                    assert code in (137, -9), f"{name} ended with {code}: {self.said}"
                    self.start(name)
            assert time.monotonic() < deadline, f"still running: {ended}"
            time.sleep(0.05)

    def _wait_for_clients(self) -> list[str]:
        """Return who has still not ended after the server; one killed after its goodbye finds nobody any more."""
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            left = [name for name in self.names if self.processes[name].poll() is None]
            if not left:
                return []
            time.sleep(0.05)
        return left

    def report(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "report.json").read_text())

    def client_dir(self, name: str) -> Path:
        return self.folder / "clients" / "run" / name

    def verdict(self) -> Verdict:
        """What the histories say; nothing was lost if it has no problems."""
        return check(self.run_dir / HISTORY_FILE, self._histories(), keeps_records=self._keeps_records)

    def _histories(self) -> dict[str, Path]:
        return {name: self.client_dir(name) / HISTORY_FILE for name in self.names}

    def differs_from_replay(self) -> list[str]:
        """Train the run again from its log, and name what differs."""
        clients = [ClientConfig.load(self.config(name)) for name in self.names]
        return differences(self.run_dir, clients, self._histories())

    def end(self) -> None:
        """End whatever still runs."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
