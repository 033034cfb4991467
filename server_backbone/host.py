"""One run from config to report: what `splitfl server` does."""

import json
import os
import platform
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from server_backbone.backbones import backbone_parts
from server_backbone.compute.blocks_worker import COMMON
from server_backbone.compute.copies import digest_in
from server_backbone.compute.placement import DeviceMap, device_map_of, devices_of
from server_backbone.compute.worker import worker_of
from server_backbone.deciding.uploads import owner_of
from server_backbone.disk_space import room_for
from server_backbone.door.admission import Admission
from server_backbone.engine.engine import Engine
from server_backbone.kinds import server_parts
from server_backbone.merging.layers import FirstLayers, Layers
from server_backbone.merging.trained_files import TrainedFiles
from server_backbone.merging.uploads import Uploads
from server_backbone.provisions import prepare
from server_backbone.records.entries import Prolonged
from server_backbone.records.ledger import Ledger
from server_backbone.records.prolonging import has_more_to_do, objection_to_rounds
from server_backbone.records.untold import untold
from server_backbone.run_folder import STATE_DIR, RunFolder, search
from server_backbone.server import Server
from splitfl.config.own import default_cache_dir
from splitfl.config.trees import ServerConfig
from splitfl.durability.crash import crash_point
from splitfl.durability.disk import make_private_dir
from splitfl.durability.store import Store
from splitfl.errors import ConfigError, Incomplete, StorageError
from splitfl.federation.movement import Bound
from splitfl.federation.strategies import strategy_for
from splitfl.models.content import content_sha256, locate_same
from splitfl.models.cut import Cut
from splitfl.models.export import export_model
from splitfl.models.origin import Origin, locate
from splitfl.models.source import Weights, empty_cut, read_config, server_weights
from splitfl.protocol.tensors import Tensors
from splitfl.reporting.display import Display
from splitfl.reporting.report import build_report, measures_table, summary_table, write_report
from splitfl.session.limits import limits_of, messages_queued
from splitfl.stopping import StopRequest
from splitfl.telemetry.history import History
from splitfl.telemetry.memory import peak_rss_bytes
from splitfl.telemetry.metrics import MetricsLog, read_events
from splitfl.telemetry.versions import versions_of
from splitfl.training.backbones import backbone_of
from splitfl.training.device import open_device
from splitfl.training.forecast import Part
from splitfl.training.terms import merged_layers, terms_of
from splitfl.transport.keys import AllowList, read_key_pair
from splitfl.transport.security import ServerSecurity
from splitfl.transport.watch import allow_many_descriptors
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
    copy_bytes: int
    """What each client's own copy of the backbone takes, 0 where they share one."""
    device_map: DeviceMap | None


def serve(
    config: ServerConfig, *, as_json: bool = False, resumes: bool = True, stop: StopRequest | None = None
) -> Path:
    """Serve one run, or go on with it where it was interrupted, and return its folder.

    Nothing is written before the model is loaded and the address is ours. When a `stop` is asked for, the run is saved
    and `Stopped` raised. Raises `Incomplete` when the run ended before its last round.
    """
    begun_s, stop = time.monotonic(), stop or StopRequest()
    if config.server.num_threads:
        torch.set_num_threads(config.server.num_threads)
    allow_many_descriptors()
    device = open_device(config.server.device, "server.device")
    looked_for = search(config, resumes=resumes)
    with ExitStack() as stack:
        security = security_of(config)
        listener = stack.enter_context(listen(config, security))
        listener.self_test()
        origin = locate(config.model.model_name_or_path, _cache_dir(config))
        read_config(origin.directory)  # what is no model at all is said before it is read
        folder = looked_for.settle(content_sha256(origin, _cache_dir(config)))
        config, run_dir = folder.config, folder.path
        model = load(config, device, origin)
        room_for(config, model.cut, run_dir=run_dir if folder.is_resumed else None)
        make_private_dir(run_dir)
        storage = config.storage
        store = stack.enter_context(
            Store(
                run_dir / STATE_DIR,
                fsync=storage.fsync,
                fsync_interval=storage.fsync_interval,
                keep=storage.keep_snapshots,
            )
        )
        console = Console(stderr=as_json, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
        for note in (*folder.notes, *model.notes):
            console.print(f"note: {note}", markup=False)
        metrics = stack.enter_context(MetricsLog(run_dir / "metrics.jsonl"))
        history = stack.enter_context(History(run_dir, is_on=config.server.history, role="server"))
        display = stack.enter_context(Display(console))
        metrics.listen(display)
        server = build_server(config, model, listener, security, store, metrics, history, run_dir, device, stop)
        stop.raises = False  # from here on much can be half done
        notes = _recover(server, folder, history)
        folder.begin()  # not earlier: settings that the model or the run's state refuses are no run's
        about_model = {"bytes_per_copy": model.copy_bytes}
        metrics.emit("run_started", **_description(config, run_dir), **about_model, resumed=folder.is_resumed)
        if folder.changes:
            metrics.emit("settings_changed", changes=[asdict(change) for change in folder.changes])
        if folder.is_resumed:
            _go_on(server, metrics, notes, begun_s)
        metrics.emit("waiting", text=f"clients at {listener.address}")
        try:
            server.serve()
            server.dismiss(server.reason or "the run is over")
            _finish(server, folder, model, listener, history, begun_s)
        except KeyboardInterrupt:
            _suspend(server, listener, run_dir, console, begun_s)
            _report(run_dir, console, as_json=as_json)
            raise
        except (StorageError, Incomplete):
            server.say_shutdown()
            raise
        _report(run_dir, console, as_json=as_json)
    if server.reason:
        raise Incomplete(
            f"the run ended before its last round: {server.reason}; see {run_dir}. The same command goes on with it"
        )
    return run_dir


def _recover(server: Server, folder: RunFolder, history: History) -> list[str]:
    """Begin the ledger of a new run, or bring it to where that of an interrupted one ends; return notes.

    Raises `ConfigError` where that is not where these settings could go on from.
    """
    engine = server.engine
    ledger = engine.ledger

    def redone(commit_number: int, client_id: str) -> None:
        if history.is_on:
            history.note("redone", commit_number=commit_number, digest=digest_in(engine.worker.state(client_id)))
        server.stop.check()  # nothing has been written yet

    notes = ledger.recover(redone) if folder.is_resumed else []
    if not ledger.state.fingerprint:  # new, or ended before its first snapshot
        ledger.begin(folder.config.run_config().fingerprint())
    federation, is_raised = folder.config.federation, folder.raises_num_rounds
    if objection := objection_to_rounds(ledger.state, federation, is_raised=is_raised):
        raise ConfigError(f"{folder.path}: {objection}")
    if has_more_to_do(ledger.state, federation.num_rounds, is_raised=is_raised):
        ledger.write(Prolonged(num_rounds=federation.num_rounds))
    history.note("started", resumed=folder.is_resumed, commit_number=ledger.state.commit_number)
    return notes


def _go_on(server: Server, metrics: MetricsLog, notes: list[str], begun_s: float) -> None:
    """Bring everything to where the ledger of an interrupted run ends."""
    for note in notes:
        metrics.emit("note", text=note)
    engine = server.engine
    for name in engine.restore():
        then = server.kind.then_of_lost
        metrics.emit("note", text=f"the layers that {owner_of(name)} had uploaded cannot be read: {then}")
    state = engine.view.state
    for name, fields in untold(state, read_events(metrics.path), engine.layers.held):
        metrics.emit(name, **fields)
    server.recover()
    metrics.emit(
        "resumed",
        commit_number=state.commit_number,
        round=state.round.number if state.round else state.num_merged,
        clients=sorted(state.members),
        seconds=time.monotonic() - begun_s,
    )


def _suspend(server: Server, listener: Listener, run_dir: Path, console: Console, begun_s: float) -> None:
    """Save a run that is stopped, tell the clients, and write down what this process has taken."""
    server.suspend()
    number = server.engine.ledger.state.commit_number
    reason = f"stopped by its operator after commit {number}; the same command goes on with it"
    server.metrics.emit("run_stopped", **_totals(server, listener, begun_s), reason=reason)
    console.print(
        f"stopped after commit {number}; everything is in {run_dir}, and the same command goes on from there",
        markup=False,
        soft_wrap=True,
    )


def _finish(
    server: Server, folder: RunFolder, model: _Model, listener: Listener, history: History, begun_s: float
) -> None:
    """Export the model of a run that went through, and write the last event."""
    server.stop.raises = True  # all is saved; what is half exported is exported again
    server.stop.check()
    model_dir = _export(folder.config, model, folder.path) if not server.reason else None
    server.stop.raises = False
    if history.is_on:
        history.note("finished", digest=digest_in(server.engine.worker.state(COMMON)))
    totals = _totals(server, listener, begun_s)
    server.metrics.emit("run_finished", **totals, reason=server.reason, model_dir=model_dir)
    if not server.reason:
        folder.finish()


def security_of(config: ServerConfig) -> ServerSecurity | None:
    """Read the key pair and the list of clients; None without keys."""
    folder = config.server.keys
    if folder is None:
        return None
    return ServerSecurity(key_pair=read_key_pair(folder), allow_list=AllowList(folder))


def listen(config: ServerConfig, security: ServerSecurity | None = None) -> Listener:
    """Bind the run's address; encrypted and authenticated if there are keys."""
    link = config.link
    return Listener(
        config.server.address,
        security=security,
        max_frame_bytes=link.frame_bytes,
        max_queued=messages_queued(link),
        heartbeat_interval=link.heartbeat_interval,
        heartbeat_timeout=link.heartbeat_timeout,
    )


def load(config: ServerConfig, device: torch.device, origin: Origin | None = None) -> _Model:
    """Build the model empty, cut it, and read the backbone's tensors; embedding and head never take memory.

    `origin` is where the model lies, if that is known and it is known to be the run's; else it is looked for.
    """
    origin = origin or locate_same(config.model, _cache_dir(config))
    cut, notes = empty_cut(origin.directory, config)
    weights = server_weights(origin, cut, seed=config.seed, cache_dir=_cache_dir(config))
    strategy = config.server.device_map
    device_map = device_map_of(cut, strategy) if strategy else None
    cut.fill("server", weights.read, device, devices_of(cut, device_map) if device_map is not None else {})
    backbone, part = backbone_of(config), Part.of(cut, "server", config.optimizer)
    return _Model(
        directory=origin.directory,
        cut=cut,
        weights=weights,
        notes=[*notes, *backbone.notes(part, config, clients=config.server.max_clients)],
        copy_bytes=backbone.copy_bytes(part),
        device_map=device_map,
    )


def build_server(
    config: ServerConfig,
    model: _Model,
    listener: Listener,
    security: ServerSecurity | None,
    store: Store,
    metrics: MetricsLog,
    history: History,
    run_dir: Path,
    device: torch.device,
    stop: StopRequest,
) -> Server:
    """Put a run's server together."""
    run = config.run_config()
    cut = model.cut
    stored = cut.tensors_of("client")
    layers = merged_layers(run, cut)

    def read(name: str) -> Tensor:
        values = torch.empty(layers[name].shape, dtype=layers[name].dtype)
        model.weights.read(stored[name][0], values)
        return values

    kind = server_parts(run)
    worker = worker_of(cut, run, kind.gradient_rules(run, cut), device, model.device_map)
    storage = run.storage
    ledger = Ledger(store, worker, keeps_records=storage.durability == "redo", snapshot_steps=storage.snapshot_steps)
    backbones = backbone_parts(run)
    kept = backbones.kept(ledger, store, worker, limit=storage.keep_named)
    terms = kind.checked(terms_of(run, cut), partial(worker.blocks.check_packing, run.text.max_seq_length))
    tensors = Tensors(terms.wire_types, frame_bytes=run.link.frame_bytes, max_rms=run.link.max_rms)
    everyones = Layers(strategy_for(run.federation, run.strategy, run.seed), FirstLayers(list(layers), read))
    uploads = Uploads(list(layers), run_dir, run.federation.weight_by, tensors, Bound.of(run))
    merging = kind.merging(run, everyones, uploads, backbones.merged_from(worker), run_dir)
    limits = limits_of(terms, run.link, clients=config.server.max_clients)
    listener.bound_messages(num_bytes=limits.message_bytes, num_frames=limits.message_frames)
    return Server(
        run=run,
        kind=kind,
        run_id=run_dir.name,
        terms=terms,
        limits=limits,
        listener=listener,
        admission=Admission(security.allow_list if security else None, limits),
        engine=Engine(run, kind, backbones, worker, merging, TrainedFiles(run_dir), ledger, kept, history, tensors),
        provisions=prepare(model.directory, cut, model.weights, cache_dir=_cache_dir(config), run_dir=run_dir),
        metrics=metrics,
        history=history,
        stop=stop,
    )


def _cache_dir(config: ServerConfig) -> Path:
    return config.server.cache_dir or default_cache_dir()


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
        "versions": {"python": platform.python_version(), **versions_of(_VERSIONED)},
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
        "compute_seconds": server.engine.view.used.compute_seconds,
        "most_copies": server.engine.view.used.most_copies,
        "pid": os.getpid(),
        "complete": not server.reason,
    }


def _export(config: ServerConfig, model: _Model, run_dir: Path) -> Path | None:
    if not config.server.export_model:
        return None
    crash_point("export-before")
    return export_model(model.cut, model.weights, model.directory, config, run_dir, run_dir / "model", replaces=True)


def _report(run_dir: Path, console: Console, *, as_json: bool) -> None:
    report = build_report(read_events(run_dir / "metrics.jsonl"))
    try:
        write_report(run_dir, report)
    except OSError as error:
        raise StorageError.at(run_dir / "report.json", error) from None
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
        return
    console.print(summary_table(report))
    measures = measures_table(report)
    if measures is not None:
        console.print(measures)
    if report["stopped_early"]:
        console.print(f"stopped early: {report['stopped_early']}", markup=False, soft_wrap=True)
    if report["best_round"]:
        console.print(f"ended with the best round: {report['best_round']}", markup=False)
    console.print(f"run: {run_dir}", markup=False, soft_wrap=True)
