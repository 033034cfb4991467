"""A client's moments written down whole: when, and which of them are kept."""

from dataclasses import asdict

from client_edge.layers.edge import Edge
from client_edge.records.place import Pending, Place
from splitfl.config.sections import StorageSection
from splitfl.durability.record import Damaged, Record
from splitfl.durability.store import Store


class Snapshots:
    """Snapshots of a client's place and tensors, in generations of its store; one thread uses them."""

    def __init__(self, store: Store, edge: Edge, storage: StorageSection) -> None:
        self._store = store
        self._edge = edge
        self._follow_records = storage.durability == "redo"
        self._every = storage.snapshot_steps
        self._steps_since = 0
        self._saved: Place | None = None
        """Where the last one was taken."""
        self._merge_generation: int | None = None
        """The first one with the layers of the last merge, to which a server without records goes back."""

    def adopt(self, storage: StorageSection) -> None:
        """Go on with settings of which some have changed."""
        self._every = storage.snapshot_steps

    def stepped(self) -> None:
        """Take note of a step since the last one."""
        self._steps_since += 1

    @property
    def is_due(self) -> bool:
        """Whether the log after the last one has become long."""
        return self._follow_records and self._steps_since >= self._every

    def holds(self, place: Place) -> bool:
        """Tell whether the last one is of this place."""
        return self._saved == place

    def take(self, place: Place, pending: Pending | None) -> None:
        """Write this moment down; a step that was asked for follows it, since it is in no log yet."""
        is_of_new_merge = self._saved is None or self._saved.held_round != place.held_round
        record = Record(kind="snapshot", fields=asdict(place), tensors=self._edge.state())
        number = self._store.snapshot(record, holds=None if is_of_new_merge else self._merge_generation)
        if is_of_new_merge and not self._follow_records:
            self._merge_generation = number
        self._saved = place
        self._steps_since = 0
        if pending is not None:
            self._store.append(pending.to_record(), durable=True)

    def go_to(self, snapshot: Record) -> Place:
        """Bring the edge back to a snapshot, and return its place."""
        self._saved = place = Place(**snapshot.fields)
        self._steps_since = 0
        self._edge.restore(snapshot.tensors)
        return place

    def find_merge(self, held_round: int) -> None:
        """Look for the oldest one with the layers of the merge that is held now."""
        if self._follow_records:
            return
        for generation in reversed(self._store.generations()):
            try:
                then = Place(**self._store.snapshot_of(generation).fields)
            except Damaged:
                continue
            if then.held_round != held_round:
                return
            self._merge_generation = generation
