"""The entries of the log: one type for each kind, with the values that a record holds.

The tensors of an entry lie in the same record (`server_backbone.records.ledger`). An entry that is not `durable` need
not be on disk before anything else happens: if it is lost, a client is waited for, or asked again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeAlias

from server_backbone.deciding.standing import Standing


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A client was there for the first time."""

    kind: ClassVar[str] = "joined"
    durable: ClassVar[bool] = False
    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """A client said for the first time how many examples it has."""

    kind: ClassVar[str] = "announced"
    durable: ClassVar[bool] = False
    client_id: str
    num_examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundBegan:
    """A round began for everybody."""

    kind: ClassVar[str] = "round"
    durable: ClassVar[bool] = True
    number: int
    first_step: int
    num_steps: int
    clients: Sequence[str]
    trainers: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnBegan:
    """A round began for one client alone (`server_backbone.deciding.turns`)."""

    kind: ClassVar[str] = "turn"
    durable: ClassVar[bool] = True
    number: int
    first_step: int
    num_steps: int
    clients: Sequence[str]
    trainers: Sequence[str]

    @property
    def client_id(self) -> str:
        """The client."""
        return self.clients[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A step was decided; the record's tensors are the summed gradients, before clipping, where they are kept."""

    kind: ClassVar[str] = "commit"
    durable: ClassVar[bool] = True
    number: int
    step: int
    members: Sequence[tuple[str, int]]
    """Each client with its step."""
    tokens: Sequence[int]
    """Label tokens of each."""
    clip_coefficient: float
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """A step went on without a client."""

    kind: ClassVar[str] = "closed"
    durable: ClassVar[bool] = False
    client_id: str
    next_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploaded:
    """A client's layers are on disk."""

    kind: ClassVar[str] = "uploaded"
    durable: ClassVar[bool] = True
    client_id: str
    weight: float
    moved: float = 0.0
    """How far they have gone of what they may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffered:
    """A client's layers are on disk, and its turn is over."""

    kind: ClassVar[str] = "buffered"
    durable: ClassVar[bool] = True
    client_id: str
    name: str
    begun: int
    """The merge whose layers it began with."""
    weight: float
    moved: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadLost:
    """Layers on disk cannot be read any more."""

    kind: ClassVar[str] = "upload_lost"
    durable: ClassVar[bool] = False
    client_id: str
    """The client in a round, the upload's name in a buffer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnEnded:
    """A client's turn is over, and no layers came of it."""

    kind: ClassVar[str] = "turn_ended"
    durable: ClassVar[bool] = False
    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """The open round goes on without a client."""

    kind: ClassVar[str] = "left"
    durable: ClassVar[bool] = False
    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """A client is in the open round again."""

    kind: ClassVar[str] = "returned"
    durable: ClassVar[bool] = False
    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeMade:
    """A merge: number, layers and round are one entry, durable before any client hears of it."""

    kind: ClassVar[str] = "merge"
    durable: ClassVar[bool] = True
    round: int
    accepted: bool
    reason: str
    weights: Mapping[str, float]
    """What each upload counted, by client or by name."""
    moved: Mapping[str, float] = field(default_factory=dict)
    """How far each client's layers had gone of what they may."""
    taken: Sequence[str] | None = None
    """Uploads that leave the buffer, None where there is none."""
    closes: bool = True
    """Whether no round stays open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """A client has measured a merge's layers."""

    kind: ClassVar[str] = "evaluated"
    durable: ClassVar[bool] = False
    client_id: str
    round: int
    measured: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """How good the last merge was."""

    kind: ClassVar[str] = "judged"
    durable: ClassVar[bool] = True
    standing: Standing


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """No further round begins; the record's tensors are an earlier round's that the run ends with, if any."""

    kind: ClassVar[str] = "ended"
    durable: ClassVar[bool] = True
    reason: str
    held_round: int
    best_round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A client has said goodbye."""

    kind: ClassVar[str] = "finished"
    durable: ClassVar[bool] = False
    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prolonged:
    """There are further rounds after the ones that were done: clients that had finished are expected."""

    kind: ClassVar[str] = "prolonged"
    durable: ClassVar[bool] = True
    num_rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WentBack:
    """A client went back to a kept snapshot; the record's tensors are the backbone's there."""

    kind: ClassVar[str] = "went_back"
    durable: ClassVar[bool] = True
    client_id: str
    commit_number: int
    member: Mapping[str, Any]
    """Fields of its `MemberState` from then on."""


Entry: TypeAlias = (
    Joined
    | Announced
    | RoundBegan
    | TurnBegan
    | Committed
    | Closed
    | Uploaded
    | Buffered
    | UploadLost
    | TurnEnded
    | Left
    | Returned
    | MergeMade
    | Evaluated
    | Judged
    | Ended
    | Finished
    | Prolonged
    | WentBack
)
_TYPES: Mapping[str, type[Entry]] = {type_.kind: type_ for type_ in Entry.__args__}


def to_fields(entry: Entry) -> dict[str, Any]:
    """Return an entry's values as a record holds them."""
    if isinstance(entry, Judged):
        return asdict(entry.standing)
    return {each.name: getattr(entry, each.name) for each in fields(entry)}


def from_fields(kind: str, values: Mapping[str, Any]) -> Entry:
    """Read what `to_fields` has returned."""
    if kind == Judged.kind:
        return Judged(standing=Standing(**values))
    return _TYPES[kind](**values)
