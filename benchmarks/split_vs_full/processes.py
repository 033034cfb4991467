"""An arm's processes: started in its folder, metered with their descendants, waited for with a deadline, and ended."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

from benchmarks.split_vs_full.meter import Meter, Used
from splitfl.errors import Incomplete

_Process: TypeAlias = "subprocess.Popen[bytes]"

ROOT = Path(__file__).resolve().parents[2]
ARM_LIMIT_S = 40 * 60.0
_PARTING_S = 10.0
_POLL_S = 0.02


class Processes:
    """The processes of one arm; their output goes to NAME.log in the arm's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.begun_s = time.time()
        self._deadline_s = time.monotonic() + ARM_LIMIT_S
        self._meter = Meter()
        self._running: dict[str, _Process] = {}

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._meter.__enter__()
        return self

    def __exit__(self, _k: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        """End whatever still runs, descendants included: first asked, then made to."""
        self._meter.sample()
        self._meter.__exit__(None, None, None)
        members = [pid for name in self._running for pid in self._meter.members(name)]
        for ask in (signal.SIGTERM, signal.SIGKILL):
            for process in self._running.values():
                if process.poll() is None:
                    process.send_signal(ask)
            deadline_s = time.monotonic() + _PARTING_S
            while time.monotonic() < deadline_s and any(p.poll() is None for p in self._running.values()):
                time.sleep(_POLL_S)
        for pid in members:
            if _is_ours(pid, self.folder):
                os.kill(pid, signal.SIGKILL)

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start one; `environment` is laid over ours."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        ours = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            _OURS: str(self.folder),
        }
        with (self.folder / f"{name}.log").open("wb") as log:
            self._running[name] = subprocess.Popen(
                command,
                cwd=self.folder,
                env=ours | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._meter.follow(name, self._running[name].pid)

    def wait(self, names: Sequence[str], tick: Callable[[], None] = lambda: None) -> None:
        """Wait until these have ended well; raise `Incomplete` with the last words of one that has not."""
        self.wait_until(lambda: all(self._has_ended(name) for name in names), tick)

    def wait_until(self, is_done: Callable[[], bool], tick: Callable[[], None] = lambda: None) -> None:
        """Call `tick` until something is the case; raise `Incomplete` when a process fails, or the arm's time is up."""
        while True:
            tick()
            if is_done():
                tick()
                return
            for name in self._running:
                self._has_ended(name)
            if time.monotonic() > self._deadline_s:
                raise Incomplete(f"the arm was given up after {ARM_LIMIT_S / 60:g} minutes; see {self.folder}")
            time.sleep(_POLL_S)

    def used(self, name: str) -> Used:
        """Return what a process and its descendants have used so far."""
        return self._meter.used[name]

    def seconds(self) -> float:
        """Return the seconds since the arm began."""
        return time.time() - self.begun_s

    def _has_ended(self, name: str) -> bool:
        code = self._running[name].poll()
        if code:
            lines = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
            raise Incomplete(f"{name} ended with {code}: {' | '.join(lines[-4:])}; see {self.folder}")
        return code is not None


_OURS = "SPLIT_VS_FULL_ARM"


def _is_ours(pid: int, folder: Path) -> bool:
    """Tell whether a process still runs and is one of this arm's: numbers are given again."""
    try:
        return f"{_OURS}={folder}".encode() in Path("/proc", str(pid), "environ").read_bytes().split(b"\0")
    except OSError:
        return False
