"""Processes of ours that are there at once: forked from one that has imported what they import.

A test that kills processes and starts them again would else spend most of its time on their imports. That `python -m`
starts them as well is for other tests (tests/models/test_origin.py, tests/commands/test_simulate.py). The process that
they are forked from has run nothing but imports, and knows nothing of the test.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "server_backbone.host",
        "client_edge.part.run",
        "splitfl.models.families",
        "transformers.models.llama.modeling_llama",
    ]
)


class Forked:
    """`python -m MODULE` or `python SCRIPT` with arguments, and the methods of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        program: str | Path,
        *arguments: str,
        said: Path,
        env: Mapping[str, str] | None = None,
        accepts: bool = True,
        terminal: str = "",
    ) -> None:
        """Start a module by its name, or a script by its path, with this environment instead of the test's own.

        What it writes to standard error goes to the file `said`, what it prints to its neighbour `.out`; with the name
        of a `terminal` both go there, it reads from there, and Ctrl-C there is a signal to it. A client accepts what
        the server may see, unless that is a test's subject.
        """
        self._said = said
        if program == "client_edge" and accepts:
            arguments = (*arguments, "--accept")
        environment = dict(os.environ if env is None else env)
        where = (terminal, said)
        self._process = _FORKS.Process(target=_run, args=(program, arguments, environment, where), daemon=True)
        self._process.start()
        self._lock = threading.Lock()  # its exit code is read from a pipe, once

    @property
    def pid(self) -> int:
        """The process's number."""
        if self._process.pid is None:
            raise RuntimeError("not started")
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, the negative signal's number if that ended it, None while it runs."""
        with self._lock:
            return self._process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal if it is still there."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it without asking."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 300.0) -> int:
        """Wait for its end, and return its exit code; raises `TimeoutError` after that many seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.returncode) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} still runs after {timeout} s; it has said: {self.said()}")
            time.sleep(0.02)
        return code

    def said(self) -> str:
        """Return what it has written to standard error so far."""
        return self._said.read_text(encoding="utf-8") if self._said.exists() else ""

    def printed(self) -> str:
        """Return what it has printed so far."""
        printed = self._said.with_suffix(".out")
        return printed.read_text(encoding="utf-8") if printed.exists() else ""


def _run(program: str | Path, arguments: tuple[str, ...], env: Mapping[str, str], where: tuple[str, Path]) -> None:
    os.environ.clear()
    os.environ.update(env)
    terminal, said = where
    if terminal:
        _take_terminal(terminal)
    else:
        _send_to(said.with_suffix(".out"), 1)
        _send_to(said, 2)
    sys.argv = [str(program), *arguments]
    if isinstance(program, Path):
        runpy.run_path(str(program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _send_to(path: Path, number: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, number)
    os.close(descriptor)


def _take_terminal(name: str) -> None:
    """Be what a shell starts on a terminal: in a session of its own, whose terminal this becomes."""
    os.setsid()
    descriptor = os.open(name, os.O_RDWR)
    for number in range(3):
        os.dup2(descriptor, number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # multiprocessing has it read from nowhere
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
