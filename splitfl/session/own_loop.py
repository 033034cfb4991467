"""Both sides of an own-loop client's session, without rounds: the client evaluates in its loop when it likes.

A step is open from its first training micro-batch to its commit or discard, and has any number of micro-batches. Its
number is the client's choice as long as numbers rise: one that is given up is not used again. Otherwise the rules are
the same as in `session.server` and `session.client`: who breaks one changes nothing.
"""

import math

from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol.messages import (
    BackwardDone,
    Commit,
    Declined,
    Discard,
    Forward,
    ForwardDone,
    GoBack,
    Keep,
    Kept,
    Message,
    Resume,
    Resumed,
    RoundOpened,
    StepRefused,
    TensorFrames,
    WentBack,
)
from splitfl.session.client_session import ClientSession
from splitfl.session.server_session import Accepted, Applied, Phase, Reply, ServerSession
from splitfl.session.terms import Terms

_ENDLESS = 1 << 61  # whole numbers on the wire end at 2**62


class OwnLoopServerSession(ServerSession):
    """The next steps that one client may take in its own loop; it is always `TRAINING`, or `COMMITTING`."""

    def __init__(self, terms: Terms) -> None:
        super().__init__(terms)
        self._awaits_snapshot = False
        """Whether a snapshot is asked for, to keep or to go back to."""
        self._begin_at(Applied())

    def _take(self, message: Message) -> Accepted | Reply | None:
        match message:
            case Discard():
                return self._admit_discard(message)
            case Keep() | GoBack():
                return self._admit_snapshot(message)
        return super()._take(message)

    def _admit_snapshot(self, message: Keep | GoBack) -> Keep | GoBack:
        self._require(message, Phase.TRAINING)
        if isinstance(message, GoBack) and self.is_in_step:
            raise RemoteProtocolError(f"GoBack in the middle of step {self.next_step}")
        if self._awaits_snapshot:
            raise RemoteProtocolError(
                f"{type(message).__name__} before the last snapshot that was asked for is answered"
            )
        self._awaits_snapshot = True
        return message

    def snapshot_answered(self) -> None:
        """Take note that the answer to `Keep` or `GoBack` is on its way."""
        self._awaits_snapshot = False

    def disconnected(self) -> None:
        """Take note that the connection is gone, and with it the client's wait for a snapshot."""
        super().disconnected()
        self._awaits_snapshot = False

    def restore(self, *, applied: Applied, round_: RoundOpened | None, next_step: int, awaits_merge: bool) -> None:
        """Set where this client is, by a log or because it has gone back: after its last applied step."""
        self._begin_at(applied)
        self.next_step = max(self.next_step, next_step)
        self.last_commit = None

    def resume(
        self,
        claim: Resume,
        *,
        held_round: int,
        layers: tuple[TensorFrames, ...],
        counted_round: int = 0,
        is_parting: bool,
    ) -> Resumed:
        """Compare where the client says it is with what was applied; a new one goes on after that."""
        resumed = super().resume(
            claim, held_round=held_round, layers=layers, counted_round=counted_round, is_parting=is_parting
        )
        self.phase = Phase.TRAINING
        return resumed

    def _compare(self, claim: Resume, held_round: int) -> tuple[str, str]:
        is_new = not (claim.step or claim.commit_number or claim.pending_step)
        return ("go", "") if is_new else super()._compare(claim, held_round)

    def _begin_at(self, applied: Applied) -> None:
        self.phase = Phase.TRAINING
        self.applied = applied
        self.next_step = applied.step + 1
        self.last_step = _ENDLESS
        self._last_applied = applied.step
        self._begin_step()

    def _admit_evaluation(self, message: Forward) -> None:
        self._require(message, Phase.TRAINING)
        self._check_forward(message)
        self._admit(message)

    def _admit_training(self, message: Forward) -> Forward | None:
        if self._was_closed(message.step):
            return None
        self._require(message, Phase.TRAINING)
        if message.step < self.next_step or (self.is_in_step and message.step != self.next_step):
            raise RemoteProtocolError(f"Forward for step {message.step} where step {self.next_step} is next")
        if message.micro_batch != self._micro_batches_begun:
            raise RemoteProtocolError(
                f"micro-batch {message.micro_batch} where {self._micro_batches_begun} is next in step {message.step}"
            )
        self._check_forward(message)
        if not self.is_in_step:
            self._closed.clear()  # what was under way in earlier steps came before this
        self._admit(message)
        self.next_step = message.step
        self._micro_batches_begun += 1
        return message

    def _admit_discard(self, message: Discard) -> Discard | None:
        if self._was_closed(message.step):
            return None
        self._require(message, Phase.TRAINING)
        if message.step != self.next_step or not self.is_in_step:
            raise RemoteProtocolError(f"Discard of step {message.step}, which is not open")
        self._forget_step(message.step + 1)
        return message

    def _require_complete(self, message: Commit) -> None:
        """Take a step however many micro-batches it has; graphs that got no gradient are freed with it."""
        if not self._micro_batches_done:
            raise RemoteProtocolError(f"commit of step {message.step} without a gradient")
        if not all(math.isfinite(value) and value >= 0 for value in (message.learning_rate, message.clip_coefficient)):
            raise RemoteProtocolError("a learning rate or clip coefficient that is negative or not finite")
        self._drop_training_graphs()


class OwnLoopClientSession(ClientSession):
    """What this client waits for; it asks for one thing at a time."""

    def __init__(self, terms: Terms) -> None:
        super().__init__(terms)
        self.next_step = 1
        self._training: set[int] = set()

    def forward_in_loop(
        self,
        *,
        step: int,
        micro_batch: int,
        hidden_BSD: TensorFrames,
        lengths_B: tuple[int, ...],
        left_padded: bool,
        adapters_off: bool,
        example_lengths: tuple[int, ...] = (),
    ) -> Forward:
        """Number a micro-batch; `step` 0 is one that needs no gradient, `example_lengths` are for packed rows."""
        if self._waits_for is not None or self._committing is not None or self._awaiting or not self.has_credit:
            raise LocalProtocolError("a micro-batch while something else is under way")
        request_id = self._begin_micro_batch(hidden_BSD)
        if step:
            self._training.add(request_id)
            self.next_step = step
        return Forward(
            request_id=request_id,
            step=step,
            micro_batch=micro_batch,
            hidden_BSD=hidden_BSD,
            lengths_B=lengths_B,
            left_padded=left_padded,
            example_lengths=example_lengths,
            adapters_off=adapters_off,
        )

    def commit_in_loop(
        self, *, step: int, norms_P: TensorFrames, learning_rate: float, clip_coefficient: float
    ) -> Commit:
        """Ask for a step to be applied; its loss and its labels are this side's own affair."""
        if self._awaiting or self._waits_for is not None or self._committing is not None:
            raise LocalProtocolError(f"commit of step {step} while something else is under way")
        self._forget_graphs()
        self._committing = self.next_step = step
        return Commit(
            step=step,
            num_label_tokens=0,
            loss=0.0,
            norms_P=norms_P,
            learning_rate=learning_rate,
            clip_coefficient=clip_coefficient,
        )

    def discard(self, step: int) -> Discard:
        """Give a step up."""
        self._forget_graphs()
        self.next_step = step + 1
        return Discard(step=step)

    def keep(self) -> Keep:
        """Ask for a snapshot."""
        self._waits_for = Kept
        return Keep()

    def go_back(self, commit_number: int) -> GoBack:
        """Ask for an earlier snapshot."""
        self._waits_for = WentBack
        return GoBack(commit_number=commit_number)

    def abandon_step(self, next_step: int) -> None:
        """Forget a step that was refused; an evaluation's answer is still waited for."""
        evaluations = {n: kind for n, kind in self._awaiting.items() if n not in self._training}
        shapes = {number: self._graphs[number] for number in evaluations}
        for number in evaluations:
            del self._awaiting[number]
        super().abandon_step(next_step)
        self._awaiting |= evaluations
        self._graphs |= shapes
        self._training.clear()

    def receive(self, message: Message) -> Message | None:
        """Check that an answer is one we wait for; None means it belongs to a step we gave up."""
        match message:
            case Kept() | WentBack():
                self._require_asked(message)
                self._waits_for = None
                return message
            case Declined() if self._waits_for in (Kept, WentBack):
                self._waits_for = None
                return message
        return super().receive(message)

    def _go_on(self, message: Resumed) -> None:
        super()._go_on(message)
        self.next_step = message.next_step

    def _forget_graphs(self) -> None:
        """Drop the activations of the step that no gradient came for."""
        self._graphs.clear()
        self._training.clear()

    def _is_done(self, message: ForwardDone | BackwardDone) -> bool:
        return isinstance(message, BackwardDone) or message.request_id not in self._training

    def _receive_refusal(self, message: StepRefused) -> StepRefused | None:
        if message.step < self.next_step:
            return None  # it crossed our commit or our discard on its way
        return message
