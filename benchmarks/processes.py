"""Processes under measurement: started in a folder, ended with the block, and watched for what disturbs them."""

import bisect
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

import psutil

from splitfl.errors import Incomplete

Process: TypeAlias = "subprocess.Popen[bytes]"

_ROOT = Path(__file__).resolve().parents[1]
_DEADLINE_S = 300.0
_SAMPLE_S = 0.1


class Watch:
    """Knows how many cores were busy with neither us nor our processes: with a core taken, nothing overlaps."""

    def __init__(self) -> None:
        self._followed: dict[int, float] = {}
        """CPU seconds by process id; of ended processes the last seen."""
        self._times_s: list[float] = []
        self._others_s: list[float] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample_on, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self.follow(os.getpid())
        self._thread.start()
        return self

    def __exit__(self, _k: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        self._stopping.set()
        self._thread.join()

    def follow(self, pid: int) -> None:
        """Count a process of ours as no disturbance."""
        self._followed[pid] = 0.0

    def other_cores(self, begun_s: float, ended_s: float) -> float:
        """Return the mean number of cores that other work kept busy between two times of `time.time()`."""
        first = max(bisect.bisect_right(self._times_s, begun_s) - 1, 0)
        last = min(bisect.bisect_left(self._times_s, ended_s), len(self._times_s) - 1)
        if last <= first:
            return 0.0
        return max(0.0, (self._others_s[last] - self._others_s[first]) / (self._times_s[last] - self._times_s[first]))

    def _sample_on(self) -> None:
        while not self._stopping.wait(_SAMPLE_S):
            for pid in list(self._followed):
                self._followed[pid] = max(self._followed[pid], _cpu_seconds(pid))
            self._others_s.append(_busy_seconds() - sum(self._followed.values()))
            self._times_s.append(time.time())


@contextmanager
def python_module(watch: Watch, folder: Path, name: str, module: str, *arguments: str) -> Iterator[Process]:
    """Start `python -m MODULE` in a folder; its output goes to NAME.log, and it ends with the block at the latest."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / f"{name}.log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        watch.follow(process.pid)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for(processes: Mapping[str, Process], folder: Path) -> None:
    """Wait until all have ended well; raise `Incomplete` with the last lines of the first that has not."""
    deadline_s = time.monotonic() + _DEADLINE_S
    running = dict(processes)
    while running:
        if time.monotonic() > deadline_s:
            raise Incomplete(f"{' and '.join(running)} still running after {_DEADLINE_S:g} s; run with --quick")
        for name, process in list(running.items()):
            if process.poll() is None:
                continue
            if process.returncode:
                lines = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
                raise Incomplete(f"the {name} ended with {process.returncode}: {' | '.join(lines[-5:])}")
            del running[name]
        time.sleep(0.05)


def _busy_seconds() -> float:
    """Return the CPU seconds spent on the whole machine so far, what a hypervisor took away included."""
    times = psutil.cpu_times()._asdict()
    return float(sum(s for name, s in times.items() if name not in ("idle", "iowait", "guest", "guest_nice")))


def _cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)
