"""The split arms: `splitfl server` and a `splitfl client` for each client, as processes on loopback."""

import dataclasses
import os
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.split_vs_full.measured import ClientUse, Outcome, RoundWatch, imports_of
from benchmarks.split_vs_full.meter import Used
from benchmarks.split_vs_full.plan import Cell, Job, round_file
from benchmarks.split_vs_full.processes import Processes
from benchmarks.split_vs_full.relay import Relay
from splitfl.commands.fleet import free_port
from splitfl.config.reading import to_toml
from splitfl.config.trees import ClientConfig, ServerConfig
from splitfl.errors import Incomplete
from splitfl.reporting.view import RunView
from splitfl.reporting.whole_run import whole_run
from splitfl.telemetry.metrics import read_events

_RUN_ID = "run"
# What a client imports before it joins: as tests/test_memory.py counts it.
_IMPORTS = """
import json, sys, time
import peft, transformers.models.llama.modeling_llama
from transformers import AutoTokenizer
import client_edge.part.run
from splitfl.telemetry.memory import rss_bytes
sys.stdout.write(json.dumps([rss_bytes(), time.process_time()]))
"""


def settings(job: Job, cell: Cell, *, server_mode: str, port: int) -> ServerConfig:
    """Return the run's settings; raises `ConfigError` for a mode or strategy that this splitfl has not."""
    full = job.learned.table == "full"
    budget, num_clients = job.budget, len(job.clients)
    tree = {
        "seed": job.seed,
        "model": {"model_name_or_path": str(job.model_dir), "bottom_layers": 1, "top_layers": 1},
        "train": {
            **dict.fromkeys(("bottom", "top", "backbone"), job.learned.table),
            "norm_head": full,
            "embeddings": full,
        },
        "lora": {"r": job.learned.r, "alpha": job.learned.alpha, "target_modules": job.learned.target_modules},
        "optimizer": {"optim": cell.optim, "learning_rate": budget.learning_rate, "lr_scheduler_type": "linear"},
        "federation": {
            "server_mode": server_mode,
            "strategy": cell.strategy,
            "weight_by": cell.weight_by,
            "num_rounds": budget.num_rounds,
            "local_steps": budget.local_steps,
            "per_device_train_batch_size": budget.batch_size,
            "gradient_accumulation_steps": budget.micro_batches,
            "min_available_clients": num_clients,
            "min_train_clients": num_clients,
        },
        "strategy": dict(cell.options),
        "text": {"max_seq_length": budget.max_seq_length},
        # redo records of full training are as large as the model
        "storage": {"durability": "snapshot" if full else "redo"},
        "server": {
            "address": f"tcp://127.0.0.1:{port}",
            "run_id": _RUN_ID,
            "runs_dir": job.out_dir / "server-runs",
            "cache_dir": _cache_dir(job),
            "num_threads": os.cpu_count() or 1,
            "export_model": False,
        },
    }
    return ServerConfig.from_tree(tree, source="the benchmark's settings")


def run_split(job: Job, cell: Cell, *, server_mode: str) -> Outcome:
    """Train split; the clients have the model at home, so no layers are sent before the first round."""
    folder, port = job.out_dir, free_port()
    folder.mkdir(parents=True, exist_ok=True)
    server = settings(job, cell, server_mode=server_mode, port=port)
    (folder / "server.toml").write_text(to_toml(server), encoding="utf-8")
    imports = _imports()
    with ExitStack() as stack:
        processes = stack.enter_context(Processes(folder))
        relays = {name: stack.enter_context(Relay(port)) for name in sorted(job.clients)}
        watch = RoundWatch(folder, job.budget.num_rounds, processes.seconds, relays.values())
        trained = _Kept(folder / "server-runs" / _RUN_ID / "trained.safetensors", folder, job.budget.num_rounds)
        threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
        processes.start("server", _command("server_backbone", folder / "server.toml"), threads)
        for name, relay in relays.items():
            (folder / f"{name}.toml").write_text(to_toml(_client(job, name, relay.port)), encoding="utf-8")
            own = {"OMP_NUM_THREADS": str(job.num_threads)}
            processes.start(name, _command("client_edge", folder / f"{name}.toml"), own)

        def tick() -> None:
            trained.tick()
            watch.tick()

        processes.wait(["server", *relays], tick)
        wall_seconds = processes.seconds()
    if len(watch.rounds) < job.budget.num_rounds:
        raise Incomplete(f"only {len(watch.rounds)} of {job.budget.num_rounds} rounds were merged; see {folder}")
    run = whole_run(read_events(folder / "server-runs" / _RUN_ID / "metrics.jsonl"))
    used = processes.used("server")
    # the tokenizer comes from the server unless an earlier run has brought it: clients of other arms have it at home
    files = {name: client.done["bytes_of_files"] for name, client in run.now.clients.items() if client.done}
    share = sum(files.values()) / len(files)
    rounds = [dataclasses.replace(end, bytes_per_client=end.bytes_per_client - share) for end in watch.rounds]
    return Outcome(
        rounds={"everyone": rounds},
        clients={name: _use(processes.used(name), relay, imports, files[name]) for name, relay in relays.items()},
        num_label_tokens=sum(step.num_label_tokens for steps in run.steps.values() for step in steps.values()),
        wall_seconds=wall_seconds,
        server_cpu_seconds=used.cpu_seconds,
        server_peak_rss=used.peak_rss,
        notes=_own_counts(run.now) | {"bytes_of_files": files},
    )


class _Kept:
    """Keeps the trained tensors of every merge under a name of their own: the server replaces its file each time."""

    def __init__(self, source: Path, folder: Path, num_rounds: int) -> None:
        self._source = source
        self._folder = folder
        self._num_rounds = num_rounds
        self._inode = 0
        self._kept = 0

    def tick(self) -> None:
        """Keep it if it is a new one."""
        if self._kept == self._num_rounds or not self._source.exists():
            return
        half_done = self._folder / "kept.partial"
        half_done.unlink(missing_ok=True)
        os.link(self._source, half_done)
        inode = half_done.stat().st_ino
        if inode == self._inode:
            return
        self._inode = inode
        self._kept += 1
        half_done.replace(round_file(self._folder, self._kept))


def _client(job: Job, name: str, port: int) -> ClientConfig:
    text = job.clients[name]
    tree: dict[str, Any] = {
        "client": {
            "client_id": name,
            "server_address": f"tcp://127.0.0.1:{port}",
            "model_name_or_path": str(job.model_dir),
            "output_dir": job.out_dir / "client-runs",
            "cache_dir": _cache_dir(job),
            "num_threads": job.num_threads,
        },
        "policy": {"allow_embeddings": True},
        "data": {"path": text.train, "eval_fraction": 0.0},  # held-out text is scored apart, the same for all arms
    }
    return ClientConfig.from_tree(tree, source="the benchmark's settings")


def _cache_dir(job: Job) -> Path:
    """Share the prepared parts of a model between the arms."""
    return job.out_dir.parent.parent / "cache"


def _command(module: str, config: Path) -> list[str]:
    accepts = ["--accept"] if module == "client_edge" else []
    return [sys.executable, "-m", module, "--config", str(config), *accepts]


def _use(used: Used, relay: Relay, imports: tuple[int, float], bytes_of_files: int) -> ClientUse:
    rss, cpu = imports
    return ClientUse(
        bytes_up=relay.up,
        bytes_down=relay.down - int(bytes_of_files),
        peak_rss=used.peak_rss,
        peak_rss_above_imports=used.peak_rss - rss,
        tree_peak_rss=used.tree_peak_rss,
        cpu_seconds=used.cpu_seconds,
        cpu_seconds_above_imports=max(0.0, used.cpu_seconds - cpu),
    )


@cache
def _imports() -> tuple[int, float]:
    """Measure (RSS bytes, CPU seconds) of a process that only imports what a client does."""
    return imports_of([sys.executable, "-c", _IMPORTS], {})


def _own_counts(view: RunView) -> dict[str, Any]:
    """Return the bytes that splitfl counts itself, to be compared with the relay's."""
    done = {name: client.done for name, client in view.clients.items() if client.done}
    return {
        "counted_by_splitfl": {
            n: {"up": told["bytes_sent"], "down": told["bytes_received"]} for n, told in done.items()
        }
    }
