"""The server's side of one client's session: which message is legal now, and what has been committed.

A message either changes the state and is returned as something to do, or raises `RemoteProtocolError` and changes
nothing. The server's own decisions (a round opens, a step is committed or closed without this client) come in through
methods with their names.

A session outlives its connections. Work under way goes with a connection (`disconnected`), what was applied stays, and
`resume` finds out where the client goes on.
"""

import math
import re
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from splitfl.config.patterns import ALSO_NAME_PATTERN, MAX_ALSO
from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol.messages import (
    Backward,
    BackwardDone,
    Commit,
    Committed,
    Decode,
    Discard,
    EndCache,
    Forward,
    ForwardDone,
    GoBack,
    Goodbye,
    Keep,
    Merged,
    Message,
    Ready,
    Report,
    Resume,
    Resumed,
    RoundOpened,
    StepRefused,
    TensorFrames,
    Upload,
)
from splitfl.protocol.roles import Role
from splitfl.session.terms import Terms
from splitfl.telemetry.measures import ALSO, objection, objection_to_totals

# An evaluation and the layers loaded, and the same again for every connection lost meanwhile.
_MAX_REPORTS = 64
# What is repeated on its way, or comes too late, is little; these cost nothing but somebody's time.
_MAX_IDLE = 256
# The ends of generations that were declined, or are over.
_MAX_ENDS = 64
_DIGEST = re.compile("[0-9a-f]{64}")  # SHA-256


class Phase(Enum):
    """Where a client is in a round."""

    IDLE = auto()
    """Loading, evaluating, or done."""
    READY = auto()
    """Waiting for a round to open."""
    TRAINING = auto()
    COMMITTING = auto()
    """Waiting for the acknowledgement of a step."""
    MERGING = auto()
    """Waiting for the merge: has uploaded, or sits this round out."""
    GONE = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Answer at once, without asking anybody; nothing else follows from the message."""

    message: Message


Accepted: TypeAlias = (
    Ready | Forward | Backward | Commit | Upload | Report | Goodbye | Decode | EndCache | Discard | Keep | GoBack
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """The last step of a client that was applied: what its acknowledgement says."""

    step: int = 0
    commit_number: int = 0
    clip_coefficient: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What the micro-batches of a step hold."""

    num_tokens: int = 0
    """There cannot be more labels."""
    num_positions: int = 0
    """Tokens and padding."""
    num_rows: int = 0

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(
            num_tokens=self.num_tokens + other.num_tokens,
            num_positions=self.num_positions + other.num_positions,
            num_rows=self.num_rows + other.num_rows,
        )


@dataclass(slots=True)
class _Graph:
    """One micro-batch under way."""

    shape: tuple[int, ...]
    step: int
    awaits_backward: bool = False
    """The activations are back at the client, its gradient is not here yet."""


class ServerSession:
    """The next steps that one client may take."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.phase = Phase.IDLE
        self.round_number = 0
        self.next_step = 0
        self.last_step = 0
        self._first_step = 0
        self.last_commit: Committed | StepRefused | None = None
        self.applied = Applied()
        self._last_applied = 0
        """The last step that was applied; those between it and `next_step` went on without this client."""
        self._graphs: dict[int, _Graph] = {}
        self._last_request = 0
        self._decoding: int | None = None
        """The request whose new positions are with the worker."""
        self._micro_batches_begun = 0
        self._micro_batches_done = 0
        self._sent = Sent()
        self.asked = Sent()
        """What the last step was made of whose commit has been asked for."""
        self._num_reports = 0
        self._num_idle = 0
        """Messages in a row that changed nothing."""
        self._ends_left = _MAX_ENDS
        """Caches that may be ended before another is begun."""
        self._closed: set[int] = set()
        """Requests of steps that went on without this client; what still comes for them is ignored."""

    @property
    def num_in_flight(self) -> int:
        """Micro-batches under way."""
        return len(self._graphs)

    @property
    def is_in_step(self) -> bool:
        """Whether a step is open."""
        return self._micro_batches_begun > 0

    @property
    def is_its_turn(self) -> bool:
        """Whether nothing is owed to this client, so that what comes next is its own to do."""
        is_at_work = self.phase in (Phase.IDLE, Phase.TRAINING) and self._decoding is None
        return is_at_work and all(graph.awaits_backward for graph in self._graphs.values())

    @property
    def has_done_its_steps(self) -> bool:
        """Whether no step of the round is left for this client."""
        return self.phase is not Phase.IDLE and self.next_step > self.last_step

    def receive(self, message: Message) -> Accepted | Reply | None:
        """Check a message and take it in; None means it came for a step that is closed and is to be ignored."""
        accepted = self._take(message)
        if accepted is not None and not isinstance(accepted, Reply):
            self._num_idle = 0
        elif self._num_idle >= _MAX_IDLE:
            raise RemoteProtocolError(f"more than {_MAX_IDLE} messages in a row that repeat what was said")
        else:
            self._num_idle += 1
        return accepted

    def _take(self, message: Message) -> Accepted | Reply | None:
        if self.phase is Phase.GONE and not isinstance(message, Goodbye):
            raise RemoteProtocolError(f"{type(message).__name__} from a client that has gone")
        match message:
            case Ready():
                self._require(message, Phase.IDLE)
                if message.num_examples < 1:
                    raise RemoteProtocolError(f"{message.num_examples} examples: to take part takes at least one")
                self.phase = Phase.READY
                return message
            case Forward(step=0):
                self._admit_evaluation(message)
                return message
            case Forward():
                return self._admit_training(message)
            case Backward():
                return self._admit_backward(message)
            case Commit():
                return self._admit_commit(message)
            case Upload():
                return self._admit_upload(message)
            case Report():
                return self._admit_report(message)
            case EndCache():
                if not self._ends_left:
                    raise RemoteProtocolError("EndCache more often than generations were begun")
                self._ends_left -= 1
                return message
            case Decode():
                self._admit_decode(message)
                return message
            case Goodbye():
                return self._admit_goodbye(message)
        raise RemoteProtocolError(f"{type(message).__name__} is not a client's to send here")

    def opened(self, round_: RoundOpened) -> None:
        """Take note that a round has opened for this client."""
        if self.phase is not Phase.READY:
            raise LocalProtocolError(f"a round opened for a client that is {self.phase.name}")
        self.round_number = round_.round_number
        self.next_step = round_.first_step
        self._first_step = round_.first_step
        self.last_step = round_.first_step + round_.num_steps - 1
        self._last_applied = round_.first_step - 1
        self._closed.clear()  # whatever was under way in the last round came before this client was ready
        self.phase = Phase.TRAINING if round_.num_steps else Phase.MERGING
        self._begin_step()

    def restore(self, *, applied: Applied, round_: RoundOpened | None, next_step: int, awaits_merge: bool) -> None:
        """Set what a log says of this client: its last applied step, and its place in the open round if it has one."""
        self.applied = applied
        if round_ is not None:
            self.phase = Phase.READY
            self.opened(round_)
            self.next_step = next_step
            self._last_applied = max(self._last_applied, applied.step)
            if awaits_merge:
                self.phase = Phase.MERGING

    def disconnected(self) -> None:
        """Take note that the connection is gone: micro-batches and a commit that waits go with it, nothing else."""
        self._graphs.clear()
        self._closed.clear()
        self._last_request = 0
        self._decoding = None
        self._begin_step()
        if self.phase is Phase.COMMITTING:
            self.phase = Phase.TRAINING
        elif self.phase is Phase.READY:
            self.phase = Phase.IDLE

    def returned(self, next_step: int) -> None:
        """Go on at this step: the others have gone on meanwhile."""
        self.next_step = max(self.next_step, next_step)

    def resume(
        self,
        claim: Resume,
        *,
        held_round: int,
        layers: tuple[TensorFrames, ...],
        counted_round: int = 0,
        is_parting: bool,
    ) -> Resumed:
        """Compare where the client says it is with what was applied, and say where it goes on.

        `held_round` is the last merge and `layers` are its; `counted_round` is the last that this client's layers are
        in. A client that is late leaves its open round.
        """
        if self.phase is Phase.GONE:
            self.phase = Phase.IDLE  # it has not heard our farewell, or takes part once more
        begun_with = self._begun_with(claim, held_round)
        verdict, reason = self._compare(claim, begun_with)
        if verdict == "anew" and self.phase is Phase.TRAINING:  # layers that it uploaded stay in the round
            self.phase = Phase.IDLE
        takes_part = self.phase in (Phase.TRAINING, Phase.MERGING)
        if takes_part and verdict != "anew":
            held_round = begun_with
        is_older = verdict == "anew" or (verdict == "go" and claim.held_round < held_round)
        if self.terms.rounds.trains_on and not takes_part and verdict == "go" and claim.step:
            is_older = True  # between two rounds of its own it may have trained on from layers that are still the last
        return Resumed(
            verdict=verdict,
            reason=reason,
            step=self.applied.step,
            commit_number=self.applied.commit_number,
            clip_coefficient=self.applied.clip_coefficient,
            held_round=held_round,
            layers=layers if is_older else (),
            counted_round=counted_round,
            round_number=self.round_number if takes_part else 0,
            first_step=self._first_step if takes_part else 0,
            num_steps=self.last_step - self._first_step + 1 if takes_part else 0,
            next_step=self.next_step if takes_part else 0,
            awaits_merge=self.phase is Phase.MERGING,
            is_parting=is_parting,
        )

    def _begun_with(self, claim: Resume, held_round: int) -> int:
        """Return the merge that the client should hold: the last, or in a round of its own the one it began with.

        A round of its own that it never heard of is over: the layers to begin it with may be gone.
        """
        if self.phase not in (Phase.TRAINING, Phase.MERGING):
            return held_round
        if self.phase is Phase.TRAINING and self.terms.rounds.is_unheard_of(self.round_number, claim.held_round):
            self.phase = Phase.IDLE
            return held_round
        return self.terms.rounds.begun_with(self.round_number, held_round)

    def _compare(self, claim: Resume, held_round: int) -> tuple[str, str]:
        mine, theirs = self.applied.step, claim.step
        is_other = theirs == mine and claim.commit_number != self.applied.commit_number
        if claim.held_round > held_round or theirs > mine or is_other:
            return "rewind", f"the server has gone back to step {mine} of this client, and it is at step {theirs}"
        if theirs < mine != claim.pending_step:
            return "anew", f"this client's records end at step {theirs}, and step {mine} of it has been applied"
        return "go", ""

    def snapshot_answered(self) -> None:
        """Take note that the answer to `Keep` or `GoBack` is on its way; a session with rounds asks for none."""

    def answered(self, reply: ForwardDone | BackwardDone) -> bool:
        """Take note of a reply on its way; False means its step was closed meanwhile and it must not be sent."""
        graph = self._graphs.get(reply.request_id)
        if graph is None:
            return False
        if isinstance(reply, ForwardDone) and graph.step and self.terms.needs_backward:
            graph.awaits_backward = True
            return True
        del self._graphs[reply.request_id]
        if graph.step:
            self._micro_batches_done += 1
        return True

    def awaits(self, request_id: int) -> bool:
        """Tell whether the answer to a micro-batch is still wanted."""
        return request_id in self._graphs

    def decoded(self) -> None:
        """Take note that the answer to `Decode` is on its way."""
        self._decoding = None

    def committed(self, commit: Committed) -> None:
        """Take note that the step this client waits for is applied."""
        if self.phase not in (Phase.COMMITTING, Phase.TRAINING):  # the latter when its connection was lost meanwhile
            raise LocalProtocolError(f"a step was committed for a client that is {self.phase.name}")
        self.last_commit = commit
        self.applied = Applied(
            step=commit.step, commit_number=commit.commit_number, clip_coefficient=commit.clip_coefficient
        )
        self._last_applied = commit.step
        self.phase = Phase.TRAINING
        self.next_step = commit.step + 1
        self._begin_step()

    def step_closed(self, next_step: int, reason: str) -> StepRefused:
        """Go on without this client's open step: forget its micro-batches, return what to tell it."""
        if self.phase not in (Phase.TRAINING, Phase.COMMITTING):
            raise LocalProtocolError(f"a step was closed for a client that is {self.phase.name}")
        refusal = StepRefused(step=self.next_step, next_step=next_step, reason=reason)
        self._forget_step(next_step)
        self.phase = Phase.TRAINING
        self.last_commit = refusal
        return refusal

    def merged(self, merge: Merged) -> None:
        """Take note that the round is over for this client, whether it had uploaded or not."""
        if self.phase in (Phase.TRAINING, Phase.COMMITTING):
            self._forget_step(self.last_step + 1)  # the merge itself tells the client, so no refusal is recorded
        self.phase = Phase.IDLE
        self.round_number = merge.round_number
        self._num_reports = 0

    def rounds_ended(self) -> None:
        """Take note that this client is told that there is no further round."""
        if self.phase is not Phase.READY:
            raise LocalProtocolError(f"the rounds end for a client that is {self.phase.name}")
        self.phase = Phase.IDLE
        self._num_reports = 0

    def _require(self, message: Message, *phases: Phase) -> None:
        if self.phase not in phases:
            raise RemoteProtocolError(f"{type(message).__name__} while {self.phase.name}")

    def _forget_step(self, next_step: int) -> None:
        """Drop the open step; what still comes for it is ignored."""
        self._drop_training_graphs()
        self.next_step = next_step
        self._begin_step()

    def _drop_training_graphs(self) -> None:
        training = {number for number, graph in self._graphs.items() if graph.step}
        self._closed |= training
        for number in training:
            del self._graphs[number]

    def _begin_step(self) -> None:
        self._micro_batches_begun = 0
        self._micro_batches_done = 0
        self._sent = Sent()

    def _check_forward(self, message: Forward) -> None:
        if message.request_id <= self._last_request:
            raise RemoteProtocolError(f"request {message.request_id} after {self._last_request}: numbers must rise")
        if self.num_in_flight >= self.terms.max_in_flight:
            raise RemoteProtocolError(f"more than max_in_flight = {self.terms.max_in_flight} micro-batches under way")
        self.terms.check_activations(message.hidden_BSD, message.lengths_B)
        if message.example_lengths:
            self.terms.check_packing(message.example_lengths, message.lengths_B)
            if message.left_padded:
                raise RemoteProtocolError("packed rows that are padded on the left: what pads them goes last")

    def _admit(self, message: Forward) -> None:
        self._last_request = message.request_id
        self._graphs[message.request_id] = _Graph(shape=message.hidden_BSD.shape, step=message.step)
        if message.step:
            self._sent += Sent(
                num_tokens=sum(message.lengths_B),
                num_positions=math.prod(message.hidden_BSD.shape[:2]),
                num_rows=len(message.lengths_B),
            )

    def _admit_evaluation(self, message: Forward) -> None:
        self._require(message, Phase.IDLE)
        self._check_forward(message)
        self._admit(message)

    def _admit_decode(self, message: Decode) -> None:
        self._require(message, Phase.IDLE, Phase.READY, Phase.TRAINING)
        if message.request_id <= self._last_request:
            raise RemoteProtocolError(f"request {message.request_id} after {self._last_request}: numbers must rise")
        if self._decoding is not None:
            raise RemoteProtocolError(f"request {message.request_id} before {self._decoding} is answered")
        self.terms.check_new_positions(message.hidden_BSD, message.lengths_B)
        self._last_request = self._decoding = message.request_id
        self._ends_left = min(self._ends_left + 1, _MAX_ENDS)

    def _admit_training(self, message: Forward) -> Forward | None:
        if self._was_closed(message.step):
            return None
        self._require(message, Phase.TRAINING)
        if message.step != self.next_step:
            raise RemoteProtocolError(f"Forward for step {message.step} where step {self.next_step} is next")
        if message.step > self.last_step:
            raise RemoteProtocolError(f"Forward for step {message.step} after the round's last, {self.last_step}")
        most = max(self.terms.micro_batches, self.terms.rows_per_step)
        if message.micro_batch != self._micro_batches_begun or message.micro_batch >= most:
            usual = f"{self._micro_batches_begun} of {self.terms.micro_batches}"
            smaller = f", or of up to {most} smaller ones," if most > self.terms.micro_batches else ""
            raise RemoteProtocolError(f"micro-batch {message.micro_batch} where {usual}{smaller} is next")
        self._check_forward(message)
        self._check_rows(len(message.lengths_B))
        self._admit(message)
        self._micro_batches_begun += 1
        return message

    def _check_rows(self, num_rows: int) -> None:
        """Raise for more rows than a step of this run has, however they are cut into micro-batches."""
        total, most = self._sent.num_rows + num_rows, self.terms.rows_per_step
        if most and total > most:
            raise RemoteProtocolError(f"{total} rows in step {self.next_step}, where a step of this run has {most}")

    def _admit_backward(self, message: Backward) -> Backward | None:
        if message.request_id in self._closed:
            self._closed.discard(message.request_id)
            return None
        graph = self._graphs.get(message.request_id)
        if graph is None or not graph.awaits_backward:
            raise RemoteProtocolError(f"backward {message.request_id} has no forward that waits for it")
        self.terms.check_like(Role.GRADIENT, message.gradient_BSD, graph.shape)
        graph.awaits_backward = False
        return message

    def _admit_commit(self, message: Commit) -> Commit | Reply | None:
        if self.last_commit is not None and message.step == self.last_commit.step:
            return Reply(message=self.last_commit)
        if self._was_closed(message.step):
            return None  # the client has been told, and waits for no answer
        if self.phase is Phase.COMMITTING and message.step == self.next_step:
            return None  # repeated on its way; the first is being dealt with
        if message.step < self.next_step:
            raise RemoteProtocolError(f"commit of step {message.step}, which is past: step {self.next_step} is next")
        self._require(message, Phase.TRAINING)
        if message.step > self.next_step or message.step > self.last_step:
            raise RemoteProtocolError(f"commit of step {message.step} leaves a gap: step {self.next_step} is next")
        self.terms.check_norms(message.norms_P)
        self._require_complete(message)
        num_tokens = self._sent.num_tokens
        if message.num_label_tokens > num_tokens:  # they weigh the step, so nobody may claim more than it sent
            raise RemoteProtocolError(
                f"{message.num_label_tokens} label tokens in a step of {num_tokens} tokens: at most each counts"
            )
        self.phase = Phase.COMMITTING
        self.asked = self._sent
        return message

    def _require_complete(self, message: Commit) -> None:
        if any(graph.step for graph in self._graphs.values()) or self._micro_batches_done < self.terms.micro_batches:
            raise RemoteProtocolError(
                f"commit of step {message.step} after {self._micro_batches_done} of {self.terms.micro_batches}"
                " micro-batches"
            )

    def _admit_upload(self, message: Upload) -> Upload | None:
        if message.round_number < self.round_number or self.phase is Phase.IDLE:
            return None  # the round closed without it, and the client has been told
        self._require(message, Phase.TRAINING)
        if message.round_number != self.round_number:
            raise RemoteProtocolError(f"layers of round {message.round_number} in round {self.round_number}")
        if self._graphs or self._micro_batches_begun:
            raise RemoteProtocolError("layers in the middle of a step")
        if self.next_step <= self.last_step:
            raise RemoteProtocolError(f"layers at step {self.next_step}, before the round's last, {self.last_step}")
        if message.num_examples < 1:
            raise RemoteProtocolError(f"layers from {message.num_examples} examples: an upload needs at least one")
        if message.num_tokens < 0:
            raise RemoteProtocolError(f"layers from {message.num_tokens} label tokens: there cannot be less than 0")
        self.terms.check_layers(message.layers)
        self.phase = Phase.MERGING
        return message

    def _admit_report(self, message: Report) -> Report:
        """Bound what a client can have written down: a few measurements a round."""
        if self._num_reports >= _MAX_REPORTS:
            raise RemoteProtocolError(f"more than {_MAX_REPORTS} reports in one round")
        if message.topic not in ("evaluated", "loaded") or message.phase not in ("before", "round", "after"):
            raise RemoteProtocolError(f"a report of {message.topic!r:.40} in phase {message.phase!r:.40}")
        if wrong := objection(message.metrics):
            raise RemoteProtocolError(f"a report with {wrong}")
        also = [name.removeprefix(ALSO) for name in message.metrics if name.startswith(ALSO)]
        if len(also) > MAX_ALSO or not all(re.fullmatch(ALSO_NAME_PATTERN, name) for name in also):
            raise RemoteProtocolError(
                f"a report of {len(also)} further texts, which are more than {MAX_ALSO}, or have other names than"
                " letters, digits, blanks, '.', '_' and '-'"
            )
        if message.topic == "loaded" and (message.metrics or not _DIGEST.fullmatch(message.digest)):
            raise RemoteProtocolError("a report of loaded layers that is not their SHA-256 in hex, and nothing else")
        if message.topic == "evaluated" and message.digest:
            raise RemoteProtocolError("a report of an evaluation with a digest")
        self._num_reports += 1
        return message

    def _admit_goodbye(self, message: Goodbye) -> Goodbye:
        """Take a goodbye, and take it again: a client that has not heard the answer says it once more."""
        self._require(message, Phase.IDLE, Phase.GONE)
        if wrong := objection_to_totals(message.metrics):
            raise RemoteProtocolError(f"a goodbye with {wrong}")
        self.phase = Phase.GONE
        return message

    def _was_closed(self, step: int) -> bool:
        return self._last_applied < step < self.next_step
