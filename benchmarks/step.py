"""A training step split over two processes against the same step in one: seconds, CPU seconds, bytes, bits.

`python -m benchmarks.step --json FILE` compares, within one run and in turns,

- the split step: `python -m server_backbone` and one `python -m client_edge` over tcp loopback, a torch thread each;
- the unsplit step: `benchmarks.unsplit`, plain transformers in one process with one torch thread, once with the same
  micro-batches and once with the whole batch at once; the faster one counts.

Both train all parameters of the same Llama with random weights (33.7 M; blocks 1-6 of 0-7 on the server) with AdamW and
clipping in float32, on the same examples. The split losses must be the unsplit ones bit for bit. Each burst starts all
processes anew; its first step is left out. A ratio is taken round by round, and the median of the rounds is reported.

Not compared: more clients than one, a real network, encryption, a GPU, evaluation, merging, start-up. The unsplit model
uses one core where the split one uses two. So the figures show that splitting costs no time, not that it saves work.
Two idle cores are needed: with one taken by other work nothing can overlap. So steps during which other work kept more
than 0.15 cores busy do not count, unless there are no others. `quiet_steps` says how many were left of each kind.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from benchmarks.material import LLAMA_34M, TINY, Shape, write_lines, write_model
from benchmarks.processes import Watch, python_module, wait_for
from splitfl.commands.fleet import free_port
from splitfl.config.reading import to_toml
from splitfl.config.trees import ClientConfig, ServerConfig
from splitfl.errors import Incomplete
from splitfl.telemetry.metrics import Event, read_events
from splitfl.telemetry.versions import versions_of

_CLIENT_ID = "laptop"
_VERSIONED = ("torch", "transformers", "pyzmq", "msgpack")
_UNSPLIT = ("micro_batches", "one_batch")
# A step during which other work took more than this many cores does not count, if any step does.
_QUIET_CORES = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long to measure, and on what."""

    shape: Shape
    num_rounds: int
    num_steps: int
    """Steps of a burst, those left out included."""
    num_warm_up: int
    """First steps of a burst that are left out: allocators and caches fill, AdamW makes its moments."""


FULL = Plan(shape=LLAMA_34M, num_rounds=3, num_steps=5, num_warm_up=1)
QUICK = Plan(shape=LLAMA_34M, num_rounds=1, num_steps=4, num_warm_up=1)
SMOKE = Plan(shape=TINY, num_rounds=1, num_steps=4, num_warm_up=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One step."""

    seconds: float
    compute_seconds: Mapping[str, float]
    """CPU seconds of the compute thread of "server" and "client", or of "unsplit"."""
    wire_bytes: int
    """Both directions and both connections, framing and heartbeats included, TCP's own headers not."""
    other_cores: float
    """Cores that other work of the machine kept busy meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """Steps in a row, the warm-up left out; the losses are of all steps."""

    steps: Sequence[Timed]
    losses: Sequence[float]

    @property
    def quiet(self) -> list[Timed]:
        """The steps that nothing disturbed."""
        return [step for step in self.steps if step.other_cores <= _QUIET_CORES]


# A burst of each kind ("split", "micro_batches", "one_batch"), taken one right after the other.
Round: TypeAlias = Mapping[str, Burst]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A bound on one of the result's ratios."""

    key: str
    title: str
    bound: float
    at_least: bool

    def is_met(self, value: float) -> bool:
        """Tell whether a measured value keeps the bound."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


TARGETS = (
    Target(key="split_over_unsplit", title="split / unsplit step", bound=0.95, at_least=False),
    Target(
        key="slower_side_compute_over_split_step", title="slower side's compute / split step", bound=0.9, at_least=True
    ),
    Target(key="wire_over_payload", title="wire / payload", bound=1.002, at_least=False),
)


def measure(plan: Plan, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run every burst in turn and return the result; `folder` takes the model, the text and the runs."""
    num_parameters = write_model(folder / "model", plan.shape)
    write_lines(folder / "text.txt", plan.shape, num_lines=plan.num_steps * plan.shape.batch_size)
    rounds = []
    for number in range(plan.num_rounds):
        say(f"round {number + 1} of {plan.num_rounds}")
        rounds.append(_round(plan, folder / f"round-{number}", folder, split_first=number % 2 == 0))
    return {
        **_figures(plan, rounds),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **versions_of(_VERSIONED)},
        "threads": {"server": 1, "client": 1, "unsplit": 1},
        "num_parameters": num_parameters,
        "plan": asdict(plan),
        "rounds": [{kind: asdict(burst) for kind, burst in round_.items()} for round_ in rounds],
    }


def settings(plan: Plan, directory: Path, folder: Path, port: int) -> ServerConfig:
    """Return the run's settings: everything trains, nothing is evaluated or exported."""
    tree = {
        "model": {"model_name_or_path": str(directory), "bottom_layers": 1, "top_layers": 1},
        "train": dict.fromkeys(("bottom", "top", "backbone"), "full")
        | {"loss": "plain", "norm_head": True, "embeddings": True},  # the plain loss, whose bits are compared
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
    port = free_port()
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
        "policy": {"allow_embeddings": True},
    }
    client = ClientConfig.from_tree(tree, source="the benchmark's settings")
    (folder / "server.toml").write_text(to_toml(server), encoding="utf-8")
    (folder / "client.toml").write_text(to_toml(client), encoding="utf-8")
    with Watch() as watch:
        if split_first:
            return {**_split_burst(plan, folder, watch), **_unsplit_bursts(plan, folder, watch)}
        return {**_unsplit_bursts(plan, folder, watch), **_split_burst(plan, folder, watch)}


def _split_burst(plan: Plan, folder: Path, watch: Watch) -> Round:
    with ExitStack() as stack:
        server = stack.enter_context(
            python_module(watch, folder, "server", "server_backbone", "--config", "server.toml")
        )
        client = stack.enter_context(
            python_module(watch, folder, "client", "client_edge", "--config", "client.toml", "--accept")
        )
        wait_for({"client": client, "server": server}, folder)
    at_server = _steps_of(folder / "server" / "run" / "metrics.jsonl", plan.num_steps)
    at_client = _steps_of(folder / "client" / "run" / _CLIENT_ID / "metrics.jsonl", plan.num_steps)
    pairs = list(zip(at_server, at_client, strict=True))[plan.num_warm_up - 1 :]
    steps = [_split_step(before, after, watch) for before, after in pairwise(pairs)]
    return {"split": Burst(steps=steps, losses=[event["loss"] for event in at_client])}


def _split_step(before: tuple[Event, Event], after: tuple[Event, Event], watch: Watch) -> Timed:
    """Return what lies between the (server's, client's) events at the ends of two steps."""

    def added(side: int, name: str) -> Any:
        return after[side][name] - before[side][name]

    return Timed(
        seconds=added(1, "elapsed_s"),
        compute_seconds={"server": added(0, "compute_seconds"), "client": added(1, "compute_seconds")},
        wire_bytes=added(0, "bytes_sent") + added(0, "bytes_received"),
        other_cores=watch.other_cores(before[1]["time"], after[1]["time"]),
    )


def _unsplit_bursts(plan: Plan, folder: Path, watch: Watch) -> Round:
    arguments = ("--server", "server.toml", "--client", "client.toml", "--json", "unsplit.json")
    with python_module(watch, folder, "unsplit", "benchmarks.unsplit", *arguments) as process:
        wait_for({"unsplit": process}, folder)
    found = json.loads((folder / "unsplit.json").read_text(encoding="utf-8"))
    return {kind: _unsplit_burst(found[kind], plan.num_warm_up, watch) for kind in _UNSPLIT}


def _unsplit_burst(found: Mapping[str, list[float]], num_warm_up: int, watch: Watch) -> Burst:
    columns = zip(found["ended_at"], found["seconds"], found["compute_seconds"], strict=True)
    steps = [
        Timed(
            seconds=seconds,
            compute_seconds={"unsplit": compute_seconds},
            wire_bytes=0,
            other_cores=watch.other_cores(ended_at - seconds, ended_at),
        )
        for ended_at, seconds, compute_seconds in columns
    ]
    return Burst(steps=steps[num_warm_up:], losses=found["losses"])


def _steps_of(path: Path, num_steps: int) -> list[Event]:
    steps = [event for event in read_events(path) if event["event"] == "step"]
    if [event["step"] for event in steps] != list(range(1, num_steps + 1)):
        raise Incomplete(f"{path}: {len(steps)} steps where {num_steps} were to be measured; nothing can be compared")
    return steps


# figures


def _figures(plan: Plan, rounds: Sequence[Round]) -> dict[str, Any]:
    unsplit = {kind: _median(rounds, kind, _seconds) for kind in _UNSPLIT}
    fastest = min(unsplit, key=lambda kind: unsplit[kind])
    wire = _median(rounds, "split", lambda step: step.wire_bytes)
    shape = plan.shape
    payload = 4 * shape.batch_size * shape.seq_length * shape.hidden_size * 4
    return {
        "unsplit_seconds": unsplit[fastest],
        "unsplit_seconds_by_kind": unsplit,
        "unsplit_kind": fastest,
        "split_seconds": _median(rounds, "split", _seconds),
        "server_compute_seconds": _median(rounds, "split", lambda step: step.compute_seconds["server"]),
        "client_compute_seconds": _median(rounds, "split", lambda step: step.compute_seconds["client"]),
        "unsplit_compute_seconds": _median(rounds, fastest, lambda step: step.compute_seconds["unsplit"]),
        "wire_bytes_per_step": round(wire),
        "payload_bytes_per_step": payload,
        "split_over_unsplit": _split_over(rounds, fastest),
        "slower_side_compute_over_split_step": _median(
            rounds, "split", lambda step: max(step.compute_seconds.values()) / step.seconds
        ),
        "wire_over_payload": wire / payload,
        "quiet_steps": {kind: sum(len(round_[kind].quiet) for round_ in rounds) for kind in ("split", *_UNSPLIT)},
        "undisturbed": bool(_fair(rounds, fastest)),
        "losses_equal": all(r["split"].losses == r["micro_batches"].losses for r in rounds),
    }


def _seconds(step: Timed) -> float:
    return step.seconds


def _median(rounds: Sequence[Round], kind: str, figure: Callable[[Timed], float]) -> float:
    """Return the median over the quiet steps of all rounds, over all steps if none was quiet."""
    steps = [step for round_ in rounds for step in round_[kind].quiet]
    return statistics.median(figure(step) for step in steps or [s for round_ in rounds for s in round_[kind].steps])


def _split_over(rounds: Sequence[Round], kind: str) -> float:
    """Return the median over the rounds in which both kinds had quiet steps, over all rounds if there was none."""
    fair = _fair(rounds, kind) or rounds
    return statistics.median(_median([r], "split", _seconds) / _median([r], kind, _seconds) for r in fair)


def _fair(rounds: Sequence[Round], kind: str) -> list[Round]:
    return [round_ for round_ in rounds if round_["split"].quiet and round_[kind].quiet]


def summary(result: Mapping[str, Any]) -> Table:
    """Lay out the figures, and each target with whether it is met."""
    table = Table(title=f"split step against unsplit step, {result['num_parameters'] / 1e6:.1f} M parameters")
    table.add_column("figure")
    table.add_column("measured", justify="right")
    table.add_column("target", justify="right")
    for name, seconds in result["unsplit_seconds_by_kind"].items():
        table.add_row(f"unsplit, {name.replace('_', ' ')}, s", f"{seconds:.3f}", "")
    for key in ("split_seconds", "server_compute_seconds", "client_compute_seconds"):
        table.add_row(f"{key.replace('_', ' ').removesuffix(' seconds')}, s", f"{result[key]:.3f}", "")
    for key in ("wire_bytes_per_step", "payload_bytes_per_step"):
        table.add_row(key.replace("_", " "), f"{result[key]:,}", "")
    for target in TARGETS:
        value = result[target.key]
        verdict = "met" if target.is_met(value) else "missed" if result["undisturbed"] else "?"
        table.add_row(target.title, f"{value:.4f}", f"{target} {verdict}")
    table.add_row("losses equal bit for bit", str(result["losses_equal"]).lower(), "")
    quiet = ", ".join(str(number) for number in result["quiet_steps"].values())
    if not result["undisturbed"]:
        table.caption = "other work took a core: the seconds say nothing, run it again on an idle machine"
    table.add_row("undisturbed steps (split, unsplit twice)", quiet, "")
    return table


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
