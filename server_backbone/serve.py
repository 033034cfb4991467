"""One run from config to report: what `splitfl server` does."""

import json
import os
import platform
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from server_backbone.merger import FirstLayers, Merger
from server_backbone.provisions import prepare
from server_backbone.server import Server
from server_backbone.worker import Worker
from splitfl.config import ServerConfig, default_cache_dir, to_toml
from splitfl.errors import ConfigError, Incomplete
from splitfl.federation.strategy import strategy_for
from splitfl.models.checkpoint import TensorFile
from splitfl.models.cut import Cut
from splitfl.models.export import CONFIG_FILE, TRAINED_FILE, write_model
from splitfl.models.source import Weights, empty_cut, locate, server_weights
from splitfl.telemetry.display import Display
from splitfl.telemetry.memory import peak_rss_bytes
from splitfl.telemetry.metrics import MetricsLog, read_events
from splitfl.telemetry.report import build_report, summary_table, write_report
from splitfl.training.device import open_device
from splitfl.training.terms import terms_of
from splitfl.transport.zeromq import Listener

# Columns of the table when the output is no terminal, which would otherwise count as 80 wide.
_PLAIN_WIDTH = 120
_VERSIONED = ("splitfl", "torch", "transformers", "peft", "pyzmq", "msgpack")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """The run's model, its server side filled."""

    directory: Path
    cut: Cut
    weights: Weights
    notes: list[str]


def serve(config: ServerConfig, *, as_json: bool = False) -> Path:
    """Serve one run and return its folder; raise `Incomplete` when it ended before its last round.

    Nothing is written before the model is loaded and the address is ours.
    """
    begun_s = time.monotonic()
    if config.server.num_threads:
        torch.set_num_threads(config.server.num_threads)
    device = open_device(config.server.device, "server.device")
    run_dir = _run_dir(config)
    with ExitStack() as stack:
        listener = stack.enter_context(listen(config))
        model = load(config, device)
        run_dir.mkdir(parents=True, exist_ok=True)
        _write_config(config, run_dir)
        console = Console(stderr=as_json, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
        for note in model.notes:
            console.print(f"note: {note}", markup=False)
        metrics = stack.enter_context(MetricsLog(run_dir / "metrics.jsonl"))
        display = stack.enter_context(Display(console))
        metrics.listen(display)
        server = build_server(config, model, listener, metrics, run_dir, device)
        metrics.emit("run_started", **_description(config, run_dir))
        metrics.emit("waiting", text=f"clients at {listener.address}")
        try:
            server.serve()
        except KeyboardInterrupt:
            server.reason = "stopped by the operator"
            raise
        finally:
            server.stop(server.reason or "the run is over")
            model_dir = _export(config, model, run_dir) if not server.reason else None
            metrics.emit("run_finished", **_totals(server, listener, begun_s), model_dir=model_dir)
            _report(run_dir, console, as_json=as_json)
    if server.reason:
        raise Incomplete(f"the run ended before its last round: {server.reason}; see {run_dir}")
    return run_dir


def listen(config: ServerConfig) -> Listener:
    """Bind the run's address."""
    link = config.link
    return Listener(
        config.server.address,
        max_frame_bytes=link.frame_bytes,
        heartbeat_interval=link.heartbeat_interval,
        heartbeat_timeout=link.heartbeat_timeout,
    )


def load(config: ServerConfig, device: torch.device) -> _Model:
    """Build the model empty, cut it, and read the backbone's tensors; embedding and head never take memory."""
    directory = locate(config.model.model_name_or_path)
    cut, notes = empty_cut(directory, config)
    weights = server_weights(directory, cut, seed=config.seed, cache_dir=_cache_dir(config))
    cut.fill("server", weights.read, device)
    return _Model(directory=directory, cut=cut, weights=weights, notes=notes)


def build_server(
    config: ServerConfig, model: _Model, listener: Listener, metrics: MetricsLog, run_dir: Path, device: torch.device
) -> Server:
    """Put a run's server together."""
    run = config.run_config()
    cut = model.cut
    stored = cut.tensors_of("client")
    trainable = cut.trainable("client")

    def read(name: str) -> Tensor:
        values = torch.empty(trainable[name].shape, dtype=trainable[name].dtype)
        model.weights.read(stored[name][0], values)
        return values

    strategy = strategy_for(run.federation, run.seed)
    return Server(
        run=run,
        run_id=run_dir.name,
        terms=terms_of(run, cut),
        listener=listener,
        worker=Worker(cut, run, device),
        merger=Merger(strategy, FirstLayers(list(trainable), read), run_dir, run.federation.weight_by),
        provisions=prepare(model.directory, cut, model.weights, cache_dir=_cache_dir(config), run_dir=run_dir),
        metrics=metrics,
    )


def _run_dir(config: ServerConfig) -> Path:
    run_id = config.server.run_id or datetime.now().strftime("%Y%m%d-%H%M%S")
    run_dir = config.server.runs_dir / run_id
    if (run_dir / CONFIG_FILE).exists():
        raise ConfigError(
            f"{run_dir} holds a run: set server.run_id to another name, or leave it empty for date and time"
        )
    return run_dir


def _cache_dir(config: ServerConfig) -> Path:
    return config.server.cache_dir or default_cache_dir()


def _write_config(config: ServerConfig, run_dir: Path) -> None:
    """Keep the settings as used; a model's relative path would mean nothing from elsewhere."""
    directory = Path(config.model.model_name_or_path)
    if directory.is_dir():
        model = config.model.model_copy(update={"model_name_or_path": str(directory.resolve())})
        config = config.model_copy(update={"model": model})
    (run_dir / CONFIG_FILE).write_text(to_toml(config), encoding="utf-8")


def _description(config: ServerConfig, run_dir: Path) -> dict[str, Any]:
    run = config.run_config()
    return {
        "run_id": run_dir.name,
        "model": run.model.model_name_or_path,
        "server_mode": run.federation.server_mode,
        "num_rounds": run.federation.num_rounds,
        "local_steps": run.federation.local_steps,
        "fingerprint": run.fingerprint(),
        "pid": os.getpid(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONED}},
        "device": config.server.device,
        "num_threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "settings": json.loads(run.to_json()),
    }


def _totals(server: Server, listener: Listener, begun_s: float) -> dict[str, Any]:
    return {
        "wall_seconds": time.monotonic() - begun_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "bytes_sent": listener.traffic.sent,
        "bytes_received": listener.traffic.received,
        "compute_seconds": server.worker.compute.seconds,
        "pid": os.getpid(),
        "complete": not server.reason,
    }


def _export(config: ServerConfig, model: _Model, run_dir: Path) -> Path | None:
    if not config.server.export_model:
        return None
    trained = TensorFile(run_dir / TRAINED_FILE)
    return write_model(model.cut, model.weights, trained, model.directory, run_dir / "model")


def _report(run_dir: Path, console: Console, *, as_json: bool) -> None:
    report = build_report(read_events(run_dir / "metrics.jsonl"))
    write_report(run_dir, report)
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
        return
    console.print(summary_table(report))
    console.print(f"run: {run_dir}", markup=False, soft_wrap=True)
