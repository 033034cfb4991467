"""A training step split over two processes against the same step in one: seconds, CPU seconds, bytes, bits.

`python -m benchmarks.step --json FILE` compares, within one run and in turns,

- the split step: `python -m server_backbone` and one `python -m client_edge` over tcp loopback, a torch thread each;
- the unsplit step: `benchmarks.unsplit`, plain transformers in one process with one torch thread, once with the same
  micro-batches and once with the whole batch at once; the faster one counts.

Both train all parameters of the same Llama with random weights (33.7 M; blocks 1-6 of 0-7 on the server) with AdamW and
clipping in float32, on the same examples; the split losses must be the unsplit ones bit for bit. Each burst starts all
processes anew; its first steps are left out. A ratio is taken burst by burst, and the median of the bursts is reported.

Not compared: more clients than one, a real network, encryption, a GPU, evaluation, merging, start-up. The unsplit model
uses one core where the split one uses two: what is shown is that splitting costs no time, not that it saves work.
Two idle cores are needed: `other_cores` says how much of them other work took, and a tenth of a core spoils the ratios.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from benchmarks.material import LLAMA_34M, TINY, Shape, write_lines, write_model
from splitfl.config import ClientConfig, ServerConfig, to_toml
from splitfl.errors import Incomplete
from splitfl.telemetry.metrics import Event, read_events

_CLIENT_ID = "laptop"
_ROOT = Path(__file__).resolve().parents[1]
_VERSIONED = ("torch", "transformers", "pyzmq", "msgpack")
_DEADLINE_S = 300.0
_UNSPLIT = ("micro_batches", "one_batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long to measure, and on what."""

    shape: Shape
    num_bursts: int
    num_steps: int
    """Steps of a burst, those left out included."""
    num_warm_up: int
    """First steps of a burst that are left out: allocators and caches fill, AdamW makes its moments."""


FULL = Plan(shape=LLAMA_34M, num_bursts=3, num_steps=5, num_warm_up=1)
QUICK = Plan(shape=LLAMA_34M, num_bursts=1, num_steps=4, num_warm_up=1)
SMOKE = Plan(shape=TINY, num_bursts=1, num_steps=4, num_warm_up=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One burst of split steps, step by step; all but `losses` without the warm-up."""

    seconds: list[float]
    server_compute_seconds: list[float]
    client_compute_seconds: list[float]
    wire_bytes: list[int]
    """Both directions and both connections, framing and heartbeats included, TCP's own headers not."""
    losses: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsplit:
    """One burst of unsplit steps, step by step; all but `losses` without the warm-up."""

    seconds: list[float]
    compute_seconds: list[float]
    losses: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A burst of each kind, taken one right after the other."""

    order: tuple[str, ...]
    split: Split
    unsplit: Mapping[str, Unsplit]
    other_cores: Mapping[str, float]
    """Cores that other work of the machine kept busy, on average, during each burst."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A bound on one of the result's ratios."""

    key: str
    bound: float
    at_least: bool

    def is_met(self, value: float) -> bool:
        """Tell whether a measured value keeps the bound."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


TARGETS = (
    Target(key="split_over_unsplit", bound=0.95, at_least=False),
    Target(key="slower_side_compute_over_split_step", bound=0.9, at_least=True),
    Target(key="wire_over_payload", bound=1.002, at_least=False),
)


def measure(plan: Plan, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run every burst in turn and return the result; `folder` takes the model, the text and the runs."""
    num_parameters = write_model(folder / "model", plan.shape)
    write_lines(folder / "text.txt", plan.shape, num_lines=plan.num_steps * plan.shape.batch_size)
    rounds = []
    for number in range(plan.num_bursts):
        say(f"burst {number + 1} of {plan.num_bursts}")
        rounds.append(_round(plan, folder / f"burst-{number}", folder, split_first=number % 2 == 0))
    return {
        **_figures(plan, rounds),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONED}},
        "threads": {"server": 1, "client": 1, "unsplit": 1},
        "num_parameters": num_parameters,
        "plan": asdict(plan),
        "bursts": [asdict(round_) for round_ in rounds],
    }


def settings(plan: Plan, directory: Path, folder: Path, port: int) -> ServerConfig:
    """Return the run's settings: everything trains, nothing is evaluated or exported."""
    tree = {
        "model": {"model_name_or_path": str(directory), "bottom_layers": 1, "top_layers": 1},
        "train": {"bottom": "full", "top": "full", "backbone": "full", "norm_head": True, "embeddings": True},
        "optimizer": {"learning_rate": 1e-3, "lr_scheduler_type": "constant"},
        "federation": {
            "num_rounds": 1,
            "local_steps": plan.num_steps,
            "per_device_train_batch_size": plan.shape.micro_batch_size,
            "gradient_accumulation_steps": plan.shape.micro_batches,
        },
        "text": {"max_seq_length": plan.shape.seq_length},
        "server": {
            "address": f"tcp://127.0.0.1:{port}",
            "run_id": "run",
            "runs_dir": folder / "server",
            "cache_dir": folder / "server-cache",
            "num_threads": 1,
            "export_model": False,
        },
    }
    return ServerConfig.from_tree(tree, source="the benchmark's settings")


def _round(plan: Plan, folder: Path, shared: Path, *, split_first: bool) -> Round:
    """Run the bursts one right after the other; the order changes with the round, so that a drift cancels."""
    folder.mkdir()
    port = _free_port()
    server = settings(plan, shared / "model", folder, port)
    tree = {
        "client": {
            "client_id": _CLIENT_ID,
            "server_address": f"tcp://127.0.0.1:{port}",
            "output_dir": folder / "client",
            "cache_dir": folder / "client-cache",
            "num_threads": 1,
        },
        "data": {"path": shared / "text.txt", "eval_fraction": 0.0},
    }
    client = ClientConfig.from_tree(tree, source="the benchmark's settings")
    (folder / "server.toml").write_text(to_toml(server), encoding="utf-8")
    (folder / "client.toml").write_text(to_toml(client), encoding="utf-8")
    bursts: dict[str, Callable[[Plan, Path], Any]] = {"split": _split_burst, "unsplit": _unsplit_burst}
    order = tuple(bursts) if split_first else tuple(reversed(bursts))
    taken: dict[str, Any] = {}
    other_cores: dict[str, float] = {}
    for kind in order:
        with _watch_of_others(kind, other_cores):
            taken[kind] = bursts[kind](plan, folder)
    return Round(order=order, split=taken["split"], unsplit=taken["unsplit"], other_cores=other_cores)


def _split_burst(plan: Plan, folder: Path) -> Split:
    with ExitStack() as stack:
        server = stack.enter_context(_process(folder, "server", "server_backbone", "--config", "server.toml"))
        client = stack.enter_context(_process(folder, "client", "client_edge", "--config", "client.toml"))
        _wait_for({"client": client, "server": server}, folder)
    at_server = _steps_of(folder / "server" / "run" / "metrics.jsonl", plan.num_steps)
    at_client = _steps_of(folder / "client" / "run" / _CLIENT_ID / "metrics.jsonl", plan.num_steps)
    wire = [event["bytes_sent"] + event["bytes_received"] for event in at_server]
    first = plan.num_warm_up - 1
    return Split(
        seconds=_differences([event["elapsed_s"] for event in at_client])[first:],
        server_compute_seconds=_differences([event["compute_seconds"] for event in at_server])[first:],
        client_compute_seconds=_differences([event["compute_seconds"] for event in at_client])[first:],
        wire_bytes=_differences(wire)[first:],
        losses=[event["loss"] for event in at_client],
    )


def _unsplit_burst(plan: Plan, folder: Path) -> dict[str, Unsplit]:
    arguments = ("--server", "server.toml", "--client", "client.toml", "--json", "unsplit.json")
    with _process(folder, "unsplit", "benchmarks.unsplit", *arguments) as process:
        _wait_for({"unsplit": process}, folder)
    found = json.loads((folder / "unsplit.json").read_text(encoding="utf-8"))
    return {
        name: Unsplit(
            seconds=found[name]["seconds"][plan.num_warm_up :],
            compute_seconds=found[name]["compute_seconds"][plan.num_warm_up :],
            losses=found[name]["losses"],
        )
        for name in _UNSPLIT
    }


def _steps_of(path: Path, num_steps: int) -> list[Event]:
    steps = [event for event in read_events(path) if event["event"] == "step"]
    if [event["step"] for event in steps] != list(range(1, num_steps + 1)):
        raise Incomplete(f"{path}: {len(steps)} steps where {num_steps} were to be measured; nothing can be compared")
    return steps


def _differences(totals: Sequence[Any]) -> list[Any]:
    """Return what each step added: entry 0 belongs to the second step."""
    return [after - before for before, after in pairwise(totals)]


# figures


def _figures(plan: Plan, rounds: Sequence[Round]) -> dict[str, Any]:
    unsplit = {name: _median(rounds, _unsplit_seconds(name)) for name in _UNSPLIT}
    fastest = min(unsplit, key=lambda name: unsplit[name])
    wire = _median(rounds, lambda r: statistics.median(r.split.wire_bytes))
    shape = plan.shape
    payload = 4 * shape.batch_size * shape.seq_length * shape.hidden_size * 4
    return {
        "unsplit_seconds": unsplit[fastest],
        "unsplit_seconds_by_kind": unsplit,
        "unsplit_kind": fastest,
        "split_seconds": _median(rounds, _split_seconds),
        "server_compute_seconds": _median(rounds, lambda r: statistics.median(r.split.server_compute_seconds)),
        "client_compute_seconds": _median(rounds, lambda r: statistics.median(r.split.client_compute_seconds)),
        "unsplit_compute_seconds": _median(rounds, lambda r: statistics.median(r.unsplit[fastest].compute_seconds)),
        "wire_bytes_per_step": round(wire),
        "payload_bytes_per_step": payload,
        "split_over_unsplit": _median(rounds, lambda r: _split_seconds(r) / _unsplit_seconds(fastest)(r)),
        "slower_side_compute_over_split_step": _median(rounds, lambda r: _slower_side(r.split) / _split_seconds(r)),
        "wire_over_payload": wire / payload,
        "other_cores": max(cores for r in rounds for cores in r.other_cores.values()),
        "losses_equal": all(r.split.losses == r.unsplit["micro_batches"].losses for r in rounds),
    }


def _median(rounds: Sequence[Round], figure: Callable[[Round], float]) -> float:
    return statistics.median(figure(round_) for round_ in rounds)


def _split_seconds(round_: Round) -> float:
    return statistics.median(round_.split.seconds)


def _unsplit_seconds(kind: str) -> Callable[[Round], float]:
    return lambda round_: statistics.median(round_.unsplit[kind].seconds)


def _slower_side(split: Split) -> float:
    return max(statistics.median(split.server_compute_seconds), statistics.median(split.client_compute_seconds))


def summary(result: Mapping[str, Any]) -> Table:
    """Lay out the figures, and each target with whether it is met."""
    table = Table(title=f"split step against unsplit step, {result['num_parameters'] / 1e6:.1f} M parameters")
    table.add_column("figure")
    table.add_column("measured", justify="right")
    table.add_column("target", justify="right")
    for name, seconds in result["unsplit_seconds_by_kind"].items():
        table.add_row(f"unsplit step, {name.replace('_', ' ')}, s", f"{seconds:.3f}", "")
    for key in ("split_seconds", "server_compute_seconds", "client_compute_seconds"):
        table.add_row(f"{key.replace('_', ' ').removesuffix(' seconds')}, s", f"{result[key]:.3f}", "")
    for key in ("wire_bytes_per_step", "payload_bytes_per_step"):
        table.add_row(key.replace("_", " "), f"{result[key]:,}", "")
    for target in TARGETS:
        value = result[target.key]
        verdict = "met" if target.is_met(value) else "missed"
        table.add_row(target.key.replace("_", " "), f"{value:.4f}", f"{target} {verdict}")
    table.add_row("losses equal bit for bit", str(result["losses_equal"]).lower(), "")
    table.add_row("cores busy with other work, at most", f"{result['other_cores']:.2f}", "")
    return table


# processes


@contextmanager
def _process(folder: Path, name: str, module: str, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
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
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _wait_for(processes: Mapping[str, "subprocess.Popen[bytes]"], folder: Path) -> None:
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


@contextmanager
def _watch_of_others(kind: str, other_cores: dict[str, float]) -> Iterator[None]:
    """Note how many cores were busy with neither us nor our processes: with a core taken, nothing can overlap."""
    begun_s, begun_busy_s, begun_own_s = time.monotonic(), _busy_seconds(), _own_seconds()
    yield
    others_s = _busy_seconds() - begun_busy_s - (_own_seconds() - begun_own_s)
    other_cores[kind] = max(0.0, others_s / (time.monotonic() - begun_s))


def _busy_seconds() -> float:
    """Return the CPU seconds spent on the whole machine so far, what a hypervisor took away included."""
    times = psutil.cpu_times()._asdict()
    return float(sum(s for name, s in times.items() if name not in ("idle", "iowait", "guest", "guest_nice")))


def _own_seconds() -> float:
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _machine() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} x {names[0] if names else 'unknown CPU'}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", dest="plan", const=QUICK, help="one burst of each, under 90 s")
    size.add_argument("--tiny", action="store_const", dest="plan", const=SMOKE, help="a toy model: does it run?")
    arguments = parser.parse_args(argv)
    console = Console()
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="splitfl-step-") as folder:
        result = measure(arguments.plan or FULL, Path(folder), lambda text: console.print(text, markup=False))
    console.print(summary(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
