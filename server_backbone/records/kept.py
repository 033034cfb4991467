"""Snapshots that the checkpoints of own-loop clients name: kept apart from the log, and gone back to."""

from abc import ABC, abstractmethod
from dataclasses import asdict

from server_backbone.compute.blocks_worker import BlocksWorker
from server_backbone.records import entries as log
from server_backbone.records.ledger import Ledger
from server_backbone.records.state import MemberState, RunState
from splitfl.durability.record import Record
from splitfl.durability.store import Store


class KeptSnapshots(ABC):
    """The backbone after a commit, for the clients that may need it again."""

    def __init__(self, ledger: Ledger, store: Store, worker: BlocksWorker, *, limit: int) -> None:
        """At most `limit` are kept, the oldest go."""
        self._ledger = ledger
        self._store = store
        self._worker = worker
        self._limit = limit

    def keep(self, client_id: str) -> int:
        """Keep state and tensors of this moment, if they are not kept yet; return their commit."""
        state, number = self._ledger.state, self._weights_of(client_id)
        if number not in self._store.kept():
            kept = Record(kind="kept", fields=state.to_fields(), tensors=self._worker.state(client_id))
            self._store.keep(number, kept, self._limit)
        return number

    def is_where(self, client_id: str, commit_number: int) -> bool:
        """Tell whether the client, and the backbone that it trains, are where they were after a commit."""
        return commit_number == self._weights_of(client_id) == self._member(client_id).commit_number

    def objection_to_going_back(self, client_id: str, commit_number: int) -> str:
        """Say why the backbone cannot go back to a commit for this client, "" when it can."""
        kept = self._store.kept()
        if commit_number not in kept:
            known = ", ".join(map(str, kept)) or "none"
            return (
                f"no snapshot of commit {commit_number} is kept; there are: {known} (storage.keep_named bounds"
                " how many)"
            )
        then = RunState.from_fields(self._store.kept_at(commit_number).fields)
        return self._objection_to(then, client_id, commit_number)

    def go_back(self, client_id: str, commit_number: int) -> None:
        """Bring worker and client back to a kept snapshot.

        The entry holds the tensors, so that it can be done again when the kept file is gone.
        """
        kept = self._store.kept_at(commit_number)
        member = RunState.from_fields(kept.fields).members.get(client_id, MemberState())
        # the client knows its place by the commit it went back to, although that may be another's
        place = asdict(member) | {"commit_number": commit_number}
        self._ledger.write(log.WentBack(client_id=client_id, commit_number=commit_number, member=place), kept.tensors)
        self._worker.load(kept.tensors, client_id)
        if not self._ledger.keeps_records:
            self._ledger.snapshot()

    @abstractmethod
    def _weights_of(self, client_id: str) -> int:
        """Return the commit whose weights this client computes with."""

    @abstractmethod
    def _objection_to(self, then: RunState, client_id: str, commit_number: int) -> str:
        """Say what going back to a state that is kept would undo of others', "" if nothing."""

    def _member(self, client_id: str) -> MemberState:
        return self._ledger.state.members.get(client_id, MemberState())


class KeptOfAll(KeptSnapshots):
    """All clients train the same weights."""

    def _weights_of(self, client_id: str) -> int:
        return self._ledger.state.weights_of

    def _objection_to(self, then: RunState, client_id: str, commit_number: int) -> str:
        others = sorted(
            name
            for name, member in self._ledger.state.members.items()
            if name != client_id and member.step != then.members.get(name, MemberState()).step
        )
        if not others:
            return ""
        return (
            f"{', '.join(others)} has trained the backbone since commit {commit_number}, and going back would undo"
            " that: go on from here, or let the operator take the whole run back with `splitfl rollback`"
        )


class KeptOfEach(KeptSnapshots):
    """A client's copy has the weights of its own last commit, which is nobody else's."""

    def _weights_of(self, client_id: str) -> int:
        return self._member(client_id).commit_number

    def _objection_to(self, then: RunState, client_id: str, commit_number: int) -> str:
        is_mine = then.members.get(client_id, MemberState()).commit_number == commit_number
        return "" if is_mine else f"commit {commit_number} is another client's, whose copy of the backbone it moved"
