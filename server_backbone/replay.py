"""`splitfl replay` and `splitfl rollback`: a run's log read again, and a run taken back to a snapshot."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from server_backbone.compute.blocks_worker import COMMON, BlocksWorker
from server_backbone.compute.copies import digest_in, weights_in
from server_backbone.compute.worker import worker_of
from server_backbone.host import load
from server_backbone.kinds import server_parts
from server_backbone.records.entries import Committed, from_fields
from server_backbone.records.ledger import Ledger
from server_backbone.records.state import RunState
from server_backbone.run_folder import FINISHED_FILE, STATE_DIR
from splitfl.config.trees import ServerConfig
from splitfl.durability.record import Record
from splitfl.durability.store import Store
from splitfl.errors import ConfigError
from splitfl.models.checkpoint import TensorFile
from splitfl.models.export import CONFIG_FILE, TRAINED_FILE
from splitfl.telemetry.metrics import MetricsLog
from splitfl.telemetry.units import counted


@dataclass(slots=True)
class Replay:
    """What a replay found."""

    from_generation: int = 0
    commits: int = 0
    """Done again."""
    snapshots_equal: int = 0
    last_commit: int = 0
    digest: str = ""
    """Of the server's weights at the log's end."""
    steps: dict[str, int] = field(default_factory=dict)
    """Steps in the log, by client."""
    problems: list[str] = field(default_factory=list)


def replay(run_dir: Path) -> Replay:
    """Do a run's log again from its oldest snapshot, and compare with every later one and with what was saved last.

    Commits must follow each other without gap or repeat, each client's steps must rise, and every bit must agree.
    """
    config = _config(run_dir)
    if config.server.num_threads:
        torch.set_num_threads(config.server.num_threads)
    store = Store.reading(run_dir / STATE_DIR)
    generations = store.generations()
    if not generations:
        raise ConfigError(f"{run_dir}: there is no snapshot in {STATE_DIR}/: nothing to do again")
    cpu = torch.device("cpu")
    model = load(config, cpu)
    run = config.run_config()
    worker = worker_of(model.cut, run, server_parts(run).gradient_rules(run, model.cut), cpu, model.device_map)
    keeps_records = config.storage.durability == "redo"
    ledger = Ledger(store, worker, keeps_records=keeps_records, snapshot_steps=1)
    found = Replay(from_generation=generations[0])
    ledger.go_to(store.snapshot_of(generations[0]))
    for generation in generations:
        snapshot = store.snapshot_of(generation)
        if keeps_records or generation == generations[0]:
            _compare(ledger, snapshot, generation, found)
        ledger.go_to(snapshot)
        _follow(ledger, store.entries_of(generation), found)
    found.last_commit, found.digest = ledger.state.commit_number, digest_in(worker.state(COMMON))
    _compare_saved(run_dir, ledger, worker, found)
    return found


def _compare(ledger: Ledger, snapshot: Record, generation: int, found: Replay) -> None:
    if ledger.is_at(snapshot):
        found.snapshots_equal += 1
    else:
        found.problems.append(f"snapshot {generation} has other weights than the log before it leads to")


def _follow(ledger: Ledger, records: Iterator[Record], found: Replay) -> None:
    for record in records:
        if not ledger.is_redone(record.kind):
            continue
        entry = from_fields(record.kind, record.fields)
        if isinstance(entry, Committed):
            _check_order(ledger.state, entry, found)
            found.commits += 1
        ledger.redo(record)


def _check_order(state: RunState, entry: Committed, found: Replay) -> None:
    if entry.number != state.commit_number + 1:
        found.problems.append(f"commit {entry.number} after commit {state.commit_number}")
    for client_id, step in entry.members:
        if step <= state.members[client_id].step:
            found.problems.append(f"{client_id}: step {step} after step {state.members[client_id].step}")
        found.steps[client_id] = found.steps.get(client_id, 0) + 1


def _compare_saved(run_dir: Path, ledger: Ledger, worker: BlocksWorker, found: Replay) -> None:
    path = run_dir / TRAINED_FILE
    is_training = ledger.state.round is not None or ledger.state.turns
    if is_training or not ledger.state.num_merged or not path.exists():
        return  # in the middle of a round the last merge's file is older than the log
    saved = TensorFile(path)
    trained = {**(ledger.merged_layers or {}), **weights_in(worker.state(COMMON))}
    different = [name for name, tensor in trained.items() if not torch.equal(saved[name], tensor)]
    if different:
        found.problems.append(
            f"{TRAINED_FILE}: {counted(len(different), 'tensor differs', 'tensors differ')}, {different[0]} first"
        )


def rollback(run_dir: Path, generation: int | None) -> tuple[int, int]:
    """Take a stopped run back to a snapshot; return its generation and commit number.

    By default that is the last one with fewer commits than the run has, since a server that is stopped takes one too.

    Later records are kept aside (`state/*.dropped`). Clients go back with it when they resume.
    """
    config = _config(run_dir)
    storage = config.storage
    with Store(
        run_dir / STATE_DIR, fsync=storage.fsync, fsync_interval=storage.fsync_interval, keep=storage.keep_snapshots
    ) as store:
        generations = store.generations()
        target = _last_earlier(store, generations) if generation is None else generation
        if target not in generations or target is None:
            known = ", ".join(map(str, generations)) or "none"
            raise ConfigError(f"{run_dir}: no snapshot {generation}; there are: {known}")
        commit_number = int(store.snapshot_of(target).fields["commit_number"])
        store.rewind(target)
        store.forget_kept(above=commit_number)  # their numbers will be given again
    (run_dir / FINISHED_FILE).unlink(missing_ok=True)
    with MetricsLog(run_dir / "metrics.jsonl") as metrics:
        metrics.emit("rolled_back", commit_number=commit_number, generation=target)
    return target, commit_number


def _last_earlier(store: Store, generations: list[int]) -> int | None:
    if not generations:
        return None
    commits = {number: int(store.snapshot_of(number).fields["commit_number"]) for number in generations}
    behind = sum(record.kind == Committed.kind for record in store.entries_of(generations[-1]))
    end = commits[generations[-1]] + behind
    return next((number for number in reversed(generations) if commits[number] < end), None)


def _config(run_dir: Path) -> ServerConfig:
    if not (run_dir / CONFIG_FILE).is_file():
        raise ConfigError(f"{run_dir} is not a server's run folder: it has no {CONFIG_FILE}")
    return ServerConfig.load(run_dir / CONFIG_FILE)
