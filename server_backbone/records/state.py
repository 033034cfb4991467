"""Where a run stands: the fold of its log. Nothing here changes in place, so any thread may read it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from server_backbone.deciding.rounds import Open
from server_backbone.deciding.standing import Standing
from server_backbone.deciding.uploads import owner_of
from server_backbone.records import entries as log
from server_backbone.records.entries import Entry
from splitfl.session.server_session import Applied


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundState:
    """An open round."""

    number: int
    first_step: int
    num_steps: int
    clients: tuple[str, ...]
    trainers: tuple[str, ...]
    step: int
    """The step after the highest that was committed: where `shared` is."""
    uploaded: Mapping[str, float] = field(default_factory=dict)
    """Weights of the uploads on disk, by client."""
    out: tuple[str, ...] = ()
    """Clients that the round goes on without."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Sum of what each client's gradients of this round were multiplied by: learning rate times clip coefficient."""
    finished: Mapping[str, int] = field(default_factory=dict)
    """Steps of the round that each client has finished."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Label tokens in them."""
    paths: Mapping[str, float] = field(default_factory=dict)
    """Sum of their learning rates."""
    moved: Mapping[str, float] = field(default_factory=dict)
    """How far the uploads on disk have gone of what they may, by client."""

    @classmethod
    def begun(cls, entry: log.RoundBegan | log.TurnBegan) -> "RoundState":
        """Return a round at its first step."""
        return cls(
            number=entry.number,
            first_step=entry.first_step,
            num_steps=entry.num_steps,
            clients=tuple(entry.clients),
            trainers=tuple(entry.trainers),
            step=entry.first_step,
        )

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> "RoundState":
        """Read what a snapshot holds."""
        lists = {name: tuple(values[name]) for name in ("clients", "trainers", "out")}
        return cls(**{**values, **lists})

    def opened(self) -> Open:
        """Say again how the round opened."""
        return Open(round_number=self.number, clients=self.clients, trainers=self.trainers, first_step=self.first_step)

    def committed(self, entry: log.Committed, clients: frozenset[str]) -> "RoundState":
        """Take in a step of these clients."""
        mine = [
            (client_id, num_tokens)
            for (client_id, _), num_tokens in zip(entry.members, entry.tokens, strict=True)
            if client_id in clients
        ]
        rate = entry.learning_rate * entry.clip_coefficient
        return replace(
            self,
            step=max(self.step, *(step + 1 for client_id, step in entry.members if client_id in clients)),
            rates={**self.rates, **{name: self.rates.get(name, 0.0) + rate for name, _ in mine}},
            finished={**self.finished, **{name: self.finished.get(name, 0) + 1 for name, _ in mine}},
            tokens={**self.tokens, **{name: self.tokens.get(name, 0) + tokens for name, tokens in mine}},
            paths={**self.paths, **{name: self.paths.get(name, 0.0) + entry.learning_rate for name, _ in mine}},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferedUpload:
    """Layers on disk that wait for a merge, where merges are made as uploads come in."""

    client_id: str
    begun: int
    """The merge whose layers their client began with."""
    weight: float
    moved: float = 0.0
    """How far they have gone from those, of what they may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberState:
    """One client, connected or not."""

    step: int = 0
    commit_number: int = 0
    clip_coefficient: float = 1.0
    next_step: int = 0
    has_finished: bool = False
    num_examples: int = 0
    """The number that it announced first; what it says later does not count. 0 before that."""
    counted_round: int = 0
    """The last merge that its layers are in."""
    num_label_tokens: int = 0
    """Label tokens in its last step that was committed."""

    @property
    def applied(self) -> Applied:
        """The last step of it that was applied."""
        return Applied(step=self.step, commit_number=self.commit_number, clip_coefficient=self.clip_coefficient)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where a run stands, in values that a record holds."""

    fingerprint: str = ""
    commit_number: int = 0
    weights_of: int = 0
    """The commit whose weights the backbone has: the last one, or an earlier one that a client has gone back to."""
    num_merged: int = 0
    round: RoundState | None = None
    turns: Mapping[str, RoundState] = field(default_factory=dict)
    """Open rounds that a client has for itself, by client: see `server_backbone.deciding.turns`."""
    buffer: Mapping[str, BufferedUpload] = field(default_factory=dict)
    """Uploads of such rounds by their names, in the order in which they came in."""
    members: Mapping[str, MemberState] = field(default_factory=dict)
    durable_step: int = 0
    """Last step of the last merged round: what `durability = "snapshot"` keeps."""
    held_round: int = 0
    """What clients hold: the number of the last merge, or the one above it once the run ends with an earlier one's."""
    last_merge: Mapping[str, Any] = field(default_factory=dict)
    """What the log says of the last merge: accepted, reason, weights by upload, how far they have moved, and, with a
    buffer, its uploads."""
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What clients measured of the last merge's layers, by client."""
    folded: Mapping[str, float] = field(default_factory=dict)
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
    def uploaded(self) -> Mapping[str, float]:
        """Weights of the uploads on disk: by client in an open round, by name in a buffer."""
        if self.round is not None:
            return self.round.uploaded
        return {name: upload.weight for name, upload in self.buffer.items()}

    def moved_by(self, uploads: Iterable[str]) -> dict[str, float]:
        """Return by client how far the layers of these uploads, on disk, have gone of what they may."""
        buffered = {name: upload.moved for name, upload in self.buffer.items()}
        known = self.round.moved if self.round is not None else buffered
        moved: dict[str, float] = {}
        for name in uploads:
            owner = owner_of(name)
            moved[owner] = max(moved.get(owner, 0.0), known.get(name, 0.0))
        return moved

    def round_of(self, client_id: str) -> RoundState | None:
        """Return the open round that a client is in: its own, or everybody's if it was there when that opened."""
        if self.round is not None and client_id in self.round.clients:
            return self.round
        return self.turns.get(client_id)

    def next_step_of(self, client_id: str) -> int:
        """Return where a client's next turn begins."""
        turn, member = self.turns.get(client_id), self.members[client_id]
        return turn.first_step + turn.num_steps if turn is not None else member.next_step

    def after(self, entry: Entry) -> "RunState":
        """Return where the run stands after an entry."""
        match entry:
            case log.Joined():
                return self if entry.client_id in self.members else self._member(entry.client_id)
            case log.Announced():
                return self._member(entry.client_id, num_examples=entry.num_examples)
            case log.RoundBegan():
                return replace(self._beginning(entry), round=RoundState.begun(entry))
            case log.TurnBegan():
                turns = {**self.turns, entry.client_id: RoundState.begun(entry)}
                return replace(self._beginning(entry), turns=turns)
            case log.Committed():
                return self._committed(entry)
            case log.Closed():
                return self._member(entry.client_id, next_step=entry.next_step)
            case log.Uploaded() | log.Left() | log.Returned():
                return self._in_round(entry)
            case log.UploadLost():
                return self._upload_lost(entry.client_id)
            case log.Buffered():
                return self._buffered(entry)
            case log.TurnEnded():
                return replace(self, turns=_without(self.turns, entry.client_id))
            case log.MergeMade():
                return self._merged(entry)
            case log.Evaluated():
                if entry.round != self.num_merged or self.round is not None:
                    return self  # of an earlier merge
                return replace(self, measured={**self.measured, entry.client_id: entry.measured})
            case log.Judged():
                return replace(self, standing=entry.standing)
            case log.Ended():
                return replace(
                    self,
                    has_ended=True,
                    end_reason=entry.reason,
                    held_round=entry.held_round,
                    ends_with=entry.best_round,
                )
            case log.Finished():
                return self._member(entry.client_id, has_finished=True)
            case log.Prolonged():
                members = {name: replace(member, has_finished=False) for name, member in self.members.items()}
                return replace(self, has_ended=False, end_reason="", ends_with=0, members=members)
            case log.WentBack():
                members = {**self.members, entry.client_id: MemberState(**entry.member)}
                return replace(self, members=members, weights_of=entry.commit_number)

    def _member(self, client_id: str, **changes: Any) -> "RunState":
        member = replace(self.members.get(client_id, MemberState()), **changes)
        return replace(self, members={**self.members, client_id: member})

    def _beginning(self, entry: log.RoundBegan | log.TurnBegan) -> "RunState":
        began = {
            client_id: replace(self.members[client_id], next_step=entry.first_step, has_finished=False)
            for client_id in entry.clients
        }
        return replace(self, members={**self.members, **began})

    def _committed(self, entry: log.Committed) -> "RunState":
        members = {
            client_id: replace(
                self.members[client_id],
                step=step,
                next_step=step + 1,
                commit_number=entry.number,
                clip_coefficient=entry.clip_coefficient,
                num_label_tokens=num_tokens,
            )
            for (client_id, step), num_tokens in zip(entry.members, entry.tokens, strict=True)
        }
        clients = frozenset(members)
        turns = self.turns
        if self.round is None:
            turns = {
                name: turn.committed(entry, frozenset({name})) if name in clients else turn
                for name, turn in turns.items()
            }
        return replace(
            self,
            commit_number=entry.number,
            weights_of=entry.number,
            members={**self.members, **members},
            round=None if self.round is None else self.round.committed(entry, clients),
            turns=turns,
        )

    def _in_round(self, entry: log.Uploaded | log.Left | log.Returned) -> "RunState":
        """Take in an entry about the open round; after that has closed it says nothing."""
        opened = self.round
        if opened is None:
            return self
        match entry:
            case log.Uploaded():
                opened = replace(
                    opened,
                    uploaded={**opened.uploaded, entry.client_id: entry.weight},
                    moved={**opened.moved, entry.client_id: entry.moved},
                )
            case log.Left():
                opened = replace(opened, out=(*opened.out, entry.client_id))
            case log.Returned():
                opened = replace(opened, out=tuple(name for name in opened.out if name != entry.client_id))
        return replace(self, round=opened)

    def _upload_lost(self, name: str) -> "RunState":
        if self.round is not None:
            return replace(self, round=replace(self.round, uploaded=_without(self.round.uploaded, name)))
        return replace(self, buffer=_without(self.buffer, name))

    def _buffered(self, entry: log.Buffered) -> "RunState":
        upload = BufferedUpload(client_id=entry.client_id, begun=entry.begun, weight=entry.weight, moved=entry.moved)
        return replace(self, turns=_without(self.turns, entry.client_id), buffer={**self.buffer, entry.name: upload})

    def _merged(self, entry: log.MergeMade) -> "RunState":
        counted = {  # a buffer has names of its own
            name: replace(self.members[name], counted_round=entry.round)
            for name in entry.weights
            if name in self.members
        }
        return replace(
            self,
            durable_step=self.round.first_step + self.round.num_steps - 1 if self.round is not None else 0,
            num_merged=entry.round,
            held_round=entry.round,
            last_merge=self._told_of(entry),
            measured={},
            round=None,
            folded=dict(entry.moved) if entry.accepted else self.folded,
            folded_round=entry.round if entry.accepted else self.folded_round,
            members={**self.members, **counted},
            turns={} if entry.closes else self.turns,
            buffer={} if entry.closes else _without(self.buffer, *(entry.taken or ())),
        )

    def _told_of(self, entry: log.MergeMade) -> dict[str, Any]:
        """Return what is told of a merge; while its uploads are still in the buffer, if it has one."""
        told = {
            "accepted": entry.accepted,
            "reason": entry.reason,
            "weights": dict(entry.weights),
            "moved": dict(entry.moved),
        }
        if entry.taken is None:
            return told
        uploads = [
            {
                "name": name,
                "client_id": self.buffer[name].client_id,
                "weight": self.buffer[name].weight,
                "staleness": entry.round - 1 - self.buffer[name].begun,
            }
            for name in entry.taken
        ]
        return {**told, "uploads": uploads}

    def to_fields(self) -> dict[str, Any]:
        """Write the state as plain values."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> "RunState":
        """Read what `to_fields` has written."""
        round_ = values["round"]
        return cls(
            **{
                **values,
                "round": None if round_ is None else RoundState.from_fields(round_),
                "turns": {name: RoundState.from_fields(turn) for name, turn in values["turns"].items()},
                "buffer": {name: BufferedUpload(**upload) for name, upload in values["buffer"].items()},
                "standing": Standing(**values["standing"]),
                "members": {name: MemberState(**member) for name, member in values["members"].items()},
            }
        )


def _without(mapping: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name not in names}


def _plain(value: Any) -> Any:
    """Turn tuples into lists, at any depth: a record gives lists back."""
    match value:
        case dict():
            return {name: _plain(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
        case _:
            return value
