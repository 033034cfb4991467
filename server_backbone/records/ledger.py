"""What the server writes down so that nothing acknowledged is lost: one log for commits, membership, rounds and merges.

Every entry is folded into `RunState` as it is written, and read back the same way: a snapshot is the state and the
tensors of one moment, and recovery is a snapshot with the entries behind it. One thread uses it: the compute thread,
whose queue also decides the order of the entries.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from server_backbone.compute.worker import Contribution, Worker
from server_backbone.deciding.standing import Standing
from splitfl.config import FederationSection
from splitfl.durability.record import Record
from splitfl.durability.store import Store
from splitfl.session.server import Applied

_LAYERS = "layers/"
_STRATEGY = "strategy/"
_WORKER = "worker/"
_BACKBONE = "backbone/"
# What is not done again from the log of a run whose records are not kept, but for these: they move no weights, or all.
_ALWAYS_REDONE = ("joined", "announced", "finished", "evaluated", "judged", "ended", "prolonged")


@dataclass(slots=True, kw_only=True)
class RoundState:
    """The open round."""

    number: int
    first_step: int
    num_steps: int
    clients: list[str]
    trainers: list[str]
    step: int
    """The step after the highest that was committed: where `shared` is."""
    uploaded: dict[str, float] = field(default_factory=dict)
    """Weights of the uploads on disk, by client."""
    out: list[str] = field(default_factory=list)
    """Clients that the round goes on without."""
    rates: dict[str, float] = field(default_factory=dict)
    """Sum of what each client's gradients of this round were multiplied by: learning rate times clip coefficient."""
    finished: dict[str, int] = field(default_factory=dict)
    """Steps of the round that each client has finished."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Label tokens in them."""
    paths: dict[str, float] = field(default_factory=dict)
    """Sum of their learning rates."""
    moved: dict[str, float] = field(default_factory=dict)
    """How far the uploads on disk have gone of what they may, by client."""


@dataclass(slots=True, kw_only=True)
class BufferedUpload:
    """Layers on disk that wait for a merge, where merges are made as uploads come in."""

    client_id: str
    begun: int
    """The merge whose layers their client began with."""
    weight: float
    moved: float = 0.0
    """How far they have gone from those, of what they may."""


@dataclass(slots=True, kw_only=True)
class MemberState:
    """One client, connected or not."""

    step: int = 0
    commit_number: int = 0
    clip_coefficient: float = 1.0
    next_step: int = 0
    has_finished: bool = False
    num_examples: int = 0
    """What it announced first; what it says later does not count. 0 before that."""
    counted_round: int = 0
    """The last merge that its layers are in."""
    num_label_tokens: int = 0
    """Label tokens in its last step that was committed."""

    @property
    def applied(self) -> Applied:
        """The last step of it that was applied."""
        return Applied(step=self.step, commit_number=self.commit_number, clip_coefficient=self.clip_coefficient)


@dataclass(slots=True, kw_only=True)
class RunState:
    """Where a run stands, in values that a record holds."""

    fingerprint: str = ""
    commit_number: int = 0
    weights_of: int = 0
    """The commit whose weights the backbone has: the last one, or an earlier one that a client has gone back to."""
    num_merged: int = 0
    round: RoundState | None = None
    turns: dict[str, RoundState] = field(default_factory=dict)
    """Open rounds that a client has for itself, by client: see `server_backbone.deciding.turns`."""
    buffer: dict[str, BufferedUpload] = field(default_factory=dict)
    """Uploads of such rounds by their names, in the order in which they came in."""
    members: dict[str, MemberState] = field(default_factory=dict)
    durable_step: int = 0
    """Last step of the last merged round: what `durability = "snapshot"` keeps."""
    held_round: int = 0
    """What clients hold: the number of the last merge, or the one above it once the run ends with an earlier one's."""
    last_merge: dict[str, Any] = field(default_factory=dict)
    """What the log says of the last merge: accepted, reason, weights by upload, how far they have moved, and, with a
    buffer, its uploads."""
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    """What clients measured of the last merge's layers, by client."""
    folded: dict[str, float] = field(default_factory=dict)
    """Who is in everyone's layers, and how far its own had gone of what they may; {} for the first ones."""
    folded_round: int = 0
    """The merge that has made those layers: the last one that was accepted."""
    standing: Standing = field(default_factory=Standing)
    has_ended: bool = False
    """Whether no further round is opened."""
    end_reason: str = ""
    """Why that is before the last round, "" if it is not."""
    ends_with: int = 0
    """The merge whose layers and backbone the run ends with, where that was asked for; else 0."""

    @property
    def num_clients(self) -> int:
        """Clients that have been in a round; who has joined and was never ready only looks on."""
        return sum(member.next_step > 0 for member in self.members.values())

    @property
    def uploaded(self) -> dict[str, float]:
        """Weights of the uploads on disk: by client in an open round, by name in a buffer."""
        if self.round is not None:
            return self.round.uploaded
        return {name: upload.weight for name, upload in self.buffer.items()}

    def round_of(self, client_id: str) -> RoundState | None:
        """Return the open round that a client is in: its own, or everybody's if it was there when that opened."""
        if self.round is not None and client_id in self.round.clients:
            return self.round
        return self.turns.get(client_id)

    def next_step_of(self, client_id: str) -> int:
        """Return where a client's next turn begins."""
        turn, member = self.turns.get(client_id), self.members[client_id]
        return turn.first_step + turn.num_steps if turn is not None else member.next_step

    def objection_to(self, federation: FederationSection, *, is_raised: bool) -> str:
        """Say why a run that stands here cannot have as many rounds as these settings say, "" when it can.

        `is_raised` says that they are more than it had.
        """
        if not federation.num_rounds:
            return ""
        is_open = self.round is not None or bool(self.turns)
        fewest = self.num_merged + is_open
        if federation.num_rounds < fewest:
            opened = f" and round {fewest} is open" if is_open else ""
            return (
                f"federation.num_rounds = {federation.num_rounds}, but {self.num_merged} rounds are merged{opened}: set"
                f" it to {fewest} or more"
            )
        if not is_raised or not self.has_ended:
            return ""
        if self.end_reason:
            return f"the run was stopped early, and more rounds would change nothing: {self.end_reason}"
        if federation.load_best_model_at_end:
            return (
                "the run has ended with the layers of its best round (federation.load_best_model_at_end), so there is"
                " no last round to go on from: begin another run, with the exported model if you like"
            )
        return ""

    def has_more_to_do(self, num_rounds: int, *, is_raised: bool) -> bool:
        """Tell whether clients that had done their part, or rounds that had ended, go on."""
        if self.has_ended:
            return is_raised
        return self.num_merged < num_rounds and any(member.has_finished for member in self.members.values())

    def fold(self, kind: str, entry: Mapping[str, Any]) -> None:
        """Take in one entry."""
        match kind:
            case "joined":
                self.members.setdefault(entry["client_id"], MemberState())
            case "announced":
                self.members[entry["client_id"]].num_examples = entry["num_examples"]
            case "round":
                self.round = RoundState(**entry, step=entry["first_step"])
                for client_id in entry["clients"]:
                    self.members[client_id].next_step = entry["first_step"]
                    self.members[client_id].has_finished = False
            case "commit":
                self._committed(entry)
            case "closed":
                self.members[entry["client_id"]].next_step = entry["next_step"]
            case "uploaded" if self.round is not None:
                self.round.uploaded[entry["client_id"]] = entry["weight"]
                self.round.moved[entry["client_id"]] = entry.get("moved", 0.0)
            case "upload_lost" if self.round is not None:
                self.round.uploaded.pop(entry["client_id"], None)
            case "turn":
                client_id = entry["clients"][0]
                self.turns[client_id] = RoundState(**entry, step=entry["first_step"])
                self.members[client_id].next_step = entry["first_step"]
                self.members[client_id].has_finished = False
            case "buffered":
                self.turns.pop(entry["client_id"])
                self.buffer[entry["name"]] = BufferedUpload(
                    client_id=entry["client_id"],
                    begun=entry["begun"],
                    weight=entry["weight"],
                    moved=entry.get("moved", 0.0),
                )
            case "turn_ended":
                self.turns.pop(entry["client_id"], None)
            case "upload_lost":
                self.buffer.pop(entry["client_id"], None)
            case "left" if self.round is not None:
                self.round.out.append(entry["client_id"])
            case "returned" if self.round is not None:
                self.round.out = [client_id for client_id in self.round.out if client_id != entry["client_id"]]
            case "merge":
                self.durable_step = self.round.first_step + self.round.num_steps - 1 if self.round else 0
                self.num_merged = self.held_round = entry["round"]
                self.last_merge = self._of_merge(entry)
                self.measured = {}
                self.round = None
                if entry["accepted"]:
                    self.folded, self.folded_round = dict(entry.get("moved", {})), entry["round"]
                for client_id in entry["weights"].keys() & self.members.keys():  # a buffer has names of its own
                    self.members[client_id].counted_round = entry["round"]
                for name in entry.get("taken", ()):
                    self.buffer.pop(name)
                if entry.get("closes", True):
                    self.turns, self.buffer = {}, {}
            case "evaluated" if entry["round"] == self.num_merged and self.round is None:
                self.measured[entry["client_id"]] = entry["measured"]
            case "judged":
                self.standing = Standing(**entry)
            case "ended":
                self.has_ended, self.end_reason = True, entry["reason"]
                self.held_round, self.ends_with = entry["held_round"], entry["best_round"]
            case "finished":
                self.members[entry["client_id"]].has_finished = True
            case "prolonged":
                self.has_ended, self.end_reason, self.ends_with = False, "", 0
                for member in self.members.values():
                    member.has_finished = False
            case "went_back":
                self.members[entry["client_id"]] = MemberState(**entry["member"])
                self.weights_of = entry["commit_number"]

    def _of_merge(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is told of a merge; while its uploads are still in the buffer, if it has one."""
        told = {name: entry[name] for name in ("accepted", "reason", "weights")} | {"moved": entry.get("moved", {})}
        if "taken" not in entry:
            return told
        uploads = [
            {
                "name": name,
                "client_id": self.buffer[name].client_id,
                "weight": self.buffer[name].weight,
                "staleness": entry["round"] - 1 - self.buffer[name].begun,
            }
            for name in entry["taken"]
        ]
        return told | {"uploads": uploads}

    def _committed(self, entry: Mapping[str, Any]) -> None:
        self.commit_number = self.weights_of = entry["number"]
        for (client_id, step), num_tokens in zip(entry["members"], entry["tokens"], strict=True):
            member = self.members[client_id]
            member.step, member.next_step = step, step + 1
            member.commit_number, member.clip_coefficient = entry["number"], entry["clip_coefficient"]
            member.num_label_tokens = num_tokens
            round_ = self.round if self.round is not None else self.turns.get(client_id)
            if round_ is not None:
                round_.step = max(round_.step, step + 1)
                rate = entry["learning_rate"] * entry["clip_coefficient"]
                round_.rates[client_id] = round_.rates.get(client_id, 0.0) + rate
                round_.finished[client_id] = round_.finished.get(client_id, 0) + 1
                round_.tokens[client_id] = round_.tokens.get(client_id, 0) + num_tokens
                round_.paths[client_id] = round_.paths.get(client_id, 0.0) + entry["learning_rate"]

    def to_fields(self) -> dict[str, Any]:
        """Write the state as plain values."""
        return asdict(self)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "RunState":
        """Read what `to_fields` has written."""
        round_ = fields["round"]
        return cls(
            **{
                **fields,
                "round": None if round_ is None else RoundState(**round_),
                "turns": {name: RoundState(**turn) for name, turn in fields.get("turns", {}).items()},
                "buffer": {name: BufferedUpload(**upload) for name, upload in fields.get("buffer", {}).items()},
                "standing": Standing(**fields.get("standing", {})),
                "members": {name: MemberState(**member) for name, member in fields["members"].items()},
            }
        )


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
        self.state.fingerprint = fingerprint
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
        for entry in recovered.entries:
            if self.is_redone(entry.kind):
                self.redo(entry, worker)
                if entry.kind == "commit":
                    redone(self.state.commit_number, entry.fields["members"][0][0])
        last_kept = max(self._store.kept(), default=0)
        has_lost = last_kept > self.state.commit_number
        self.state.commit_number = max(self.state.commit_number, last_kept)  # a number names one state for ever
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

    def redo(self, entry: Record, worker: Worker) -> None:
        """Do again what an entry says."""
        self.state.fold(entry.kind, entry.fields)
        if entry.kind == "round":
            worker.begin_round(entry.fields["clients"])
        elif entry.kind == "merge":
            self.merged_layers = _without(_LAYERS, entry.tensors)
            self.strategy_state = _without(_STRATEGY, entry.tensors)
            worker.merged(_without(_BACKBONE, entry.tensors))
        elif entry.kind == "commit":
            self._commits_since_snapshot += 1
            fields = entry.fields
            worker.redo(
                fields["members"][0][0],
                fields["step"],
                fields["clip_coefficient"],
                entry.tensors,
                fields["learning_rate"],
            )
        elif entry.kind == "went_back":
            worker.go_back(entry.fields["client_id"], entry.tensors)
        elif entry.kind == "ended" and entry.tensors:
            self.merged_layers = _without(_LAYERS, entry.tensors)
            worker.load_trained(_without(_BACKBONE, entry.tensors))

    def note(self, kind: str, **entry: Any) -> None:
        """Write an entry that need not be on disk before anything else happens."""
        self._write(Record(kind=kind, fields=entry), durable=False)

    def commit(
        self,
        contributions: Sequence[Contribution],
        gradients: Mapping[str, Tensor],
        *,
        clip_coefficient: float,
        learning_rate: float,
    ) -> int:
        """Write a decided step, to be applied next, and return its number; durable when this returns."""
        number = self.state.commit_number + 1
        fields = {
            "number": number,
            "step": contributions[0].step,
            "members": [[each.slot, each.step] for each in contributions],
            "tokens": [each.num_label_tokens for each in contributions],
            "clip_coefficient": clip_coefficient,
            "learning_rate": learning_rate,
        }
        tensors = gradients if self._keeps_records else {}
        self._write(Record(kind="commit", fields=fields, tensors=tensors), durable=self._keeps_records)
        self._commits_since_snapshot += 1
        return number

    def uploaded(self, **entry: Any) -> None:
        """Write that a client's layers are on disk."""
        self._write(Record(kind="uploaded", fields=entry), durable=True)

    def opened(self, *, alone: bool, **entry: Any) -> None:
        """Write that a round opens, for everybody or for one client alone."""
        self._write(Record(kind="turn" if alone else "round", fields=entry), durable=True)

    def buffered(self, **entry: Any) -> None:
        """Write that a client's layers are on disk, and its turn is over."""
        self._write(Record(kind="buffered", fields=entry), durable=True)

    def merged(
        self,
        layers: Mapping[str, Tensor],
        strategy_state: Mapping[str, Tensor],
        backbone: Mapping[str, Tensor],
        **entry: Any,
    ) -> None:
        """Write a merge: number, layers and round are one entry, durable before any client hears of it.

        `backbone` is what it has made of the clients' copies, if there are any.
        """
        self.merged_layers, self.strategy_state = layers, strategy_state
        tensors = self._tensors_of_the_merge() | _with(_BACKBONE, backbone)
        self._write(Record(kind="merge", fields=entry, tensors=tensors), durable=True)

    def judged(self, standing: Standing) -> None:
        """Write how good the last merge was."""
        self._write(Record(kind="judged", fields=asdict(standing)), durable=True)

    def ended(
        self, reason: str, best_round: int, best: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None
    ) -> None:
        """Write that no further round is opened.

        `best` are layers and backbone of an earlier round that the run ends with; the entry holds them, so that it can
        be done again when the kept file is gone.
        """
        held_round = self.state.num_merged + (best is not None)
        fields = {"reason": reason, "held_round": held_round, "best_round": best_round}
        tensors: dict[str, Tensor] = {}
        if best is not None:
            self.merged_layers = best[0]
            tensors = _with(_LAYERS, best[0]) | _with(_BACKBONE, best[1])
        self._write(Record(kind="ended", fields=fields, tensors=tensors), durable=True)

    def prolong(self, num_rounds: int) -> None:
        """Write that there are further rounds after those that were done: clients that had finished are expected."""
        self._write(Record(kind="prolonged", fields={"num_rounds": num_rounds}), durable=True)

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
        fields = {"client_id": client_id, "commit_number": commit_number, "member": place}
        self._write(Record(kind="went_back", fields=fields, tensors=kept.tensors), durable=True)
        self._commits_since_snapshot += 1  # it is as large as one
        worker.go_back(client_id, kept.tensors)
        if not self._keeps_records:
            self.snapshot(worker)

    def close(self) -> None:
        """Let another process have the folder."""
        self._store.close()

    def _tensors_of_the_merge(self) -> dict[str, Tensor]:
        return _with(_LAYERS, self.merged_layers or {}) | _with(_STRATEGY, self.strategy_state)

    def _write(self, record: Record, *, durable: bool) -> None:
        self._store.append(record, durable=durable)
        self.state.fold(record.kind, record.fields)


def _with(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _without(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
