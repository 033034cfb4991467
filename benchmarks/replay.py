"""Trains a finished run again in one process, quietly, in the order that its log holds, and compares every bit.

`python -m benchmarks.replay RUN_DIR CLIENT.toml ...` needs the model and every client's text, and a run whose log is
whole (`storage.keep_snapshots = 0`). It takes order and membership from the log, the schedule's horizon of each start
from the run's events, and nothing else. Activations, gradients and weights are computed anew from the texts.

With `storage.durability = "snapshot"` what the server lost in a crash is left out. A client that crashed begins the
next round with older moments of its optimizer, which the server's log does not say: its own history does.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.history import HISTORY_FILE, begun_anew, last_digests
from client_edge.layers.edge import Edge
from client_edge.text.batches import TrainBatches
from client_edge.text.own_text import read_text
from server_backbone.compute.blocks_worker import COMMON, Contribution, MicroBatch
from server_backbone.compute.copies import digest_in, weights_in
from server_backbone.compute.worker import worker_of
from server_backbone.host import load
from server_backbone.kinds import server_parts
from server_backbone.provisions import prepare
from server_backbone.records import entries as log
from server_backbone.records.entries import from_fields
from server_backbone.run_folder import STATE_DIR
from splitfl.config.kind import BackboneKind, RunKind
from splitfl.config.trees import ClientConfig, RunConfig, ServerConfig
from splitfl.durability.record import Record
from splitfl.durability.store import Store
from splitfl.federation.strategies import strategy_for
from splitfl.federation.strategies.fed_buff import Rebased
from splitfl.federation.strategy import Folded
from splitfl.models.checkpoint import TensorFile
from splitfl.models.source import ADAPTERS_FILE, WEIGHTS_FILE, empty_cut, weights_of
from splitfl.protocol.tensors import digest_of
from splitfl.telemetry.metrics import read_events
from splitfl.training.optimizer import PartOptimizer

_CPU = torch.device("cpu")
_EVENTS_FILE = "metrics.jsonl"


@dataclass(slots=True)
class Replayed:
    """What came out."""

    server: dict[int, str] = field(default_factory=dict)
    """Digest of the server's weights after each commit."""
    clients: dict[str, dict[int, str]] = field(default_factory=dict)
    """Digest of each client's weights after each of its steps."""
    merges: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Horizon:
    """The steps that the learning rate's schedule runs over, from one start of the server to the next."""

    after_commit: int
    num_training_steps: int


def horizons(run_dir: Path, run: RunConfig) -> list[Horizon]:
    """Return what each start has had, in order; that of the settings alone where no events are left."""
    found: list[Horizon] = []
    num_steps = run.num_training_steps
    events = run_dir / _EVENTS_FILE
    for event in read_events(events) if events.exists() else ():
        match event["event"]:
            case "run_started":
                num_steps = event["settings"]["optimizer"]["num_training_steps"]
                if not event["resumed"]:
                    found.append(Horizon(after_commit=0, num_training_steps=num_steps))
            case "resumed":
                found.append(Horizon(after_commit=event["commit_number"], num_training_steps=num_steps))
    return found or [Horizon(after_commit=0, num_training_steps=num_steps)]


def horizon_of(commit_number: int, found: Sequence[Horizon]) -> int:
    """Return the steps of the schedule that a commit was made with: the last start's before it."""
    behind = [each.num_training_steps for each in found if each.after_commit < commit_number]
    return behind[-1] if behind else found[0].num_training_steps


class _Quiet:
    """Server and clients of a run, side by side in this process."""

    def __init__(
        self, run_dir: Path, clients: Sequence[ClientConfig], anew: Mapping[str, Mapping[int, int]], scratch: Path
    ) -> None:
        config = ServerConfig.load(run_dir / "config.toml")
        self.run: RunConfig = config.run_config()
        model = load(config, _CPU)
        provisions = prepare(model.directory, model.cut, model.weights, cache_dir=scratch, run_dir=scratch)
        self.worker = worker_of(model.cut, self.run, server_parts(self.run).gradient_rules(self.run, model.cut), _CPU)
        files = {name: file.path for name, file in provisions.files.items()}
        self.edges = {each.client.client_id: self._edge(each, model.directory, files) for each in clients}
        self.batches = {each.client.client_id: self._batches(each, model.directory) for each in clients}
        self.strategy = strategy_for(self.run.federation, self.run.strategy, self.run.seed)
        first = next(iter(self.edges.values())).layers()
        self.merged = Folded(layers=first | self._backbone(COMMON))
        self.rates = dict.fromkeys(self.edges, 0.0)
        self.known: set[str] = set()
        self.versions = {0: self.merged.layers}
        """Where clients have rounds of their own: everyone's layers after each merge."""
        self.uploads: dict[str, tuple[dict[str, Tensor], int]] = {}
        """And the uploads by name, with the merge that each began with."""
        self.replayed = Replayed(clients={name: {} for name in self.edges})
        self.anew = anew
        """By client: steps at which it began anew, and the step whose state it then had."""
        self.steps = dict.fromkeys(self.edges, 0)
        self.states: dict[tuple[str, int], dict[str, Tensor]] = {}
        """Of a client after a step, where it began anew with that."""
        for name in self.edges:
            self._keep_state(name)
        self.horizons = horizons(run_dir, self.run)
        self.schedules = {
            each.num_training_steps: PartOptimizer({}, self.run.optimizer, each.num_training_steps)
            for each in self.horizons
        }

    def _edge(self, config: ClientConfig, directory: Path, files: Mapping[str, Path]) -> Edge:
        cut, _ = empty_cut(directory, self.run)
        later: Mapping[str, Tensor] = TensorFile(files[ADAPTERS_FILE]) if ADAPTERS_FILE in files else {}
        weights = weights_of([files[WEIGHTS_FILE]], cut, seed=self.run.seed, later=later)
        cut.fill("client", weights.read, _CPU)
        return Edge(cut, self.run, config.client.client_id, _CPU)

    def _batches(self, config: ClientConfig, directory: Path) -> TrainBatches:
        return TrainBatches.of(read_text(config, self.run, directory).train, self.run, config.client)

    def follow(self, record: Record) -> None:
        """Do what a record of the log says was done."""
        match from_fields(record.kind, record.fields):
            case log.RoundBegan(clients=clients):
                self.worker.begin_round(clients)
                self.known |= set(clients)
            case log.Committed() as entry:
                self._commit(entry)
            case log.MergeMade() as entry:
                self._merge(entry, record.tensors)
            case log.TurnBegan(clients=(client_id,)):
                self.edges[client_id].load(list(self.merged.layers.values()))
            case log.Buffered() as entry:
                self.uploads[entry.name] = self.edges[entry.client_id].layers(), entry.begun

    def _commit(self, entry: log.Committed) -> None:
        contributions = [self._compute(client_id, step) for client_id, step in entry.members]
        reduced = self.worker.reduce(contributions)
        coefficient = reduced.clip_coefficient
        if coefficient != entry.clip_coefficient:
            self.replayed.problems.append(f"commit {entry.number}: another clip coefficient")
        schedule = self.schedules[horizon_of(entry.number, self.horizons)]
        self.worker.apply(replace(reduced, learning_rate=schedule.learning_rate(reduced.step)))
        self.replayed.server[entry.number] = digest_in(self.worker.state(reduced.client_id))
        for client_id, step in entry.members:
            rate = schedule.learning_rate(step)
            self.edges[client_id].step(step, coefficient, rate)
            self.rates[client_id] += rate * coefficient
            self.replayed.clients[client_id][step] = self.edges[client_id].digest()
            self._stepped(client_id, step)

    def _stepped(self, client_id: str, step: int) -> None:
        self.steps[client_id] = step
        before = self.anew.get(client_id, {}).get(step)
        if before is not None:
            self.edges[client_id].restore(self.states[client_id, before])
        self._keep_state(client_id)

    def _keep_state(self, client_id: str) -> None:
        step = self.steps[client_id]
        if step in self.anew.get(client_id, {}).values():
            state = self.edges[client_id].state()
            self.states[client_id, step] = {name: tensor.clone() for name, tensor in state.items()}

    def _compute(self, client_id: str, step: int) -> Contribution:
        edge, batches = self.edges[client_id], self.batches[client_id].at(step)
        num_label_tokens = sum(batch.num_label_tokens for batch in batches)
        for number, batch in enumerate(batches):
            micro_batch = edge.bottom_forward(batch, step=step, number=number)
            hidden_BSD = self.worker.forward(
                client_id,
                MicroBatch(
                    hidden_BSD=micro_batch.hidden_BSD.detach(),
                    layout=batch.layout,
                    request_id=number,
                    step=step,
                    micro_batch=number,
                ),
            )
            _, gradient_BSD = edge.top_loss_and_backward(
                micro_batch, hidden_BSD, step=step, num_label_tokens=num_label_tokens
            )
            back = None
            if self.run.backbone_trains or self.run.bottom_trains:
                back = self.worker.backward(client_id, number, gradient_BSD).gradient_BSD
            edge.bottom_backward(micro_batch, back)
        edge.finish_gradients(step)
        norms = edge.optimizer.norms().tolist()
        return Contribution(client_id=client_id, step=step, num_label_tokens=num_label_tokens, norms_P=norms)

    def _merge(self, entry: log.MergeMade, recorded: Mapping[str, Tensor]) -> None:
        if entry.accepted:
            weights = sorted(entry.weights.items())
            updates = [(self._update_of(name, entry.round), weight) for name, weight in weights]
            before, self.merged = (
                self.merged,
                self.strategy.aggregate_train(updates, self.merged.layers, self.merged.state),
            )
            self.merged.state.update(
                self.strategy.aggregate_controls(
                    updates,
                    before.layers,
                    before.state,
                    rates=[self.rates.get(name, 0.0) for name, _ in weights],
                    num_clients=len(self.known),
                )
            )
        backbone = {name: self.merged.layers[name] for name in self._backbone(COMMON)}
        layers = {name: layer for name, layer in self.merged.layers.items() if name not in backbone}
        # as the record has them, in this order
        tensors = [*layers.values(), *self.merged.state.values(), *(backbone.values() if entry.accepted else ())]
        if digest_of(tensors) != digest_of(recorded.values()):
            self.replayed.problems.append(
                f"merge of round {entry.round}: other layers or strategy state than in the log"
            )
        self.replayed.merges[entry.round] = digest_of(layers.values())
        self.versions[entry.round] = layers
        if entry.closes:
            controls = self.strategy.controls(layers, self.merged.state)
            for name, edge in self.edges.items():
                edge.load([*layers.values(), *controls], counted=name in entry.weights)
                self._keep_state(name)
            self.rates = dict.fromkeys(self.edges, 0.0)
        self.worker.merged(backbone)

    def _backbone(self, client_id: str) -> Mapping[str, Tensor]:
        """Return a client's copy of the backbone, or what all copies begin with; nothing where there are none."""
        return weights_in(self.worker.state(client_id)) if self.run.backbone_kind is BackboneKind.COPIES else {}

    def _update_of(self, name: str, number: int) -> Mapping[str, Tensor]:
        """Return a client's layers now, or an upload's of that name as they count in this merge."""
        if self.run.kind is not RunKind.TURNS:
            return self.edges[name].layers() | self._backbone(name)
        layers, begun = self.uploads.pop(name)
        return Rebased(layers, self.versions[begun], self.merged.layers, number - 1 - begun)


def quiet_replay(
    run_dir: Path, clients: Sequence[ClientConfig], histories: Mapping[str, Path] | None = None
) -> Replayed:
    """Train a run again from its log's order; the number of threads must be that of the run."""
    anew = {name: begun_anew(path) for name, path in (histories or {}).items()}
    with tempfile.TemporaryDirectory() as scratch:
        quiet = _Quiet(run_dir, clients, anew, Path(scratch))
        for entry in entries(run_dir, keeps_records=quiet.run.storage.durability == "redo"):
            quiet.follow(entry)
        return quiet.replayed


def differences(run_dir: Path, clients: Sequence[ClientConfig], histories: Mapping[str, Path]) -> list[str]:
    """Train a run again, and name what has other weights than its histories say."""
    replayed = quiet_replay(run_dir, clients, histories)
    found = list(replayed.problems)
    for number, digests in last_digests(run_dir / HISTORY_FILE, "commit_number").items():
        if digests != {replayed.server.get(number)}:
            found.append(f"server: commit {number} has other weights than in the replay")
    for name, path in histories.items():
        for step, digests in last_digests(path, "step").items():
            if digests != {replayed.clients[name].get(step)}:
                found.append(f"{name}: step {step} has other weights than in the replay")
    return found


def entries(run_dir: Path, *, keeps_records: bool = True) -> Iterator[Record]:
    """Yield the whole log of a run, over all its generations; without records, but for what a crash has undone."""
    store = Store.reading(run_dir / STATE_DIR)
    generations = store.generations()
    if not generations or generations[0] != 0:
        raise SystemExit(f"{run_dir}: its log does not begin at the first step: storage.keep_snapshots was not 0")
    for generation, later in itertools.zip_longest(generations, generations[1:]):
        if keeps_records or later is None or _leads_to(store, generation, later):
            yield from store.entries_of(generation)


def _leads_to(store: Store, generation: int, later: int) -> bool:
    """Tell whether a generation's entries lead to the next snapshot, which else is where they began."""
    commit_number, num_merged = _place(store, generation)
    for record in store.entries_of(generation):
        match from_fields(record.kind, record.fields):
            case log.Committed(number=number):
                commit_number = number
            case log.MergeMade(round=round_number):
                num_merged = round_number
    return (commit_number, num_merged) == _place(store, later)


def _place(store: Store, generation: int) -> tuple[int, int]:
    fields = store.snapshot_of(generation).fields
    return int(fields["commit_number"]), int(fields["num_merged"])


def main(argv: list[str] | None = None) -> int:
    """Print what the replay found."""
    parser = argparse.ArgumentParser(prog="benchmarks.replay", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("client_configs", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads, as in the run")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    replayed = quiet_replay(arguments.run_dir, [ClientConfig.load(path) for path in arguments.client_configs])
    for problem in replayed.problems:
        print(problem)
    print(f"{len(replayed.server)} commits and {len(replayed.merges)} merges trained again")
    return 1 if replayed.problems else 0


if __name__ == "__main__":
    sys.exit(main())
