"""The server's records, so that nothing acknowledged is lost: one log for commits, membership, rounds and merges.

Every entry is folded into `RunState` as it is written, and read back the same way: a snapshot is the state and the
tensors of one moment, and recovery is a snapshot with the entries after it. One thread writes: the compute thread,
whose queue also decides the order of the entries. Any thread may read `state`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from server_backbone.compute.worker import Contribution, Worker
from server_backbone.records import entries as log
from server_backbone.records.entries import Entry, from_fields, to_fields
from server_backbone.records.state import MemberState, RunState
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

    def __init__(self, store: Store, *, keeps_records: bool, snapshot_steps: int) -> None:
        """`keeps_records` is `durability = "redo"`: then commits are redone from the log, else they are forgotten."""
        self._store = store
        self._keeps_records = keeps_records
        self._snapshot_steps = snapshot_steps
        self._commits_since_snapshot = 0
        self.state = RunState()
        self.merged_layers: Mapping[str, Tensor] | None = None
        self.strategy_state: Mapping[str, Tensor] = {}

    @property
    def is_due(self) -> bool:
        """Whether enough was committed since the last snapshot to take another."""
        return self._keeps_records and self._commits_since_snapshot >= self._snapshot_steps

    def is_redone(self, kind: str) -> bool:
        """Whether entries of this kind are done again from the log: all, or those that need no records."""
        return self._keeps_records or kind in _ALWAYS_REDONE

    def begin(self, fingerprint: str, worker: Worker) -> None:
        """Write the first snapshot of a new run."""
        self.state = replace(self.state, fingerprint=fingerprint)
        self.snapshot(worker)

    def recover(self, worker: Worker, redone: Callable[[int, str], None]) -> list[str]:
        """Bring state and worker to where the log ends; return notes for the operator.

        `redone` is told the number of each commit that was applied again, and a member of it, when it is.
        """
        recovered = self._store.recover()
        snapshot = recovered.snapshot
        if snapshot is None:
            return recovered.notes
        self.go_to(snapshot, worker)
        for record in recovered.entries:
            if self.is_redone(record.kind):
                self.redo(record, worker)
                if record.kind == log.Committed.kind:
                    redone(self.state.commit_number, record.fields["members"][0][0])
        last_kept = max(self._store.kept(), default=0)
        has_lost = last_kept > self.state.commit_number
        # a number names one state for ever
        self.state = replace(self.state, commit_number=max(self.state.commit_number, last_kept))
        if has_lost or not self._keeps_records:
            self.snapshot(worker)  # what is not done again must not be read again
        return recovered.notes

    def go_to(self, snapshot: Record, worker: Worker) -> None:
        """Bring state and worker to a snapshot."""
        self.state = RunState.from_fields(snapshot.fields)
        worker.load(_without(_WORKER, snapshot.tensors))
        self.merged_layers = _without(_LAYERS, snapshot.tensors) if self.state.num_merged else None
        self.strategy_state = _without(_STRATEGY, snapshot.tensors)

    def is_at(self, snapshot: Record, worker: Worker) -> bool:
        """Tell whether state and worker are what a snapshot holds, bit for bit."""
        theirs, mine = _without(_WORKER, snapshot.tensors), worker.state()
        is_same = theirs.keys() == mine.keys() and all(torch.equal(theirs[name], mine[name].cpu()) for name in mine)
        return is_same and snapshot.fields == self.state.to_fields()

    def redo(self, record: Record, worker: Worker) -> None:
        """Do again what a record says."""
        entry = from_fields(record.kind, record.fields)
        self.state = self.state.after(entry)
        match entry:
            case log.RoundBegan():
                worker.begin_round(entry.clients)
            case log.MergeMade():
                self.merged_layers = _without(_LAYERS, record.tensors)
                self.strategy_state = _without(_STRATEGY, record.tensors)
                worker.merged(_without(_BACKBONE, record.tensors))
            case log.Committed():
                self._commits_since_snapshot += 1
                slot, _ = entry.members[0]
                worker.redo(slot, entry.step, entry.clip_coefficient, record.tensors, entry.learning_rate)
            case log.WentBack():
                worker.go_back(entry.client_id, record.tensors)
            case log.Ended() if record.tensors:
                self.merged_layers = _without(_LAYERS, record.tensors)
                worker.load_trained(_without(_BACKBONE, record.tensors))

    def write(self, entry: Entry, tensors: Mapping[str, Tensor] = NO_TENSORS) -> None:
        """Write an entry and fold it; one that is `durable` is on the disk when this returns."""
        record = Record(kind=entry.kind, fields=to_fields(entry), tensors=tensors)
        self._store.append(
            record, durable=entry.durable and (self._keeps_records or not isinstance(entry, log.Committed))
        )
        self.state = self.state.after(entry)

    def commit(
        self,
        contributions: Sequence[Contribution],
        gradients: Mapping[str, Tensor],
        *,
        clip_coefficient: float,
        learning_rate: float,
    ) -> int:
        """Write a decided step, to be applied next, and return its number."""
        entry = log.Committed(
            number=self.state.commit_number + 1,
            step=contributions[0].step,
            members=[(each.slot, each.step) for each in contributions],
            tokens=[each.num_label_tokens for each in contributions],
            clip_coefficient=clip_coefficient,
            learning_rate=learning_rate,
        )
        self.write(entry, gradients if self._keeps_records else NO_TENSORS)
        self._commits_since_snapshot += 1
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

        `best` are layers and backbone of an earlier round that the run ends with; the entry holds them, so that it can
        be done again when the kept file is gone.
        """
        held_round = self.state.num_merged + (best is not None)
        tensors = NO_TENSORS
        if best is not None:
            self.merged_layers = best[0]
            tensors = _with(_LAYERS, best[0]) | _with(_BACKBONE, best[1])
        self.write(log.Ended(reason=reason, held_round=held_round, best_round=best_round), tensors)

    def snapshot(self, worker: Worker) -> None:
        """Write state and tensors of this moment; raise `StorageError` and keep what there was if that fails."""
        tensors = _with(_WORKER, worker.state()) | self._tensors_of_the_merge()
        self._store.snapshot(Record(kind="snapshot", fields=self.state.to_fields(), tensors=tensors))
        self._commits_since_snapshot = 0

    def generation_before(self, merge: int) -> int | None:
        """Return the newest snapshot whose layers are of an earlier merge, None if none is kept."""
        for generation in reversed(self._store.generations()):
            if int(self._store.snapshot_of(generation).fields.get("folded_round", 0)) < merge:
                return generation
        return None

    # snapshots that clients' checkpoints name

    def keep(self, client_id: str, worker: Worker, limit: int) -> int:
        """Keep state and tensors of this moment beside the log, if they are not kept yet; return their commit.

        At most `limit` are kept; the oldest go.
        """
        # a client's own copy has the weights of its own last commit, which is nobody else's
        number = self._member(client_id).commit_number if worker.has_copies else self.state.weights_of
        if number not in self._store.kept():
            kept = Record(kind="kept", fields=self.state.to_fields(), tensors=worker.to_keep(client_id))
            self._store.keep(number, kept, limit)
        return number

    def is_where(self, client_id: str, commit_number: int, worker: Worker) -> bool:
        """Tell whether the client, and the backbone that it trains, are where they were after a commit."""
        is_backbone_there = worker.has_copies or self.state.weights_of == commit_number
        return is_backbone_there and self._member(client_id).commit_number == commit_number

    def _member(self, client_id: str) -> MemberState:
        return self.state.members.get(client_id, MemberState())

    def objection_to_going_back(self, client_id: str, commit_number: int, worker: Worker) -> str:
        """Say why the backbone cannot go back to a commit for this client, "" when it can."""
        kept = self._store.kept()
        if commit_number not in kept:
            known = ", ".join(map(str, kept)) or "none"
            return (
                f"no snapshot of commit {commit_number} is kept; those that are: {known} (storage.keep_named bounds"
                " how many)"
            )
        then = RunState.from_fields(self._store.kept_at(commit_number).fields)
        if worker.has_copies:
            is_mine = then.members.get(client_id, MemberState()).commit_number == commit_number
            return "" if is_mine else f"commit {commit_number} is another client's, whose copy of the backbone it moved"
        others = sorted(
            name
            for name, member in self.state.members.items()
            if name != client_id and member.step != then.members.get(name, MemberState()).step
        )
        if others:
            return (
                f"{', '.join(others)} has trained the backbone since commit {commit_number}, and going back would undo"
                " that: go on from here, or let the operator take the whole run back with `splitfl rollback`"
            )
        return ""

    def go_back(self, client_id: str, commit_number: int, worker: Worker) -> None:
        """Bring worker and client back to a kept snapshot.

        The entry holds the tensors, so that it can be done again when the kept file is gone.
        """
        kept = self._store.kept_at(commit_number)
        member = RunState.from_fields(kept.fields).members.get(client_id, MemberState())
        # the client knows its place by the commit it went back to, although that may be another's
        place = asdict(member) | {"commit_number": commit_number}
        self.write(log.WentBack(client_id=client_id, commit_number=commit_number, member=place), kept.tensors)
        self._commits_since_snapshot += 1  # it is as large as one
        worker.go_back(client_id, kept.tensors)
        if not self._keeps_records:
            self.snapshot(worker)

    def close(self) -> None:
        """Let another process have the folder."""
        self._store.close()

    def _tensors_of_the_merge(self) -> dict[str, Tensor]:
        return _with(_LAYERS, self.merged_layers or {}) | _with(_STRATEGY, self.strategy_state)


def _with(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _without(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
