"""What a client keeps on disk so that it goes on where it was: its gradients of every step, and snapshots.

A step's gradients are written before its commit is sent, and the server's answer after them. So a client that died
knows what it had asked for. The server keeps its last acknowledgement, which settles the rest.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from client_edge.layers.edge import Edge
from client_edge.records.place import Pending, Place
from client_edge.records.snapshots import Snapshots
from splitfl.config.sections import StorageSection
from splitfl.durability.crash import crash_point
from splitfl.durability.record import Record
from splitfl.durability.store import Store
from splitfl.telemetry.history import History


class Journal:
    """This client's records; one thread uses them."""

    def __init__(self, store: Store, edge: Edge, history: History, storage: StorageSection) -> None:
        self._store = store
        self._edge = edge
        self._history = history
        self._keeps_records = storage.durability == "redo"
        self._snapshots = Snapshots(store, edge, storage)
        self.place = Place()
        self.pending: Pending | None = None
        self.is_new = True

    def adopt(self, storage: StorageSection) -> None:
        """Go on with settings of which some have changed."""
        self._snapshots.adopt(storage)
        self._store.adopt(fsync=storage.fsync, fsync_interval=storage.fsync_interval, keep=storage.keep_snapshots)

    def recover(self) -> list[str]:
        """Bring the edge to where the records end; return notes for the user."""
        recovered = self._store.recover()
        if recovered.snapshot is None:
            self.snapshot()
        else:
            self.is_new = False
            self._go_to(recovered.snapshot)
            self._snapshots.find_merge(self.place.held_round)
            for entry in recovered.entries:
                self._redo(entry)
        self._history.note("started", resumed=not self.is_new, step=self.place.step)
        return recovered.notes

    def rewind(self, step: int, commit_number: int, held_round: int) -> bool:
        """Go back to right after a step, with layers of that merge at most; say whether the records reach there."""
        for generation in reversed(self._store.generations()):
            snapshot = self._store.snapshot_of(generation)
            place = Place(**snapshot.fields)
            if place.step <= step and place.held_round <= held_round:
                entries = self._store.entries_of(generation)
                return self._rewind_from(snapshot, entries, (step, commit_number))
        return False

    def _rewind_from(self, snapshot: Record, entries: Iterable[Record], to: tuple[int, int]) -> bool:
        self._go_to(snapshot)
        for entry in entries:
            if (self.place.step, self.place.commit_number) == to:
                break
            self._redo(entry)
        self.pending = None
        self._edge.discard()
        self.snapshot()
        self._history.note("rewound", step=self.place.step)
        return (self.place.step, self.place.commit_number) == to

    def asking(self, *, step: int, num_label_tokens: int, loss: float) -> None:
        """Write a step down before the server is asked for it."""
        gradients = self._edge.gradients() if self._keeps_records else {}
        self.pending = Pending(step=step, num_label_tokens=num_label_tokens, loss=loss, gradients=gradients)
        if self._keeps_records:
            crash_point("step-before-record")
            self._store.append(self.pending.to_record(), durable=True)
            crash_point("step-after-record")
        self._history.note("invoked", step=step)

    def acknowledged(self, *, commit_number: int, clip_coefficient: float) -> Pending:
        """Apply the step that the server has acknowledged, and write that it did."""
        pending = self._settled(commit_number)
        fields = {"commit_number": commit_number, "clip_coefficient": clip_coefficient}
        self._history.note("acknowledged", step=pending.step, **fields)
        # the schedule's horizon may be set anew, and what is done again must be what was done
        fields["learning_rate"] = learning_rate = self._edge.optimizer.learning_rate(pending.step)
        # need not be on disk at once: the server keeps its last acknowledgement for a client that has lost it
        self._append(Record(kind="acknowledged", fields=fields))
        crash_point("step-acknowledged")
        self._edge.step(pending.step, clip_coefficient, learning_rate)
        crash_point("step-applied")
        self._note("applied", pending.step)
        self._snapshots.stepped()
        if self._snapshots.is_due:
            self.snapshot()
        return pending

    def refused(self) -> None:
        """Forget the step that the server was asked for: it is applied on neither side."""
        if self.pending is not None:
            self.pending = None
            self._append(Record(kind="refused", fields={}))
            self._history.note("refused", step=self.place.step + 1)
        self._edge.discard()

    def loaded(self, layers: Iterable[Tensor], held_round: int, *, counted: bool = False) -> None:
        """Take over merged layers, and take a snapshot of this moment; `counted` as in `Edge.load`."""
        crash_point("merge-heard")
        self._edge.discard()
        self._edge.load(list(layers), counted=counted)
        self.pending = None
        self.place = replace(self.place, held_round=held_round, round_tokens=0)
        self.snapshot()

    def begin_at(self, step: int, commit_number: int, reason: str, *, forgets: bool = False) -> None:
        """Count from where the server says this client is, or as if nothing had been yet (`forgets`)."""
        self.pending = None
        self._history.note("rejoined", step=step, reason=reason)
        held_round = 0 if forgets else self.place.held_round
        self.place = replace(self.place, step=step, commit_number=commit_number, held_round=held_round, round_tokens=0)
        self.snapshot()

    def evaluated(self) -> None:
        """Take note that the layers held were evaluated."""
        self.place = replace(self.place, evaluated=self.place.held_round)
        self._append(Record(kind="evaluated", fields={}))

    def evaluates_again(self) -> None:
        """Have the layers held evaluated once more: the measures may not have arrived."""
        if self.place.evaluated >= self.place.held_round:
            self.place = replace(self.place, evaluated=self.place.held_round - 1)

    def snapshot(self) -> None:
        """Write this moment down whole."""
        self._snapshots.take(self.place, self.pending if self._keeps_records else None)

    def stopped(self) -> None:
        """Write this moment down, where steps are in no log: this client, or the server, is stopped in order.

        The server has done so as well, and goes back to this moment if it is killed before the next merge.
        """
        if self._keeps_records or (self.pending is None and self._snapshots.holds(self.place)):
            return
        if self.pending is not None:  # the server may have applied it before it hears that we go
            self.pending = replace(self.pending, gradients=self._edge.gradients())
        self._snapshots.take(self.place, self.pending)

    def finished(self) -> None:
        """Take note that the run is over for this client."""
        self._history.note("finished", digest=self._edge.digest() if self._history.is_on else "")

    def _note(self, event: str, step: int) -> None:
        if self._history.is_on:
            self._history.note(event, step=step, commit_number=self.place.commit_number, digest=self._edge.digest())

    def _append(self, record: Record) -> None:
        if self._keeps_records:
            self._store.append(record, durable=False)

    def _settled(self, commit_number: int) -> Pending:
        if self.pending is None:
            raise RuntimeError("an acknowledgement with no step that it could be for")
        pending, self.pending = self.pending, None
        self.place = replace(
            self.place,
            step=pending.step,
            commit_number=commit_number,
            round_tokens=self.place.round_tokens + pending.num_label_tokens,
        )
        return pending

    def _go_to(self, snapshot: Record) -> None:
        self.place = self._snapshots.go_to(snapshot)
        self.pending = None

    def _redo(self, entry: Record) -> None:
        fields: Mapping[str, Any] = entry.fields
        match entry.kind:
            case "step":
                self.pending = Pending(**fields, gradients=entry.tensors)
                self._edge.set_gradients(entry.tensors)
            case "acknowledged":
                pending = self._settled(fields["commit_number"])
                self._edge.step(pending.step, fields["clip_coefficient"], fields["learning_rate"])
                self._snapshots.stepped()
                self._note("redone", pending.step)
            case "refused":
                self.pending = None
                self._edge.discard()
            case "evaluated":
                self.place = replace(self.place, evaluated=self.place.held_round)
