"""Processes of ours that are there at once: forked from one that has imported what they import.

A test that kills processes and starts them again would else spend most of its time on their imports. That `python -m`
starts them as well is for other tests (tests/models/test_origin.py, tests/commands/test_simulate.py).
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
    """`python -m MODULE ARGUMENTS`, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, module: str, *arguments: str, said: Path, env: Mapping[str, str], accepts: bool = True) -> None:
        """What it writes to standard error goes to the file `said`, what it prints to its neighbour `.out`.

        A client accepts what the server may see, unless it is a test's subject.
        """
        self._said = said
        if module == "client_edge" and accepts:
            arguments = (*arguments, "--accept")
        self._process = _FORKS.Process(target=_run, args=(module, arguments, said, dict(env)), daemon=True)
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


def _run(module: str, arguments: tuple[str, ...], said: Path, env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    for number, path in ((1, said.with_suffix(".out")), (2, said)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
