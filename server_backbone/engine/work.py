"""Work for the compute thread: data only, so that it can be joined, counted, bounded and sent elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from server_backbone.compute.blocks_worker import Contribution
from server_backbone.deciding import rounds
from server_backbone.records.entries import Entry
from splitfl.protocol import messages


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """Who waits for an answer; once nobody does, the work is not done."""

    client_id: str
    request_id: int = 0
    """Of a micro-batch in training or evaluation, else 0."""
    is_void: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Work:
    @property
    def asked_by(self) -> str:
        """The client whose message asks for it, "" for none."""
        return ""

    @property
    def always(self) -> bool:
        """Whether it is done also when everything that has not begun is dropped."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Asked(_Work):
    client_id: str

    @property
    def asked_by(self) -> str:
        """The client whose message asks for it."""
        return self.client_id


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Answered(_Work):
    ticket: Ticket

    @property
    def asked_by(self) -> str:
        """The client whose message asks for it."""
        return self.ticket.client_id


# micro-batches


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run(_Answered):
    """Run a micro-batch forward or backward; one of step 0 is of an evaluation."""

    message: messages.Forward | messages.Backward

    @property
    def is_evaluation(self) -> bool:
        """Whether no gradient follows."""
        return isinstance(self.message, messages.Forward) and self.message.step == 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Generate(_Answered):
    """Run new positions of a generation, or decline for a reason that is known."""

    message: messages.Decode
    objection: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FreeCache(_Work):
    """Free a cache of a generation."""

    client_id: str
    cache_id: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FreeCaches(_Work):
    """Free all caches of a client."""

    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Discard(_Work):
    """Free the graphs and gradients that a client has under way."""

    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GiveUpStep(_Asked):
    """Free a step that its client gives up."""

    step: int


# steps


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decide(_Work):
    """Reduce a step's gradients and write it down."""

    commits: tuple[tuple[str, messages.Commit], ...]
    contributions: Sequence[Contribution]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ApplyStep(_Work):
    """Apply what was decided; it counts, so this is done whatever is stopped."""

    contributions: Sequence[Contribution]

    @property
    def always(self) -> bool:
        """Done also when the rest is dropped."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CloseStep(_Work):
    """Free a step that went on without its client, and write that it did."""

    client_id: str
    step: int
    next_step: int


# rounds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenRound(_Work):
    """Write that a round opens."""

    round: rounds.Open


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FindFinished(_Work):
    """Find whose steps of the open round have come to something, once all that are decided are written."""

    call: rounds.LastCall


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MakeMerge(_Work):
    """Fold the uploads, or keep the old layers."""

    merge: rounds.Merge


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JudgeMerge(_Work):
    """Compare the last merge with those before."""

    round_number: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EndRounds(_Work):
    """Write that there is no further round, and go back to the best one if that is asked for."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spool(_Answered):
    """Keep a client's layers for the merge."""

    upload: messages.Upload


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Announce(_Work):
    """Find the number of examples that a client weighs by."""

    client_id: str
    num_examples: int
    is_new: bool
    """Whether this is another number than it said last."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NoteMeasured(_Asked):
    """Write what a client measured of a merge's layers."""

    round_number: int
    measured: Mapping[str, float]


# snapshots and the log


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeepSnapshot(_Asked):
    """Keep a snapshot that a client's checkpoint can name."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GoBack(_Asked):
    """Bring the backbone back to a kept snapshot."""

    commit_number: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TakeSnapshot(_Work):
    """Save this moment."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FindSnapshotBefore(_Work):
    """Find the newest snapshot from before the merge whose layers are everyone's."""

    error: str
    """What came of those layers."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Write(_Work):
    """Write that a member has come or gone."""

    entry: Entry

    @property
    def always(self) -> bool:
        """Done also when the rest is dropped."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Settle(_Work):
    """Do nothing: when this is done, all that was being applied is settled, and the client is answered."""

    token: str
    """Of the connection that resumes."""
    claim: messages.Resume


Work: TypeAlias = (
    Run
    | Generate
    | FreeCache
    | FreeCaches
    | Discard
    | GiveUpStep
    | Decide
    | ApplyStep
    | CloseStep
    | OpenRound
    | FindFinished
    | MakeMerge
    | JudgeMerge
    | EndRounds
    | Spool
    | Announce
    | NoteMeasured
    | KeepSnapshot
    | GoBack
    | TakeSnapshot
    | FindSnapshotBefore
    | Write
    | Settle
)
