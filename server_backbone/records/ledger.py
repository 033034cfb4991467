"""The server's records, so that nothing acknowledged is lost: one log for commits, membership, rounds and merges.

Every entry is folded into `RunState` as it is written, and read back the same way. A snapshot is the state and the
tensors of one moment. Recovery is a snapshot with the entries after it. One thread writes: the compute thread, whose
queue also decides the order of the entries. Any thread may read `state`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from server_backbone.compute.blocks_worker import BlocksWorker, Contribution, ReducedStep
from server_backbone.records import entries as log
from server_backbone.records.entries import Entry, from_fields, to_fields
from server_backbone.records.state import RunState
from splitfl.durability.record import Record
from splitfl.durability.store import Store

_LAYERS = "layers/"
_STRATEGY = "strategy/"
_WORKER = "worker/"
_BACKBONE = "backbone/"
# Without kept gradients a log is not done again, but for these entries: they move no weights, or all.
_ALWAYS_REDONE = tuple(
    type_.kind
    for type_ in (
        log.Joined,
        log.Announced,
        log.Finished,
        log.Evaluated,
        log.Judged,
        log.Ended,
        log.Prolonged,
    )
)


NO_TENSORS: Mapping[str, Tensor] = {}


class Ledger:
    """The run's state on disk, and the one way to change it."""

    def __init__(self, store: Store, worker: BlocksWorker, *, keeps_records: bool, snapshot_steps: int) -> None:
        """`keeps_records` is `durability = "redo"`: then commits are redone from the log, else they are forgotten."""
        self._store = store
        self._worker = worker
        self.keeps_records = keeps_records
        self._snapshot_steps = snapshot_steps
        self._commits_since_snapshot = 0
        self.state = RunState()
        self.merged_layers: Mapping[str, Tensor] | None = None
        self.strategy_state: Mapping[str, Tensor] = {}

    @property
    def is_due(self) -> bool:
        """Whether enough was committed since the last snapshot to take another."""
        return self.keeps_records and self._commits_since_snapshot >= self._snapshot_steps

    def is_redone(self, kind: str) -> bool:
        """Whether entries of this kind are done again from the log: all, or only kinds that need no records."""
        return self.keeps_records or kind in _ALWAYS_REDONE

    def begin(self, fingerprint: str) -> None:
        """Write the first snapshot of a new run."""
        self.state = replace(self.state, fingerprint=fingerprint)
        self.snapshot()

    def recover(self, redone: Callable[[int, str], None]) -> list[str]:
        """Bring state and worker to where the log ends; return notes for the operator.

        `redone` is told the number of each commit that was applied again, and a member of it, when it is.
        """
        recovered = self._store.recover()
        snapshot = recovered.snapshot
        if snapshot is None:
            return recovered.notes
        self.go_to(snapshot)
        for record in recovered.entries:
            if self.is_redone(record.kind):
                self.redo(record)
                if record.kind == log.Committed.kind:
                    redone(self.state.commit_number, record.fields["members"][0][0])
        last_kept = max(self._store.kept(), default=0)
        has_lost = last_kept > self.state.commit_number
        # a number names one state for ever
        self.state = replace(self.state, commit_number=max(self.state.commit_number, last_kept))
        if has_lost or not self.keeps_records:
            self.snapshot()  # what is not done again must not be read again
        return recovered.notes

    def go_to(self, snapshot: Record) -> None:
        """Bring state and worker to a snapshot."""
        self.state = RunState.from_fields(snapshot.fields)
        self._worker.load(_without(_WORKER, snapshot.tensors))
        self.merged_layers = _without(_LAYERS, snapshot.tensors) if self.state.num_merged else None
        self.strategy_state = _without(_STRATEGY, snapshot.tensors)

    def is_at(self, snapshot: Record) -> bool:
        """Tell whether state and worker are what a snapshot holds, bit for bit."""
        theirs, mine = _without(_WORKER, snapshot.tensors), self._worker.state()
        is_same = theirs.keys() == mine.keys() and all(torch.equal(theirs[name], mine[name].cpu()) for name in mine)
        return is_same and snapshot.fields == self.state.to_fields()

    def redo(self, record: Record) -> None:
        """Do again what a record says."""
        entry = from_fields(record.kind, record.fields)
        self.state = self.state.after(entry)
        match entry:
            case log.RoundBegan():
                self._worker.begin_round(entry.clients)
            case log.MergeMade():
                self.merged_layers = _without(_LAYERS, record.tensors)
                self.strategy_state = _without(_STRATEGY, record.tensors)
                self._worker.merged(_without(_BACKBONE, record.tensors))
            case log.Committed():
                self._commits_since_snapshot += 1
                self._worker.apply(_step_of(entry, record.tensors))
            case log.WentBack():
                self._worker.load(record.tensors, entry.client_id)
            case log.Ended() if record.tensors:
                self.merged_layers = _without(_LAYERS, record.tensors)
                self._worker.merged(_without(_BACKBONE, record.tensors))

    def write(self, entry: Entry, tensors: Mapping[str, Tensor] = NO_TENSORS) -> None:
        """Write an entry and fold it; one that is `durable` is on the disk when this returns."""
        record = Record(kind=entry.kind, fields=to_fields(entry), tensors=tensors)
        self._store.append(
            record, durable=entry.durable and (self.keeps_records or not isinstance(entry, log.Committed))
        )
        self.state = self.state.after(entry)
        if isinstance(entry, log.Committed | log.WentBack):  # of which the second is as large as a snapshot
            self._commits_since_snapshot += 1

    def commit(self, contributions: Sequence[Contribution], step: ReducedStep) -> int:
        """Write a decided step, to be applied next, and return its number."""
        entry = log.Committed(
            number=self.state.commit_number + 1,
            step=step.step,
            members=[(each.client_id, each.step) for each in contributions],
            tokens=[each.num_label_tokens for each in contributions],
            clip_coefficient=step.clip_coefficient,
            learning_rate=step.learning_rate,
        )
        self.write(entry, step.gradients if self.keeps_records else NO_TENSORS)
        return entry.number

    def merged(
        self,
        entry: log.MergeMade,
        layers: Mapping[str, Tensor],
        strategy_state: Mapping[str, Tensor],
        backbone: Mapping[str, Tensor],
    ) -> None:
        """Write a merge; `backbone` is what it has made of the clients' copies, if there are any."""
        self.merged_layers, self.strategy_state = layers, strategy_state
        self.write(entry, self._tensors_of_the_merge() | _with(_BACKBONE, backbone))

    def ended(
        self, reason: str, best_round: int, best: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None
    ) -> None:
        """Write that no further round is opened.

        `best` are layers and backbone of an earlier round that the run ends with. The entry holds them, so that it can
        be done again without the kept file.
        """
        held_round = self.state.num_merged + (best is not None)
        tensors = NO_TENSORS
        if best is not None:
            self.merged_layers = best[0]
            tensors = _with(_LAYERS, best[0]) | _with(_BACKBONE, best[1])
        self.write(log.Ended(reason=reason, held_round=held_round, best_round=best_round), tensors)

    def snapshot(self) -> None:
        """Write state and tensors of this moment; raise `StorageError` and keep what there was if that fails."""
        tensors = _with(_WORKER, self._worker.state()) | self._tensors_of_the_merge()
        self._store.snapshot(Record(kind="snapshot", fields=self.state.to_fields(), tensors=tensors))
        self._commits_since_snapshot = 0

    def generation_before(self, merge: int) -> int | None:
        """Return the newest snapshot whose layers are of an earlier merge, None if none is kept."""
        for generation in reversed(self._store.generations()):
            if int(self._store.snapshot_of(generation).fields.get("folded_round", 0)) < merge:
                return generation
        return None

    def _tensors_of_the_merge(self) -> dict[str, Tensor]:
        return _with(_LAYERS, self.merged_layers or {}) | _with(_STRATEGY, self.strategy_state)


def _with(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _without(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _step_of(entry: log.Committed, gradients: Mapping[str, Tensor]) -> ReducedStep:
    client_id, _ = entry.members[0]
    return ReducedStep(
        client_id=client_id,
        step=entry.step,
        clip_coefficient=entry.clip_coefficient,
        learning_rate=entry.learning_rate,
        gradients=gradients,
    )
