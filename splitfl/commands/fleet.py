"""One server and its clients as processes of this machine, from start to end: what `demo` and `simulate` run.

The roles are started by their module names and imported by nobody here.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import tomlkit

from splitfl.errors import Incomplete
from splitfl.stopping import StopRequest
from splitfl.telemetry.memory import pss_bytes

_POLL_S = 0.5
_PARTING_S = 15.0
# Linux gives connections ports from 32768 on, others from 49152 on.
_PORTS = range(12_000, 32_000)


@dataclass(kw_only=True)
class Fleet:
    """The processes of one run."""

    folder: Path
    """Where their settings and logs are written."""
    num_threads: int = 1
    """Threads of each client, where its settings name none."""
    server_threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Threads of the server, which does most of the work: all there are."""
    shows_server: bool = True
    """Whether the server's display is this command's; otherwise it goes to a log."""
    stop: StopRequest = field(default_factory=StopRequest)
    """Whether the command is asked to stop: then the processes are, and end in order."""
    pids: dict[str, int] = field(default_factory=dict, init=False)
    peak_pss_bytes: int = field(default=0, init=False)
    """Most memory all processes held at once, shared pages counted once (PSS; RSS where there is none)."""

    def __post_init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: dict[str, IO[bytes]] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as undo:
            undo.enter_context(_only_noted(self.stop))
            undo.enter_context(_until_hangup(self.stop))
            self.stop.at_once.append(self._kill)
            undo.callback(self.stop.at_once.remove, self._kill)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _t: TracebackType | None
    ) -> None:
        """End whatever still runs: first asked, then made to."""
        for ask in (signal.SIGTERM, signal.SIGKILL):
            running = [process for process in self._processes.values() if process.poll() is None]
            for process in running:
                process.send_signal(ask)
            _wait_for(running, _PARTING_S)
        for log in self._logs.values():
            log.close()
        self._undo.close()
        if kind is None:
            self.stop.check()

    def _kill(self) -> None:
        for process in list(self._processes.values()):
            if process.returncode is None:
                process.kill()

    def start(self, name: str, module: str, settings: Mapping[str, Any]) -> None:
        """Start a role with these settings.

        It is in a process group of its own, since a terminal's Ctrl-C is for this command, which then asks its
        processes to end. Otherwise that would be a second signal to them, which ends them at once.
        """
        self.stop.check()
        config = self.folder / f"{name}.toml"
        config.write_text(tomlkit.dumps(settings), encoding="utf-8")
        output: IO[bytes] | None = None
        if not (name == "server" and self.shows_server):
            output = self._logs[name] = (self.folder / f"{name}.log").open("wb")
        self._processes[name] = subprocess.Popen(
            # the user who starts a whole fleet is both parties
            [sys.executable, "-m", module, "--config", str(config), *(["--accept"] if module == "client_edge" else [])],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            process_group=0,
            env={**os.environ, **_threads(self.server_threads if name == "server" else self.num_threads)},
        )
        self.pids[name] = self._processes[name].pid

    def wait(self, on_exit: Callable[[str, int], None]) -> None:
        """Wait until all have ended, telling of each; raise `Incomplete` when the server failed."""
        left = dict(self._processes)
        while left:
            self._measure()
            for name, process in list(left.items()):
                if (code := process.poll()) is not None:
                    del left[name]
                    on_exit(name, code)
                    if name == "server" and code != 0:
                        raise Incomplete(f"the server ended with exit code {code}; {self.last_words('server')}")
            self.stop.sleep(_POLL_S)

    def last_words(self, name: str) -> str:
        """Return the last line of a process's log."""
        log = self.folder / f"{name}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
        return lines[-1] if lines else f"see {self.folder}"

    def _measure(self) -> None:
        total = pss_bytes(os.getpid()) + sum(map(pss_bytes, self.pids.values()))
        self.peak_pss_bytes = max(self.peak_pss_bytes, total)


@contextmanager
def _only_noted(stop: StopRequest) -> Iterator[None]:
    """Have no exception come in the middle of a start, after which nobody would know the process."""
    before, stop.raises = stop.raises, False
    try:
        yield
    finally:
        stop.raises = before


@contextmanager
def _until_hangup(stop: StopRequest) -> Iterator[None]:
    """Take a closed terminal for a stop: it ends this command's process group alone."""
    before = signal.getsignal(signal.SIGHUP)
    if before is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield  # nohup, or somebody else's affair
        return
    signal.signal(signal.SIGHUP, lambda _number, _frame: stop.ask(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def free_port() -> int:
    """Return a port of loopback that nobody listens on right now, and that no connection is given.

    A system gives connections ports from above these. One of those may be taken while the server is not there yet, or
    is to be started again. Anybody's connection may take it, even one of a client that tries to reach the server.
    """
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _threads(num_threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(num_threads), "TOKENIZERS_PARALLELISM": "false"}


def _wait_for(processes: list[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s and any(process.poll() is None for process in processes):
        time.sleep(0.05)
