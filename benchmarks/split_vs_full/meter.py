"""Memory and CPU time of trees of processes, read from /proc (Linux).

Trees are sampled five times a second. The use after a process's last sample is lost: a tenth of a second of CPU time
per process on average. Peak memory is the kernel's own high-water mark, which a later sample still sees.
"""

import json
import os
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from splitfl.telemetry.memory import peak_rss_bytes, rss_bytes

_SAMPLE_S = 0.2
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Mark:
    """A line of JSON on what a block of work took in this process: what was before it are the imports."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        self._begun = {"rss_before": rss_bytes(), "cpu_before": time.process_time()}
        return self

    def __exit__(self, _k: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        ended = {"pid": os.getpid(), "peak_rss": peak_rss_bytes(), "cpu_after": time.process_time()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._begun | ended) + "\n")


def read_marks(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a file of marks; none if there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


@dataclass(slots=True)
class Used:
    """What a tree of processes has used so far."""

    cpu_by_pid: dict[int, float] = field(default_factory=dict)
    peak_by_pid: dict[int, int] = field(default_factory=dict)
    tree_peak_rss: int = 0
    """Most memory all of them held at one sample; pages that two of them share count twice."""

    @property
    def cpu_seconds(self) -> float:
        """Of all of them."""
        return sum(self.cpu_by_pid.values())

    @property
    def peak_rss(self) -> int:
        """Of the largest of them."""
        return max(self.peak_by_pid.values(), default=0)


class Meter:
    """Follows processes by name, with all their descendants, until the block ends."""

    def __init__(self) -> None:
        self.used: dict[str, Used] = {}
        self._roots: dict[str, int] = {}
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._sample_on, name="meter", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, _k: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        self._stopping.set()
        self._thread.join()

    def follow(self, name: str, pid: int) -> None:
        """Count a process and its descendants, those to come included."""
        with self._lock:
            self.used.setdefault(name, Used())
            self._roots[name] = pid

    def members(self, name: str) -> list[int]:
        """Return every process of a tree that was ever seen."""
        with self._lock:
            return [self._roots[name], *self.used[name].cpu_by_pid]

    def _sample_on(self) -> None:
        while not self._stopping.wait(_SAMPLE_S):
            self.sample()

    def sample(self) -> None:
        """Look at all of them now."""
        table = _process_table()
        with self._lock:
            for name, root in self._roots.items():
                self._sample_tree(self.used[name], root, table)

    def _sample_tree(self, used: Used, root: int, table: dict[int, tuple[int, float, int]]) -> None:
        tree, waiting = set[int](), {root, *used.cpu_by_pid}  # a known one stays ours when its parent ends
        while waiting:
            tree |= waiting
            waiting = {pid for pid, (parent, _, _) in table.items() if parent in tree} - tree
        alive = [pid for pid in tree if pid in table]
        for pid in alive:
            used.cpu_by_pid[pid] = max(used.cpu_by_pid.get(pid, 0.0), table[pid][1])
            used.peak_by_pid[pid] = max(used.peak_by_pid.get(pid, 0), _high_water(pid))
        used.tree_peak_rss = max(used.tree_peak_rss, sum(table[pid][2] for pid in alive))


def _process_table() -> dict[int, tuple[int, float, int]]:
    """Return (parent, CPU seconds, RSS bytes) of every process; threads that ended are counted in."""
    table = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208  # half the time of pathlib, five times a second
        if entry.isdigit() and (stat := _stat(entry)):
            fields = stat[stat.rindex(")") + 2 :].split()
            table[int(entry)] = (
                int(fields[1]),
                (int(fields[11]) + int(fields[12])) / _TICKS,
                int(fields[21]) * _PAGE_BYTES,
            )
    return table


def _stat(entry: str) -> str:
    try:
        return Path("/proc", entry, "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has just ended
        return ""


def _high_water(pid: int) -> int:
    try:
        status = Path("/proc", str(pid), "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    line = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(line[1]) * 1024 if line else 0
