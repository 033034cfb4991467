"""The messages between one client and the server: a closed set, without torch.

A tensor is frames (dtype name, shape, raw buffers) and becomes a real one only in `protocol.tensors`, after the
session has checked it. The list of values that may cross is closed: activations and their gradients, row lengths, beam
permutations, and the layers of a merge. Counts of label tokens and examples, gradient norms, learning rates and metrics
cross too. Token ids, labels, logits and text never do; `tests/test_wire.py` watches for them.

Shapes: B micro-batch, S sequence, D hidden width, P tensors that train on the client, Q tensors that train on the
server.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TypeAlias

Buffer: TypeAlias = bytes | memoryview

# Must match exactly before 1.0; add one whenever a message changes.
WIRE_VERSION = 5

# Bytes an element takes, for the types that may cross.
DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"f32": 4, "bf16": 2, "u8": 1})


class Why(StrEnum):
    """Why a session ended or was not begun; wire names are forever, and an unknown one is like `OVER`."""

    VERSION_MISMATCH = "VERSION_MISMATCH"
    KEY_MISMATCH = "KEY_MISMATCH"
    """The client's name belongs to another key, or its key to no client."""
    REVOKED = "REVOKED"
    SUPERSEDED = "SUPERSEDED"
    """A newer session of the same client has taken its place."""
    QUARANTINED = "QUARANTINED"
    """Three violations: kept out until the operator lets it in again."""
    VIOLATION = "VIOLATION"
    """A message broke a rule and was not applied; nothing else was lost."""
    FULL = "FULL"
    NO_SESSION = "NO_SESSION"
    """The server knows nothing of this connection: connect anew and resume."""
    FAILED = "FAILED"
    """The server could not do what this client asked for, by no fault of the client's: connect anew and resume."""
    TOO_LARGE = "TOO_LARGE"
    """The same for the third time, for want of memory: send the step in smaller micro-batches."""
    SHUTDOWN = "SHUTDOWN"
    """The server is being stopped; it resumes when it is started again."""
    FINISHED = "FINISHED"
    """All rounds are done."""
    OVER = "OVER"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorFrames:
    """A tensor as it travels: little-endian, row-major, cut into frames."""

    dtype: str
    shape: tuple[int, ...]
    buffers: tuple[Buffer, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor, by its shape."""
        return wire_bytes(self.dtype, self.shape)


def wire_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes that a tensor of this wire type and shape takes."""
    return math.prod(shape) * DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hello:
    """Client: ask to join."""

    wire_version: int
    software: str
    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Welcome:
    """Server: you are in; these are the run's settings and the files you need."""

    session: str
    """Token that ties a second connection to this one."""
    session_number: int
    """Rises with every welcome of this server; of two sessions of one client the higher number wins."""
    run_id: str
    settings: str
    """The run's settings as JSON (`RunConfig.to_json`)."""
    fingerprint: str
    """SHA-256 (hex) of `settings`."""
    file_names: tuple[str, ...]
    file_sizes: tuple[int, ...]
    file_hashes: tuple[str, ...]
    """SHA-256 (hex) of each file's content."""
    limits: dict[str, float]
    """The bounds that the server holds this session to (docs/limits.md)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fetch:
    """Client: send a file of the welcome from this byte on."""

    name: str
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """Server: some bytes of a file."""

    name: str
    offset: int
    content: TensorFrames


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attach:
    """Client, on a second connection: this one is for control."""

    session: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ping:
    """Client, on the control connection: I am alive."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pong:
    """Server: so am I, and this is what the run is waiting for ("" when for nothing).

    The bytes are of whole messages on the data connection since its first. A side that has sent more than the other has
    received, and sees no progress, has a dead connection.
    """

    number: int
    waiting_for: str
    bytes_sent: int
    bytes_received: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Leave:
    """Client, on the control connection: I go before the end, and why."""

    reason: str
    comes_back: bool
    """Whether it means to be waited for, as if its connection were lost; else the run goes on without it at once."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ready:
    """Client: I hold the layers of this merge (0: the first ones) and wait for the next round."""

    round_number: int
    num_examples: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundOpened:
    """Server: a round begins. `num_steps` 0 means you sit this one out; `layers` comes when yours are older."""

    round_number: int
    first_step: int
    num_steps: int
    layers: tuple[TensorFrames, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forward:
    """Client: run one micro-batch through the backbone; `step` 0 is an evaluation and keeps no graph."""

    request_id: int
    step: int
    micro_batch: int
    hidden_BSD: TensorFrames
    lengths_B: tuple[int, ...]
    left_padded: bool
    example_lengths: tuple[int, ...]
    """Lengths of the examples that the rows are packed from, row after row; () when each row is one example."""
    adapters_off: bool
    """Whether the backbone's adapters sit this one out, as in peft's `disable_adapter`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForwardDone:
    """Server: the backbone's activations, in answer to `Forward` or `Decode`."""

    request_id: int
    hidden_BSD: TensorFrames


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Backward:
    """Client: the loss's gradient with respect to the backbone's activations."""

    request_id: int
    gradient_BSD: TensorFrames


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BackwardDone:
    """Server: the gradient with respect to the client's activations; None when nothing below trains."""

    request_id: int
    gradient_BSD: TensorFrames | None
    norms_Q: TensorFrames | None
    """Norm of each server-side gradient of the step so far (f32, -1 where a tensor has none), in the model's order.

    For an own-loop client, which clips itself; None in a run that goes by rounds.
    """


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Commit:
    """Client: all micro-batches of the step are through; apply it."""

    step: int
    num_label_tokens: int
    loss: float
    """Mean loss over the step's label tokens, for the report."""
    norms_P: TensorFrames
    """Norm of each client-side gradient, in the model's order; -1 where a tensor has none."""
    learning_rate: float
    """An own-loop client's; 0.0 in a run that goes by rounds, whose schedule both sides know."""
    clip_coefficient: float
    """What the client's loop has scaled all gradients of the step by; 1.0 in a run that goes by rounds."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Committed:
    """Server: the step is applied; scale your gradients by this and apply yours."""

    step: int
    commit_number: int
    clip_coefficient: float
    durable_step: int
    """The last step of yours that survives a crash of the server; below `step` with `durability = "snapshot"`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepRefused:
    """Server: the step is applied on neither side; discard it and go on with `next_step`."""

    step: int
    next_step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Upload:
    """Client: my layers at the end of the round, in the model's order, and what weighs them."""

    round_number: int
    num_examples: int
    num_tokens: int
    layers: tuple[TensorFrames, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Merged:
    """Server: the round is over; these layers are everyone's now (the old ones when it was not accepted)."""

    round_number: int
    accepted: bool
    reason: str
    is_last: bool
    counted: bool
    """Whether your layers were among the merged ones."""
    layers: tuple[TensorFrames, ...]
    """In the model's order; after them their controls, where the strategy has any."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """Client: a measurement of mine (`topic` "evaluated" or "loaded")."""

    topic: str
    phase: str
    round_number: int
    metrics: dict[str, float]
    digest: str
    """SHA-256 (hex) of the layers loaded after a merge, "" otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Goodbye:
    """Client: I have done my part; these are my totals."""

    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Farewell:
    """Server: noted."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refusal:
    """Server: no, and why; the session is over."""

    code: str
    """One of `Why`."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Resume:
    """Client: this is where I am; all zero when I begin."""

    held_round: int
    """Number of the merge whose layers I hold."""
    step: int
    """The last step that I have applied."""
    commit_number: int
    """The commit that it was."""
    pending_step: int
    """A step whose commit I have sent without an answer; 0 when there is none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Resumed:
    """Server: this is where you go on.

    `verdict` "go": settle the pending step (applied if it is `step`, else discarded), load `layers` if there are any,
    and go on. "rewind": I have lost all after `step`; go back to it and resume again. "anew": you are late, by
    `reason`; load `layers`, count from `step`, and wait for the next round.
    """

    verdict: str
    reason: str
    step: int
    """The last step of yours that the server has applied, 0 for none."""
    commit_number: int
    clip_coefficient: float
    """What that commit's gradients are scaled by."""
    held_round: int
    """The last merge: `layers` are its, where yours are older."""
    layers: tuple[TensorFrames, ...]
    counted_round: int
    """The last merge that your layers are in, 0 for none."""
    round_number: int
    """The open round you take part in, 0 for none."""
    first_step: int
    num_steps: int
    next_step: int
    awaits_merge: bool
    """Whether your part of the round is done: the merge is what comes next."""
    is_parting: bool
    """Whether all rounds are merged."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shutdown:
    """Server: I stop here and have saved everything; resume at this step when I am back."""

    resume_at: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decode:
    """Client: run new positions of a generation through the backbone, after the positions in its cache.

    A `cache_id` that is new begins a cache: the rows are prompts, padded on the left. Later every row has as many new
    positions as the others.
    """

    request_id: int
    cache_id: int
    hidden_BSD: TensorFrames
    lengths_B: tuple[int, ...]
    """Tokens of each row among the new positions; fewer than S only in a padded prompt."""
    beams_B: tuple[int, ...]
    """The cached row that each row goes on from; () when every row goes on from its own."""
    adapters_off: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EndCache:
    """Client: free this cache; one that is not there is free already."""

    cache_id: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Discard:
    """Client with its own loop: drop the graphs and gradients of this step; it is not going to be committed."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Keep:
    """Client with its own loop: keep a snapshot of the backbone as it is now."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept:
    """Server: the backbone after this commit is kept, and can be gone back to by that number."""

    commit_number: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GoBack:
    """Client with its own loop: bring the backbone back to where it was after this commit."""

    commit_number: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WentBack:
    """Server: the backbone is what it was after that commit; your last applied step is this one."""

    commit_number: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Declined:
    """Server: not this, and why; nothing has changed and the session goes on."""

    request_id: int
    """The `Decode` that this answers, 0 when it answers anything else."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundsEnded:
    """Server, in answer to `Ready`: there is no further round; evaluate what you hold now, and say goodbye."""

    round_number: int
    """What you hold from now on: the last merge, or a number above it when `layers` are those of an earlier one."""
    best_round: int
    """The merge whose layers and backbone the run ends with, where rounds were compared for that; else 0."""
    reason: str
    """Why the run ends before its last round, "" if it does not."""
    layers: tuple[TensorFrames, ...]
    """Empty where you hold them; else as in `Merged`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """Client, before it resumes: send this frame back; a full one shows that the way carries what training sends."""

    content: TensorFrames


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probed:
    """Server: the frame of a `Probe`."""

    content: TensorFrames


Message: TypeAlias = (
    Hello
    | Welcome
    | Fetch
    | Chunk
    | Attach
    | Ping
    | Pong
    | Leave
    | Ready
    | RoundOpened
    | Forward
    | ForwardDone
    | Backward
    | BackwardDone
    | Commit
    | Committed
    | StepRefused
    | Upload
    | Merged
    | Report
    | Goodbye
    | Farewell
    | Refusal
    | Resume
    | Resumed
    | Shutdown
    | Decode
    | EndCache
    | Discard
    | Keep
    | Kept
    | GoBack
    | WentBack
    | Declined
    | RoundsEnded
    | Probe
    | Probed
)

# Wire numbers are forever: add, never renumber.
KINDS: Mapping[int, type[Message]] = MappingProxyType(
    {
        1: Hello,
        2: Welcome,
        3: Fetch,
        4: Chunk,
        5: Attach,
        6: Ping,
        7: Pong,
        8: Leave,
        9: Ready,
        10: RoundOpened,
        11: Forward,
        12: ForwardDone,
        13: Backward,
        14: BackwardDone,
        15: Commit,
        16: Committed,
        17: StepRefused,
        18: Upload,
        19: Merged,
        20: Report,
        21: Goodbye,
        22: Farewell,
        23: Refusal,
        24: Resume,
        25: Resumed,
        26: Shutdown,
        27: Decode,
        28: EndCache,
        29: Discard,
        30: Keep,
        31: Kept,
        32: GoBack,
        33: WentBack,
        34: Declined,
        35: RoundsEnded,
        36: Probe,
        37: Probed,
    }
)
