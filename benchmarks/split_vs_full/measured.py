"""What an arm hands back, whichever way it has trained."""

import json
import os
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.split_vs_full.meter import Used, read_marks
from benchmarks.split_vs_full.plan import round_file
from benchmarks.split_vs_full.processes import ROOT
from benchmarks.split_vs_full.relay import Relay
from splitfl.errors import Incomplete


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientUse:
    """What one client used: bytes at its socket, memory, CPU time."""

    bytes_up: int
    bytes_down: int
    peak_rss: int
    """Bytes, of the process that trains."""
    peak_rss_above_imports: int
    tree_peak_rss: int
    """Bytes, of all processes the client needs, at once."""
    cpu_seconds: float
    """Of all processes the client needs."""
    cpu_seconds_above_imports: float
    """Of the process that trains, without what it took to import libraries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEnd:
    """Where a round ended."""

    file: Path
    """The tensors that were trained, by name."""
    seconds: float
    """Since the arm's processes were started."""
    bytes_per_client: float
    """Both directions, mean over the clients, since then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """An arm's trained tensors, and their cost."""

    rounds: Mapping[str, list[RoundEnd]]
    """By model: "everyone", or each client's name where each has trained a model of its own."""
    clients: Mapping[str, ClientUse]
    num_label_tokens: int
    """Label tokens learned from, all clients together."""
    wall_seconds: float
    server_cpu_seconds: float | None = None
    server_peak_rss: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def use_of_marked(
    used: Used, marks_file: Path, *, imports: tuple[int, float] | None = None, relay: Relay | None = None
) -> ClientUse:
    """Combine what was seen from outside with what the training processes have noted of themselves.

    `imports` are (RSS bytes, CPU seconds) of a process that only imports; without, all before the work were imports.
    """
    marks = read_marks(marks_file)
    if imports:
        marks = [mark | {"rss_before": imports[0], "cpu_before": imports[1]} for mark in marks]
    return ClientUse(
        bytes_up=relay.up if relay else 0,
        bytes_down=relay.down if relay else 0,
        peak_rss=max(mark["peak_rss"] for mark in marks),
        peak_rss_above_imports=max(mark["peak_rss"] - mark["rss_before"] for mark in marks),
        tree_peak_rss=max(used.tree_peak_rss, *(mark["peak_rss"] for mark in marks)),
        cpu_seconds=used.cpu_seconds,
        cpu_seconds_above_imports=sum(mark["cpu_after"] - mark["cpu_before"] for mark in marks),
    )


def imports_of(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, float]:
    """Run a program that only imports, and prints its RSS (bytes) and CPU seconds as JSON."""
    plain = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Incomplete(f"a client's imports failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    rss, cpu = json.loads(done.stdout.splitlines()[-1])
    return int(rss), float(cpu)


class RoundWatch:
    """Notes when the file of each round appears, and what every client had sent and received by then."""

    def __init__(
        self, folder: Path, num_rounds: int, seconds: Callable[[], float], relays: Iterable[Relay] = ()
    ) -> None:
        self.rounds: list[RoundEnd] = []
        self._folder = folder
        self._num_rounds = num_rounds
        self._seconds = seconds
        self._relays = list(relays)

    def tick(self) -> None:
        """Look whether the next one is there."""
        file = round_file(self._folder, len(self.rounds) + 1)
        if len(self.rounds) < self._num_rounds and file.exists():
            total = sum(relay.up + relay.down for relay in self._relays)
            share = total / len(self._relays) if self._relays else 0.0
            self.rounds.append(RoundEnd(file=file, seconds=self._seconds(), bytes_per_client=share))
