"""The four server modes against each other on the same text: seconds, server memory and held-out loss.

`python -m benchmarks.server_modes --clients 2 4 8 --json FILE`. A server and its clients are processes over loopback,
one thread each, on a Llama with random weights. The time runs from the first round's opening to the last merge. Ratios
are to `sequential` with as many clients. Everybody shares this machine's cores, so what a mode saves is waiting: with
fewer cores than processes there is little of that to save.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from benchmarks.material import TINY, Shape, write_lines, write_model
from benchmarks.processes import Watch, python_module, wait_for
from splitfl.commands.fleet import free_port
from splitfl.config.reading import to_toml
from splitfl.config.trees import ClientConfig, ServerConfig
from splitfl.telemetry.metrics import read_events
from splitfl.telemetry.units import format_bytes
from splitfl.telemetry.versions import versions_of

MODES = ("sequential", "shared", "per_client", "frozen")
SHAPE = Shape(
    hidden_size=256,
    intermediate_size=704,
    num_blocks=8,
    num_heads=4,
    vocab_size=2048,
    seq_length=64,
    micro_batch_size=4,
    micro_batches=2,
)
_ROUNDS, _STEPS = 2, 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is compared."""

    modes: Sequence[str]
    counts: Sequence[int]
    """Numbers of clients."""
    train: str
    """What trains, on both sides: lora or full."""
    shape: Shape


def measure(plan: Plan, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run every mode with every number of clients; `folder` takes the model, the texts and the runs."""
    write_model(folder / "model", plan.shape)
    for number in range(max(plan.counts)):
        num_lines = _STEPS * _ROUNDS * plan.shape.batch_size
        write_lines(folder / f"{number}.txt", plan.shape, num_lines=num_lines, seed=number)
    write_lines(folder / "held-out.txt", plan.shape, num_lines=32, seed=-1)
    found = []
    for clients in plan.counts:
        for mode in plan.modes:
            say(f"{mode}, {clients} clients")
            found.append({"server_mode": mode, "clients": clients} | _run(mode, clients, plan, folder))
    return {
        "runs": found,
        "train": plan.train,
        "rounds": _ROUNDS,
        "local_steps": _STEPS,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "versions": versions_of(("splitfl", "torch", "transformers", "pyzmq")),
    }


def _run(mode: str, clients: int, plan: Plan, shared: Path) -> dict[str, Any]:
    folder = shared / f"{mode}-{clients}"
    folder.mkdir()
    address = f"tcp://127.0.0.1:{free_port()}"
    _write(folder, "server", ServerConfig.from_tree(_server(mode, clients, plan, shared, address), source="benchmark"))
    for number in range(clients):
        config = ClientConfig.from_tree(_client(number, shared, folder, address), source="benchmark")
        _write(folder, f"client-{number}", config)
    with Watch() as watch, ExitStack() as stack:
        server = python_module(watch, folder, "server", "server_backbone", "--config", "server.toml")
        processes = {"server": stack.enter_context(server)}
        for number in range(clients):
            name = f"client-{number}"
            process = python_module(watch, folder, name, "client_edge", "--config", f"{name}.toml", "--accept")
            processes[name] = stack.enter_context(process)
        wait_for(processes, folder)
    events = read_events(folder / "runs" / "run" / "metrics.jsonl")
    report = json.loads((folder / "runs" / "run" / "report.json").read_text(encoding="utf-8"))
    opened = next(event for event in events if event["event"] == "round_opened")
    merged = [event for event in events if event["event"] == "merged"][-1]
    steps = [event["compute_seconds"] for event in events if event["event"] == "step"]
    return {
        "seconds": merged["elapsed_s"] - opened["elapsed_s"],
        "server_compute_seconds": max(steps) - min(steps),
        "server_peak_rss_bytes": report["server"]["peak_rss_bytes"],
        "copies": report["copies"],
        "eval_loss_before": report["eval_loss_before"],
        "eval_loss_after": report["eval_loss_after"],
        "client_steps": len(steps),
    }


def _server(mode: str, clients: int, plan: Plan, shared: Path, address: str) -> dict[str, Any]:
    return {
        "model": {"model_name_or_path": str(shared / "model")},
        "train": dict.fromkeys(("bottom", "top", "backbone"), plan.train),
        "optimizer": {"learning_rate": 1e-2 if plan.train == "lora" else 1e-3, "lr_scheduler_type": "constant"},
        "federation": {
            "server_mode": mode,
            "num_rounds": _ROUNDS,
            "local_steps": _STEPS,
            "per_device_train_batch_size": plan.shape.micro_batch_size,
            "gradient_accumulation_steps": plan.shape.micro_batches,
            "min_available_clients": clients,
        },
        "text": {"max_seq_length": plan.shape.seq_length},
        "server": {
            "address": address,
            "run_id": "run",
            "runs_dir": "runs",
            "cache_dir": str(shared / "cache"),
            "num_threads": 1,
            "export_model": False,
        },
    }


def _client(number: int, shared: Path, folder: Path, address: str) -> dict[str, Any]:
    return {
        "client": {
            "client_id": f"client-{number}",
            "server_address": address,
            "output_dir": str(folder / "clients"),
            "cache_dir": str(shared / "cache"),
            "num_threads": 1,
            "connect_timeout": 120.0,
        },
        "data": {"path": str(shared / f"{number}.txt"), "eval_path": str(shared / "held-out.txt")},
    }


def _write(folder: Path, name: str, config: ServerConfig | ClientConfig) -> None:
    (folder / f"{name}.toml").write_text(to_toml(config), encoding="utf-8")


def summary(result: Mapping[str, Any]) -> Table:
    """Lay out the runs; `faster` is how many times `sequential`'s speed with as many clients."""
    table = Table(title=f"server modes, {result['train']}")
    for name in ("clients", "mode", "seconds", "faster", "server computes", "server peak", "loss"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    baseline = {run["clients"]: run["seconds"] for run in result["runs"] if run["server_mode"] == "sequential"}
    for run in result["runs"]:
        first = baseline.get(run["clients"])
        table.add_row(
            str(run["clients"]),
            run["server_mode"],
            f"{run['seconds']:.1f}",
            "" if first is None else f"{first / run['seconds']:.2f}",
            f"{run['server_compute_seconds']:.1f} s",
            format_bytes(run["server_peak_rss_bytes"]),
            f"{run['eval_loss_before']:.3f} -> {run['eval_loss_after']:.3f}",
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server_modes", description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 4, 8], metavar="N")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE")
    parser.add_argument("--train", choices=("lora", "full"), default="lora", help="what trains, on both sides")
    parser.add_argument("--tiny", action="store_const", dest="shape", const=TINY, default=SHAPE, help="does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    arguments = parser.parse_args(argv)
    console = Console()
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="splitfl-modes-") as folder:
        plan = Plan(modes=arguments.modes, counts=arguments.clients, train=arguments.train, shape=arguments.shape)
        result = measure(plan, Path(folder), lambda text: console.print(text, markup=False))
    console.print(summary(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
