"""Trains for thousands of steps and fails when a process, or what it sends for a step, grows meanwhile.

`python -m benchmarks.soak --commits 3000 --json FILE`: a server and eight clients with keys, each a process of its own,
train a tiny model in rounds of ten steps; `--minutes 2` stops that long after the first commit instead (`make soak`),
but not before commit 150. Memory, descriptors and threads of every process are sampled once a second. Medians over the
last tenth of the commits are held against medians over the second tenth. Both must agree within 5 %, and so must the
bytes of a client's step. What grows on disk by design is reported as bytes per commit.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import psutil
import tomlkit

from benchmarks.keyed import KeyRing
from benchmarks.material import TINY, write_lines, write_model
from splitfl.commands.fleet import free_port
from splitfl.errors import Incomplete
from splitfl.telemetry.units import format_bytes
from splitfl.telemetry.versions import versions_of

LIMIT = 0.05
"""How much of what it was a figure may differ by."""
_LOCAL_STEPS = 10
# A tenth of fewer may hold no round.
_FEWEST_COMMITS = 15 * _LOCAL_STEPS
_SAMPLE_S = 1.0
_START_S = 300.0
_STALL_S = 120.0
_PARTING_S = 120.0
_COUNTS = ("descriptors", "threads")
_HELD = ("rss_bytes", "uss_bytes", *_COUNTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What a process held, some commits into the run."""

    commit: int
    rss_bytes: int
    uss_bytes: int
    """Memory that would be free without it: shared libraries left out."""
    descriptors: int
    threads: int


@dataclass(slots=True, kw_only=True)
class Record:
    """What was seen of a run."""

    samples: dict[str, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    """Of each process, by its name."""
    traffic: dict[str, list[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(list))
    """Of each client: the step's commit, bytes sent so far, bytes received so far."""
    disk: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    """Commit and bytes on disk by kind."""


class Metrics:
    """Follows a `metrics.jsonl` that is being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        """Return the events written since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")[0]
        self._offset += len(whole) + 1 if whole else 0
        return [json.loads(line) for line in whole.splitlines()]


class Soak:
    """One run, watched."""

    def __init__(self, folder: Path, *, num_clients: int, num_commits: int, seconds: float) -> None:
        self.folder = folder
        self.names = [f"clinic-{number}" for number in range(num_clients)]
        self.record = Record()
        self.commits = 0
        self._num_commits = num_commits
        self._seconds = seconds
        self._run_dir = folder / "runs" / "soak"
        self._metrics = Metrics(self._run_dir / "metrics.jsonl")
        self._processes: dict[str, psutil.Process] = {}
        self._write_settings()

    def _write_settings(self) -> None:
        address = f"tcp://127.0.0.1:{free_port()}"
        ring = KeyRing(self.folder)
        write_model(self.folder / "model", TINY)
        self._write("server", self._server_settings(address, ring))
        for number, name in enumerate(self.names):
            text = self.folder / f"{name}.txt"
            write_lines(text, TINY, num_lines=64, seed=number)
            own = {
                "client_id": name,
                "server_address": address,
                "output_dir": str(self.folder / "clients"),
                "cache_dir": str(self.folder / "cache"),
                "num_threads": 1,
                **ring.enrol(name, address),
            }
            self._write(name, {"client": own, "data": {"path": str(text)}})

    def _server_settings(self, address: str, ring: KeyRing) -> dict[str, Any]:
        return {
            "model": {"model_name_or_path": str(self.folder / "model")},
            "optimizer": {"lr_scheduler_type": "constant"},
            "federation": {
                "num_rounds": -(-self._num_commits // _LOCAL_STEPS),
                "local_steps": _LOCAL_STEPS,
                "per_device_train_batch_size": TINY.micro_batch_size,
                "gradient_accumulation_steps": TINY.micro_batches,
                "min_available_clients": len(self.names),
                "min_train_clients": len(self.names),
                "evaluate": "rounds",
            },
            "text": {"max_seq_length": TINY.seq_length},
            "server": {
                "address": address,
                "run_id": "soak",
                "runs_dir": str(self.folder / "runs"),
                "cache_dir": str(self.folder / "cache"),
                "num_threads": 1,
                "keys": str(ring.server_keys),
            },
        }

    def _write(self, name: str, settings: Mapping[str, Any]) -> None:
        (self.folder / f"{name}.toml").write_text(tomlkit.dumps(settings), encoding="utf-8")

    def run(self) -> None:
        """Train to the last commit or until the time is over, and sample; raise `Incomplete` if a process fails."""
        with ExitStack() as stack:
            started = {name: self._start(stack, name) for name in ("server", *self.names)}
            self._processes = {name: psutil.Process(process.pid) for name, process in started.items()}
            self._watch(started)
            for process in started.values():
                if self.commits < self._num_commits and process.poll() is None:
                    process.send_signal(signal.SIGTERM)
            for name, process in started.items():
                if code := _code_of(process):
                    raise Incomplete(f"{name} ended with {code}: {self._last_words(name)}")

    def _start(self, stack: ExitStack, name: str) -> "subprocess.Popen[bytes]":
        module = "server_backbone" if name == "server" else "client_edge"
        command = [sys.executable, "-m", module, "--config", str(self.folder / f"{name}.toml")]
        command += ["--accept"] if name != "server" else []
        output = stack.enter_context((self.folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        stack.callback(process.wait)
        stack.callback(process.kill)  # first, since callbacks run from the last one on
        return process

    def _watch(self, started: Mapping[str, "subprocess.Popen[bytes]"]) -> None:
        progress_s, until_s = time.monotonic(), float("inf")
        while all(process.poll() is None for process in started.values()):
            now_s = time.monotonic()
            before = self.commits
            self._read_metrics()
            if self.commits > before:
                if not before:  # not from the start of processes that a loaded machine takes a minute to import
                    until_s = now_s + self._seconds
                progress_s = now_s
                self._sample()
            elif now_s - progress_s > (_STALL_S if self.commits else _START_S):
                since = f"no commit for {now_s - progress_s:.0f} s after commit {self.commits}"
                raise Incomplete(f"{since}: {self._last_words('server')}")
            if self.commits >= self._num_commits or (now_s > until_s and self.commits >= _FEWEST_COMMITS):
                return
            time.sleep(_SAMPLE_S)
        for name, process in started.items():
            if process.poll():
                raise Incomplete(f"{name} ended with {process.poll()}: {self._last_words(name)}")

    def _read_metrics(self) -> None:
        for event in self._metrics.new():
            if event["event"] == "step":
                self.commits = max(self.commits, event["commit_number"])
                row = (event["commit_number"], event["bytes_sent"], event["bytes_received"])
                self.record.traffic[event["client_id"]].append(row)

    def _sample(self) -> None:
        for name, process in self._processes.items():
            try:
                memory, descriptors, threads = process.memory_full_info(), process.num_fds(), process.num_threads()
            except psutil.NoSuchProcess:
                return
            self.record.samples[name].append(
                Sample(
                    commit=self.commits,
                    rss_bytes=memory.rss,
                    uss_bytes=memory.uss,
                    descriptors=descriptors,
                    threads=threads,
                )
            )
        self.record.disk.append((self.commits, self._on_disk()))

    def _on_disk(self) -> dict[str, int]:
        found: dict[str, int] = defaultdict(int)
        for side, folder in (("server", self._run_dir), ("client", self.folder / "clients" / "soak" / self.names[0])):
            for path in folder.rglob("*"):
                kind = "metrics" if path.name == "metrics.jsonl" else "state"
                try:
                    found[f"{side}_{kind}"] += path.stat().st_size if path.is_file() else 0
                except FileNotFoundError:
                    continue  # a snapshot that was replaced meanwhile
        return dict(found)

    def _last_words(self, name: str) -> str:
        lines = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _code_of(process: "subprocess.Popen[bytes]") -> int | str:
    try:
        return process.wait(timeout=_PARTING_S)
    except subprocess.TimeoutExpired:
        return f"nothing yet, {_PARTING_S:.0f} s after it was to end"


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One figure of one process: its medians after the first tenth and in the last, and what it grows by."""

    who: str
    what: str
    before: float
    after: float
    per_commit: float

    @property
    def change(self) -> float:
        """The difference as a part of what it was."""
        return self.after / self.before - 1 if self.before else float(self.after > 0)

    @property
    def is_flat(self) -> bool:
        """Whether it is what it was, within the limit; what has fallen by more is no leak, but was not understood."""
        in_passing = self.what in _COUNTS and abs(self.after - self.before) <= 1  # a file that is open for a moment
        return abs(self.change) <= LIMIT or in_passing


def judge(record: Record) -> list[Held]:
    """Compare the second tenth of a run's commits with the last one; raise `Incomplete` if a tenth was not seen."""
    last = max(sample.commit for samples in record.samples.values() for sample in samples)
    found = []
    for name, samples in record.samples.items():
        for what in _HELD:
            points = [(sample.commit, float(getattr(sample, what))) for sample in samples]
            found.append(_held(name, what, points, last))
    for name, rows in record.traffic.items():
        for what, column in (("bytes_sent_per_step", 1), ("bytes_received_per_step", 2)):
            found.append(_held(name, what, list(_per_round(rows, column)), last))
    return found


def _held(who: str, what: str, points: Sequence[tuple[int, float]], last: int) -> Held:
    early = [value for commit, value in points if last * 0.1 < commit <= last * 0.2]
    late = [value for commit, value in points if commit > last * 0.9]
    if not early or not late:
        raise Incomplete(f"{who}: no {what} in the second or the last tenth of {last} commits: let it run longer")
    settled = [(commit, value) for commit, value in points if commit > last * 0.1]
    per_commit = linear_regression(*zip(*settled, strict=True)).slope if len({c for c, _ in settled}) > 1 else 0.0
    return Held(who=who, what=what, before=median(early), after=median(late), per_commit=per_commit)


def _per_round(rows: Sequence[tuple[int, int, int]], column: int) -> Iterable[tuple[int, float]]:
    """Yield what a client's steps took, in each stretch as long as a round: merges and evaluations are in all alike."""
    for first, later in zip(rows[::_LOCAL_STEPS], rows[_LOCAL_STEPS::_LOCAL_STEPS], strict=False):
        yield later[0], (later[column] - first[column]) / _LOCAL_STEPS


def disk_per_commit(record: Record) -> dict[str, float]:
    """Return what each kind of file grew by, from the first tenth on, in bytes per commit."""
    last = record.disk[-1][0]
    first = next(row for row in record.disk if row[0] > last * 0.1)
    between = max(1, last - first[0])
    return {kind: (size - first[1].get(kind, 0)) / between for kind, size in record.disk[-1][1].items()}


def summary(soak: Soak, held: Sequence[Held], *, wall_seconds: float, begun: datetime) -> dict[str, Any]:
    """Put all figures together, as plain values."""
    record = soak.record
    return {
        "commits": soak.commits,
        "clients": len(soak.names),
        "steps_acknowledged": sum(map(len, record.traffic.values())),
        "wall_seconds": round(wall_seconds, 1),
        "keys": True,
        "limit": LIMIT,
        "flat": all(each.is_flat for each in held),
        "figures": [
            {
                "who": each.who,
                "what": each.what,
                "before": each.before,
                "after": each.after,
                "change": round(each.change, 5),
                "per_commit": round(each.per_commit, 3),
                "flat": each.is_flat,
            }
            for each in held
        ],
        "disk_bytes_per_commit": {kind: round(rate, 1) for kind, rate in disk_per_commit(record).items()},
        "disk_bytes": record.disk[-1][1],
        "date": begun.strftime("%Y-%m-%d"),
        "load": os.getloadavg(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {"python": platform.python_version()} | versions_of(("splitfl", "torch", "transformers", "pyzmq")),
    }


def _print(found: Mapping[str, Any]) -> None:
    """Write the server's figures and the worst client's of each kind, and the verdict in the last line."""
    print(f"{'':10} {'':24} {'early':>12} {'late':>12} {'change':>8} {'per commit':>12}")
    for who in ("server", "clients"):
        rows = [row for row in found["figures"] if (row["who"] == "server") == (who == "server")]
        for what in dict.fromkeys(row["what"] for row in rows):
            worst = max((row for row in rows if row["what"] == what), key=lambda row: abs(row["change"]))
            is_size = "bytes" in what
            sizes = [format_bytes(worst[key]) if is_size else f"{worst[key]:g}" for key in ("before", "after")]
            rate = f"{worst['per_commit']:.1f}" + (" B" if is_size else "")
            print(f"{worst['who']:10} {what:24} {sizes[0]:>12} {sizes[1]:>12} {worst['change']:>+8.2%} {rate:>12}")
    for kind, rate in found["disk_bytes_per_commit"].items():
        size = format_bytes(found["disk_bytes"][kind])
        print(f"{kind.replace('_', ' '):35} {size:>12} on disk, {rate:,.0f} bytes per commit")
    broken = [f"{row['who']} {row['what']} {row['change']:+.1%}" for row in found["figures"] if not row["flat"]]
    said = f"flat within {LIMIT:.0%}" if not broken else f"NOT flat within {LIMIT:.0%}: {', '.join(broken)}"
    print(f"soak: {found['commits']} commits of {found['clients']} clients in {found['wall_seconds']:.0f} s, {said}")


def main(argv: list[str] | None = None) -> int:
    """Run it; 0 when all that was measured is flat."""
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--commits", type=int, default=3000)
    parser.add_argument("--minutes", type=float, help="stop this long after the first commit, however many that is")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument(
        "--folder", type=Path, help="where everything is kept; a new one by default, removed at the end"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="splitfl-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    begun, begun_s = datetime.now(UTC), time.monotonic()
    soak = Soak(
        folder,
        num_clients=arguments.clients,
        num_commits=arguments.commits,
        seconds=arguments.minutes * 60 if arguments.minutes else float("inf"),
    )
    try:
        soak.run()
        held = judge(soak.record)
    except Incomplete as error:
        print(f"soak: {error}; see {folder}")
        return 1
    found = summary(soak, held, wall_seconds=time.monotonic() - begun_s, begun=begun)
    _print(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if not arguments.folder and found["flat"]:
        shutil.rmtree(folder)
    return 0 if found["flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
