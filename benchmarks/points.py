"""Ends a server and its clients where it hurts most, one life after the other, and compares with the undisturbed run.

`python -m benchmarks.points --model smollm2 --server-mode per_client --durability snapshot --json FILE`. The run is
done twice, with keys: undisturbed, and with each process ended at a point of its own in every life. The points are in
the middle of a step, of the optimizer's step, of a record, of an upload, of a merge, of a snapshot, of redoing the log,
and at the last goodbye. Every process that has ended is started again with the same command. Then the histories are
counted (benchmarks/history.py), the run is trained again from its log (benchmarks/replay.py), and the weights are
compared with the undisturbed run's.

With `--durability snapshot` only the server is ended. A client that is killed alone begins anew with the next round, so
the run would differ from the undisturbed one (benchmarks/chaos.py does that).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomlkit
import torch

from benchmarks.chaos import MATERIALS, Material, start
from benchmarks.history import HISTORY_FILE, check
from benchmarks.keyed import KeyRing
from benchmarks.replay import differences
from splitfl.commands.fleet import free_port
from splitfl.config.trees import ClientConfig
from splitfl.models.checkpoint import TensorFile
from splitfl.models.export import TRAINED_FILE
from splitfl.telemetry.versions import versions_of

_KILLED = 137
_ROUNDS, _STEPS = 2, 4
# The optimizer's step moves a tensor after the other; the second life's server dies while it does the log again.
SERVER = {
    "redo": (
        "commit-after-record:2",
        "optimizer-tensor:70",
        "optimizer-tensor:9",
        "upload-after-record:1",
        "merge-before-record:1",
        "merge-after-record:1",
        "snapshot-before-rename:1",
        "commit-acknowledged:2",
        "append-torn:3",
        "goodbye-before-farewell:1",
    ),
    "snapshot": (
        "commit-acknowledged:3",
        "optimizer-tensor:45",
        "snapshot-before-rename:1",
        "upload-after-record:1",
        "merge-before-record:1",
        "merge-after-record:1",
        "forward:5",
        "snapshot-after-rename:1",
        "goodbye-before-farewell:1",
    ),
}
CLIENTS = {
    "redo": (
        ("optimizer-tensor:15", "optimizer-tensor:5", "step-after-record:1", "merge-heard:1", "step-acknowledged:2"),
        ("step-before-record:2", "step-applied:1", "snapshot-before-rename:2", "step-acknowledged:1"),
    ),
    "snapshot": (),
}
# A frozen server has no optimizer.
_FROZEN = {"optimizer-tensor:70": "commit-before-record:2", "optimizer-tensor:9": "append-torn:4"} | {
    "optimizer-tensor:45": "forward:4"
}


class Points:
    """A run with keys, and the points at which its processes end."""

    def __init__(
        self,
        folder: Path,
        material: Material,
        *,
        server_mode: str,
        durability: str,
        num_clients: int = 2,
        points: Mapping[str, Sequence[str]],
    ) -> None:
        """`points` are a process's, in the order of its lives."""
        self.folder = folder
        self.run_dir = folder / "runs" / "points"
        self.names = [f"clinic-{number}" for number in range(num_clients)]
        self.lives: Counter[str] = Counter()
        self._points = points
        self._durability = durability
        folder.mkdir(parents=True)
        ring, address = KeyRing(folder), f"tcp://127.0.0.1:{free_port()}"
        given = {name: dict(section) for name, section in material.settings.items()}
        for section, values in {
            "model": {"model_name_or_path": str(material.write_model(folder))},
            "federation": {
                "server_mode": server_mode,
                "num_rounds": _ROUNDS,
                "local_steps": _STEPS,
                "min_available_clients": num_clients,
            },
            "storage": {"durability": durability, "keep_snapshots": 0, "snapshot_steps": 3},
            "server": {
                "address": address,
                "runs_dir": str(folder / "runs"),
                "run_id": "points",
                "export_model": False,
                "keys": str(ring.server_keys),
                **self._own_settings(),
            },
        }.items():
            given[section] = {**given.get(section, {}), **values}
        self._write("server", given)
        texts = material.write_texts(folder, self.names, 1)
        for name in self.names:
            client = {"client_id": name, "server_address": address, "output_dir": str(folder / "clients")}
            self._write(
                name,
                {
                    "client": {**client, **self._own_settings(), **ring.enrol(name, address)},
                    "data": {"path": str(texts[name]), "eval_fraction": 0.0},
                },
            )

    def _own_settings(self) -> dict[str, Any]:
        return {"cache_dir": str(self.folder / "cache"), "num_threads": 1, "history": True}

    def _write(self, name: str, settings: dict[str, Any]) -> None:
        self.config(name).write_text(tomlkit.dumps(settings))

    def config(self, name: str) -> Path:
        """Return a role's settings file."""
        return self.folder / f"{name}.toml"

    def train(self, *, within_s: float) -> None:
        """Train to the end, starting again every process that has ended at a point."""
        processes = {name: self._start(name) for name in ("server", *self.names)}
        deadline_s = time.monotonic() + within_s
        try:
            while any(process.poll() != 0 for process in processes.values()):
                for name, process in processes.items():
                    if process.poll() == _KILLED:
                        processes[name] = self._start(name)
                    elif process.poll() not in (None, 0):
                        raise SystemExit(f"{name} ended with {process.poll()}; see {self.folder}")
                if time.monotonic() > deadline_s:
                    raise SystemExit(f"the run has not ended within {within_s:g} s; see {self.folder}")
                time.sleep(0.05)
        finally:
            for process in processes.values():
                if process.poll() is None:
                    process.kill()
                process.wait()

    def _start(self, name: str) -> "subprocess.Popen[bytes]":
        life, points = self.lives[name], self._points.get(name, ())
        self.lives[name] += 1
        module = ["server_backbone"] if name == "server" else ["client_edge", "--accept"]
        command = [sys.executable, "-m", *module, "--config", str(self.config(name))]
        ends = {"SPLITFL_CRASH": points[life]} if life < len(points) else {}
        return start(command, self.folder / f"{name}.log", **ends)

    def results(self, undisturbed: "Points") -> dict[str, Any]:
        """Count what was lost, train the run again, and compare its weights with the undisturbed one's."""
        histories = {name: self.folder / "clients" / "points" / name / HISTORY_FILE for name in self.names}
        verdict = check(self.run_dir / HISTORY_FILE, histories, keeps_records=self._durability == "redo")
        different = differences(self.run_dir, [ClientConfig.load(self.config(name)) for name in self.names], histories)
        return {
            "kills_server": self.lives["server"] - 1,
            "kills_client": sum(self.lives[name] - 1 for name in self.names),
            "steps_acknowledged": verdict.steps_acknowledged,
            "steps_lost": verdict.steps_lost,
            "steps_twice": verdict.steps_twice,
            "steps_undone": verdict.steps_undone,
            "replay_bit_identical": not different,
            "weights_of_the_undisturbed_run": self._ends_as(undisturbed),
            "problems": (verdict.problems + different)[:20],
        }

    def _ends_as(self, other: "Points") -> bool:
        mine, theirs = TensorFile(self.run_dir / TRAINED_FILE), TensorFile(other.run_dir / TRAINED_FILE)
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def points_of(server_mode: str, durability: str) -> dict[str, list[str]]:
    """Return the points of the server and of the clients."""
    server = list(SERVER[durability])
    if server_mode == "frozen":
        server = [_FROZEN.get(point, point) for point in server]
    clients = {f"clinic-{number}": list(points) for number, points in enumerate(CLIENTS[durability])}
    return {"server": server, **clients}


def main(argv: list[str] | None = None) -> int:
    """Run it; 0 when nothing was lost, nothing counted twice and every bit agrees."""
    parser = argparse.ArgumentParser(prog="benchmarks.points", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=tuple(MATERIALS), default="tiny")
    parser.add_argument("--server-mode", choices=("shared", "sequential", "per_client", "frozen"), default="shared")
    parser.add_argument("--durability", choices=("redo", "snapshot"), default="redo")
    parser.add_argument("--clients", type=int, choices=(1, 2), default=2)
    parser.add_argument("--folder", type=Path, help="where everything is kept; a new one by default")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="splitfl-points-"))
    mode, durability, begun = arguments.server_mode, arguments.durability, datetime.now(UTC)
    both = []
    for name, points in (("undisturbed", {}), ("ended", points_of(mode, durability))):
        run = Points(
            folder / name,
            MATERIALS[arguments.model],
            server_mode=mode,
            durability=durability,
            num_clients=arguments.clients,
            points=points,
        )
        run.train(within_s=600.0)
        both.append(run)
    results = both[1].results(both[0]) | {
        "seconds": round((datetime.now(UTC) - begun).total_seconds()),
        "model": arguments.model,
        "server_mode": mode,
        "durability": durability,
        "clients": arguments.clients,
        "load": os.getloadavg(),
        "date": begun.strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "versions": versions_of(("splitfl", "torch", "transformers", "pyzmq")),
        "histories": str(folder),
    }
    for name, value in results.items():
        print(f"{name:32} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    # in the order of arrival, which differs between two runs
    has_one_order = mode != "sequential" or arguments.clients == 1
    is_same = results["weights_of_the_undisturbed_run"] or not has_one_order
    return 0 if is_same and not results["problems"] else 1


if __name__ == "__main__":
    sys.exit(main())
