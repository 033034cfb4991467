"""Snapshots that the checkpoints of own-loop clients name: kept apart from the log, and gone back to."""

from dataclasses import asdict

from server_backbone.compute.blocks_worker import BlocksWorker
from server_backbone.records import entries as log
from server_backbone.records.ledger import Ledger
from server_backbone.records.state import MemberState, RunState
from splitfl.durability.record import Record
from splitfl.durability.store import Store


class KeptSnapshots:
    """The backbone after a commit, for the clients that may need it again."""

    def __init__(self, ledger: Ledger, store: Store, worker: BlocksWorker, *, limit: int, has_copies: bool) -> None:
        """At most `limit` are kept, the oldest go; `has_copies` says that each client trains a copy of its own."""
        self._ledger = ledger
        self._store = store
        self._worker = worker
        self._limit = limit
        self._has_copies = has_copies

    def keep(self, client_id: str) -> int:
        """Keep state and tensors of this moment, if they are not kept yet; return their commit."""
        state = self._ledger.state
        # a client's own copy has the weights of its own last commit, which is nobody else's
        number = self._member(client_id).commit_number if self._has_copies else state.weights_of
        if number not in self._store.kept():
            kept = Record(kind="kept", fields=state.to_fields(), tensors=self._worker.state(client_id))
            self._store.keep(number, kept, self._limit)
        return number

    def is_where(self, client_id: str, commit_number: int) -> bool:
        """Tell whether the client, and the backbone that it trains, are where they were after a commit."""
        is_backbone_there = self._has_copies or self._ledger.state.weights_of == commit_number
        return is_backbone_there and self._member(client_id).commit_number == commit_number

    def objection_to_going_back(self, client_id: str, commit_number: int) -> str:
        """Say why the backbone cannot go back to a commit for this client, "" when it can."""
        kept = self._store.kept()
        if commit_number not in kept:
            known = ", ".join(map(str, kept)) or "none"
            return (
                f"no snapshot of commit {commit_number} is kept; those that are: {known} (storage.keep_named bounds"
                " how many)"
            )
        then = RunState.from_fields(self._store.kept_at(commit_number).fields)
        if self._has_copies:
            is_mine = then.members.get(client_id, MemberState()).commit_number == commit_number
            return "" if is_mine else f"commit {commit_number} is another client's, whose copy of the backbone it moved"
        others = sorted(
            name
            for name, member in self._ledger.state.members.items()
            if name != client_id and member.step != then.members.get(name, MemberState()).step
        )
        if others:
            return (
                f"{', '.join(others)} has trained the backbone since commit {commit_number}, and going back would undo"
                " that: go on from here, or let the operator take the whole run back with `splitfl rollback`"
            )
        return ""

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

    def _member(self, client_id: str) -> MemberState:
        return self._ledger.state.members.get(client_id, MemberState())
