"""The client's side of its session: the messages that it may send, and whether an answer fits its question.

Sending something illegal is our bug (`LocalProtocolError`); an answer that does not fit is the server's
(`RemoteProtocolError`). Neither changes the state.
"""

from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol.messages import (
    Backward,
    BackwardDone,
    Commit,
    Committed,
    Declined,
    Decode,
    EndCache,
    Farewell,
    Forward,
    ForwardDone,
    Goodbye,
    Merged,
    Message,
    Ready,
    Resume,
    Resumed,
    RoundOpened,
    RoundsEnded,
    StepRefused,
    TensorFrames,
    Upload,
)
from splitfl.protocol.roles import Role
from splitfl.session.terms import Terms


class ClientSession:
    """What this client waits for, and the numbers it gives to what it asks."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.round_number = 0
        """Number of the merge whose layers this client holds."""
        self.open_round: RoundOpened | None = None
        self.next_step = 0
        self._graphs: dict[int, tuple[int, ...]] = {}
        self._awaiting: dict[int, type[ForwardDone | BackwardDone]] = {}
        self._abandoned: set[int] = set()
        self._waits_for: type[Message] | None = None
        self._claimed_step = 0
        self._last_request = 0
        self._decoding: tuple[int, tuple[int, ...]] | None = None
        """Number and shape of the `Decode` whose answer is waited for."""
        self._last_cache = 0
        self._committing: int | None = None
        self.is_parting = False
        """Whether all rounds are merged."""
        self._refused = 0
        """The last step that was refused."""

    @property
    def has_credit(self) -> bool:
        """Whether another micro-batch may be sent."""
        return len(self._graphs) < self.terms.max_in_flight

    @property
    def awaits_merge(self) -> bool:
        """Whether the merge of the open round is what comes next."""
        return self._waits_for is Merged

    def resume(self, *, held_round: int, step: int, commit_number: int, pending_step: int) -> Resume:
        """Say where this client is; the first thing to say on every connection."""
        if self._last_request or self.open_round is not None:
            raise LocalProtocolError("resuming in the middle of a session")
        self._wait_for(Resumed)
        self._claimed_step = step
        return Resume(held_round=held_round, step=step, commit_number=commit_number, pending_step=pending_step)

    def forward(
        self,
        *,
        step: int,
        micro_batch: int,
        hidden_BSD: TensorFrames,
        lengths_B: tuple[int, ...],
        example_lengths: tuple[int, ...] = (),
    ) -> Forward:
        """Number a micro-batch; `step` 0 is an evaluation, and `example_lengths` are for rows that are packed."""
        if not self.has_credit:
            raise LocalProtocolError(f"more than max_in_flight = {self.terms.max_in_flight} micro-batches under way")
        if self._waits_for is not None or self._committing is not None:
            raise LocalProtocolError("a micro-batch while an answer from the server is waited for")
        if step and self.open_round is None:
            raise LocalProtocolError(f"step {step} outside a round")
        if step and step != self.next_step:
            raise LocalProtocolError(f"step {step} where step {self.next_step} is next")
        if not step and self.open_round is not None:
            raise LocalProtocolError(f"an evaluation in the middle of round {self.open_round.round_number}")
        return Forward(
            request_id=self._begin_micro_batch(hidden_BSD),
            step=step,
            micro_batch=micro_batch,
            hidden_BSD=hidden_BSD,
            lengths_B=lengths_B,
            left_padded=False,
            example_lengths=example_lengths,
            adapters_off=False,
        )

    def _begin_micro_batch(self, hidden_BSD: TensorFrames) -> int:
        """Return the number of a micro-batch, whose answer is waited for from now on."""
        self._last_request += 1
        self._graphs[self._last_request] = hidden_BSD.shape
        self._awaiting[self._last_request] = ForwardDone
        return self._last_request

    def new_cache(self) -> int:
        """Return the number of a new generation's cache."""
        self._last_cache += 1
        return self._last_cache

    def decode(
        self,
        cache_id: int,
        hidden_BSD: TensorFrames,
        lengths_B: tuple[int, ...],
        beams_B: tuple[int, ...],
        *,
        adapters_off: bool = False,
    ) -> Decode:
        """Number the new positions of a generation."""
        if self._decoding is not None or self._waits_for is not None or self._committing is not None:
            raise LocalProtocolError("new positions of a generation while an answer from the server is waited for")
        self._last_request += 1
        self._decoding = (self._last_request, hidden_BSD.shape)
        return Decode(
            request_id=self._last_request,
            cache_id=cache_id,
            hidden_BSD=hidden_BSD,
            lengths_B=lengths_B,
            beams_B=beams_B,
            adapters_off=adapters_off,
        )

    def end_cache(self, cache_id: int) -> EndCache:
        """Have a cache freed."""
        return EndCache(cache_id=cache_id)

    def backward(self, request_id: int, gradient_BSD: TensorFrames) -> Backward:
        """Answer activations with their gradient."""
        if request_id not in self._graphs or request_id in self._awaiting:
            raise LocalProtocolError(f"backward {request_id} has no activations to answer")
        self._awaiting[request_id] = BackwardDone
        return Backward(request_id=request_id, gradient_BSD=gradient_BSD)

    def commit(self, *, num_label_tokens: int, loss: float, norms_P: TensorFrames) -> Commit:
        """Ask for the step that all micro-batches have gone through."""
        if self._graphs:
            raise LocalProtocolError(
                f"commit of step {self.next_step} with {len(self._graphs)} micro-batches under way"
            )
        if self.open_round is None or self._waits_for is not None or self._committing is not None:
            raise LocalProtocolError(f"commit of step {self.next_step}, which is not open")
        self._committing = self.next_step
        return Commit(
            step=self.next_step,
            num_label_tokens=num_label_tokens,
            loss=loss,
            norms_P=norms_P,
            learning_rate=0.0,
            clip_coefficient=1.0,
        )

    def ready(self, num_examples: int) -> Ready:
        """Ask for the next round."""
        if self.open_round is not None:
            raise LocalProtocolError(f"ready in the middle of round {self.open_round.round_number}")
        self._wait_for(RoundOpened)
        return Ready(round_number=self.round_number, num_examples=num_examples)

    def upload(self, *, num_examples: int, num_tokens: int, layers: tuple[TensorFrames, ...]) -> Upload:
        """Hand over this round's layers."""
        if self.open_round is None:
            raise LocalProtocolError("layers outside a round")
        self._wait_for(Merged)
        return Upload(
            round_number=self.open_round.round_number, num_examples=num_examples, num_tokens=num_tokens, layers=layers
        )

    def sit_out(self) -> None:
        """Wait for the merge of a round without taking part."""
        if self.open_round is None:
            raise LocalProtocolError("sitting out a round that is not open")
        self._wait_for(Merged)

    def goodbye(self, metrics: dict[str, float]) -> Goodbye:
        """End the session in order."""
        if self.open_round is not None:
            raise LocalProtocolError(f"goodbye in the middle of round {self.open_round.round_number}")
        self._wait_for(Farewell)
        return Goodbye(metrics=metrics)

    def abandon_step(self, next_step: int) -> None:
        """Forget a step that was refused; answers still under way are ignored when they come."""
        self._abandoned |= set(self._awaiting)
        self._graphs.clear()
        self._awaiting.clear()
        self._committing = None
        self.next_step = next_step

    def receive(self, message: Message) -> Message | None:
        """Check that an answer is one we wait for; None means it belongs to a step we gave up."""
        match message:
            case ForwardDone(request_id=number) | Declined(request_id=number) if self._is_decoding(number):
                return self._receive_decoded(message)
            case ForwardDone(request_id=number) | BackwardDone(request_id=number):
                return self._receive_answer(number, message)
            case Committed():
                if message.step != self._committing and message.step < self.next_step:
                    return None  # answered once more, because the question was repeated on its way
                if message.step != self._committing:
                    asked = f"step {self._committing}" if self._committing is not None else "none"
                    raise RemoteProtocolError(f"step {message.step} committed where {asked} was asked for")
                check_scaling(message.clip_coefficient)
                self._committing = None
                self.next_step = message.step + 1
                return message
            case StepRefused():
                return self._receive_refusal(message)
            case Resumed():
                self._require_asked(message)
                self._go_on(message)
                return message
            case RoundOpened():
                self._require_asked(message)
                self._check_round(message.round_number, message.first_step, message.num_steps)
                if message.layers:
                    self.terms.check_merged(message.layers)
                self._waits_for = None
                self.open_round = message
                self.next_step = message.first_step
                return message
            case RoundsEnded():
                if self._waits_for is not RoundOpened:
                    raise RemoteProtocolError("RoundsEnded was not asked for")
                self.terms.check_held(message.round_number, held=self.round_number)
                if message.layers:
                    self.terms.check_merged(message.layers)
                self._waits_for = None
                self.round_number = message.round_number
                self.is_parting = True
                return message
            case Merged():
                if self.open_round is None or not self.terms.rounds.may_end(
                    self.open_round.round_number, message.round_number
                ):
                    raise RemoteProtocolError(f"layers of round {message.round_number}, which is not open here")
                self.terms.check_held(message.round_number, held=self.round_number)
                self.terms.check_merged(message.layers)
                self.abandon_step(self.next_step)
                self._waits_for = None
                self.open_round = None
                self.round_number = message.round_number
                self.is_parting = message.is_last
                return message
            case Farewell():
                self._require_asked(message)
                self._waits_for = None
                return message
        raise RemoteProtocolError(f"{type(message).__name__} is not a server's to send here")

    def _go_on(self, message: Resumed) -> None:
        if message.verdict not in ("go", "rewind", "anew"):
            raise RemoteProtocolError(f"resumed with verdict {message.verdict!r:.20}")
        if message.verdict == "rewind" and message.step > self._claimed_step:
            raise RemoteProtocolError(f"going back to step {message.step} from step {self._claimed_step}")
        check_scaling(message.clip_coefficient)
        self.terms.check_held(message.held_round, held=0)
        if message.layers:
            self.terms.check_merged(message.layers)
        if message.round_number:
            self._check_open(message)
        elif message.awaits_merge:
            raise RemoteProtocolError("resumed to wait for a merge, with no round that it could be of")
        self._waits_for = None
        self.is_parting = message.is_parting
        if message.verdict == "rewind":
            return
        self.round_number = message.held_round
        if message.round_number:
            self.open_round = RoundOpened(
                round_number=message.round_number,
                first_step=message.first_step,
                num_steps=message.num_steps,
                layers=(),
            )
            self.next_step = message.next_step
        if message.awaits_merge:
            self._waits_for = Merged

    def _check_open(self, message: Resumed) -> None:
        """Raise unless the round that we are to go on with may be, and the step is one of it."""
        first, count = message.first_step, message.num_steps
        self._check_round(message.round_number, first, count)
        if not first <= message.next_step <= first + count:
            raise RemoteProtocolError(
                f"going on at step {message.next_step} of a round of {count} steps from step {first} on"
            )

    def _check_round(self, number: int, first_step: int, num_steps: int) -> None:
        self.terms.check_round(number, held=self.round_number, first_step=first_step, num_steps=num_steps)

    def _is_decoding(self, number: int) -> bool:
        return self._decoding is not None and self._decoding[0] == number

    def _receive_decoded(self, message: ForwardDone | Declined) -> ForwardDone | Declined:
        if isinstance(message, ForwardDone) and self._decoding is not None:
            self.terms.check_like(Role.NEW_POSITIONS, message.hidden_BSD, self._decoding[1])
        self._decoding = None
        return message

    def _receive_answer(self, number: int, message: ForwardDone | BackwardDone) -> Message | None:
        if number in self._abandoned:
            self._abandoned.discard(number)
            return None
        if self._awaiting.get(number) is not type(message):
            raise RemoteProtocolError(f"{type(message).__name__} {number} was not asked for")
        shape = self._graphs[number]
        match message:
            case ForwardDone(hidden_BSD=hidden_BSD):
                self.terms.check_like(Role.HIDDEN, hidden_BSD, shape)
            case BackwardDone(gradient_BSD=gradient_BSD) if gradient_BSD is not None:
                self.terms.check_like(Role.GRADIENT, gradient_BSD, shape)
        del self._awaiting[number]
        if self._is_done(message):
            del self._graphs[number]
        return message

    def _is_done(self, message: ForwardDone | BackwardDone) -> bool:
        return isinstance(message, BackwardDone) or not self.terms.needs_backward or not self.open_round

    def _receive_refusal(self, message: StepRefused) -> StepRefused | None:
        if message.step == self._refused:
            return None  # our commit crossed the refusal on its way and was answered with it once more
        if self.open_round is None or self._waits_for is not None:
            raise RemoteProtocolError(f"step {message.step} refused while none is open")
        if message.step < self.next_step:
            return None
        end = self.open_round.first_step + self.open_round.num_steps
        if message.step > self.next_step or not message.step < message.next_step <= end:
            raise RemoteProtocolError(
                f"step {message.step} refused in favour of {message.next_step} where step {self.next_step} is open"
            )
        self._refused = message.step
        return message

    def _wait_for(self, kind: type[Message]) -> None:
        if self._graphs or self._waits_for is not None or self._committing is not None:
            raise LocalProtocolError(f"waiting for {kind.__name__} while something else is under way")
        self._waits_for = kind

    def _require_asked(self, message: Message) -> None:
        if self._waits_for is not type(message):
            raise RemoteProtocolError(f"{type(message).__name__} was not asked for")


def check_scaling(clip_coefficient: float) -> None:
    """Raise for a factor that would do anything to our gradients but shrink them."""
    if not 0 <= clip_coefficient <= 1:  # NaN is in no range
        raise RemoteProtocolError(f"a clip coefficient of {clip_coefficient:g}, which is not from 0 to 1")
