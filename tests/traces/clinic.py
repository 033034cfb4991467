"""A client of a conversation: a real session, the records that it would keep, and its end of the wire."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from sample_messages import frames_of

from splitfl.protocol import messages
from splitfl.protocol.messages import Attach, Hello, Leave, Message, Ping, Report, Resume, TensorFrames
from splitfl.session.client_session import ClientSession
from splitfl.session.own_loop import OwnLoopClientSession
from splitfl.session.terms import Terms

ROWS, LENGTH = 2, 3
LENGTHS = (3, 2)


@dataclass(kw_only=True, eq=False)
class Records:
    """What a client writes down, and finds again when it comes back."""

    step: int = 0
    commit_number: int = 0
    pending_step: int = 0
    held_round: int = 0


@dataclass(kw_only=True, eq=False)
class Clinic:
    """One client; the script says what it does next, and it answers what needs an answer at once."""

    name: str
    terms: Terms
    has_own_loop: bool
    records: Records = field(default_factory=Records)
    number: int = 0
    """Of its connection."""
    is_connected: bool = False
    is_silent: bool = False
    is_slow: bool = False
    """Whether what it says and hears stays on the wire until the script delivers it."""
    answered: deque[int] = field(default_factory=deque)
    """Requests whose activations are here, and whose gradient is not sent yet."""
    up: deque[Message] = field(default_factory=deque)
    down: deque[Message] = field(default_factory=deque)
    num_begun: int = 0
    """Micro-batches of the open step."""

    def __post_init__(self) -> None:
        self.session = self._new_session()

    @property
    def peer(self) -> bytes:
        """Its data connection, as the server knows it."""
        return f"{self.name}/{self.number}/data".encode()

    @property
    def control_peer(self) -> bytes:
        """Its control connection."""
        return f"{self.name}/{self.number}/control".encode()

    def activations(self) -> TensorFrames:
        """Return a micro-batch's activations: zeros, since no trace is about numbers."""
        return frames_of(ROWS, LENGTH, self.terms.hidden_size)

    @property
    def has_mail(self) -> bool:
        """Whether something is on its wire that moves."""
        return not self.is_slow and bool(self.down or self.up)

    @property
    def own_loop(self) -> OwnLoopClientSession:
        """The session of a client in a loop of its own."""
        assert isinstance(self.session, OwnLoopClientSession), f"{self.name} has no loop of its own"
        return self.session

    def connect(self) -> None:
        """Say hello on a new connection; nothing of the last one is left."""
        self.number += 1
        self.is_connected, self.is_silent = True, False
        self._forget_micro_batches()
        self.up.clear()
        self.down.clear()
        self.session = self._new_session()
        self.up.append(Hello(wire_version=messages.WIRE_VERSION, software="a trace", client_id=self.name))

    def forward(self, step: int) -> Message:
        """Send the next micro-batch of a step; 0 is an evaluation."""
        number = self.num_begun if step else 0
        if self.has_own_loop:
            message: Message = self.own_loop.forward_in_loop(
                step=step,
                micro_batch=number,
                hidden_BSD=self.activations(),
                lengths_B=LENGTHS,
                left_padded=False,
                adapters_off=False,
            )
        else:
            message = self.session.forward(
                step=step, micro_batch=number, hidden_BSD=self.activations(), lengths_B=LENGTHS
            )
        self.num_begun += 1 if step else 0
        return message

    def commit(self, num_label_tokens: int) -> Message:
        """Write down that a step is asked for, and ask."""
        norms_P = frames_of(self.terms.num_trainable)
        if self.has_own_loop:
            message = self.own_loop.commit_in_loop(
                step=self.session.next_step, norms_P=norms_P, learning_rate=0.1, clip_coefficient=1.0
            )
        else:
            message = self.session.commit(num_label_tokens=num_label_tokens, loss=1.5, norms_P=norms_P)
        self.records.pending_step = message.step
        return message

    def discard(self) -> Message:
        """Give the open step up."""
        message = self.own_loop.discard(self.session.next_step)
        self._forget_step()
        return message

    @property
    def has_steps_left(self) -> bool:
        """Whether a step of the open round is to be done."""
        round_ = self.session.open_round
        return round_ is not None and self.session.next_step < round_.first_step + round_.num_steps

    def backward(self) -> Message:
        """Answer the oldest activations that are here with their gradient."""
        number = self.answered[0] if self.answered else 0
        message = self.session.backward(number, self.activations())
        self.answered.popleft()
        return message

    def upload(self) -> Message:
        """Hand this round's layers over."""
        layers = zip(self.terms.layer_shapes, self.terms.layer_dtypes, strict=True)
        uploaded = tuple(frames_of(*shape, dtype=dtype) for shape, dtype in layers)
        return self.session.upload(num_examples=5, num_tokens=10, layers=uploaded)

    def report(self, phase: str, loss: float) -> Message:
        """Say what was measured of the layers that are held."""
        metrics = {"eval_loss": loss, "num_eval_tokens": 100.0}
        return Report(topic="evaluated", phase=phase, round_number=self.records.held_round, metrics=metrics, digest="")

    def leave(self, reason: str, *, comes_back: bool) -> Message:
        """Go before the end."""
        self.is_connected = False
        return Leave(reason=reason, comes_back=comes_back)

    def decode(self, told: Mapping[str, str]) -> Message:
        """Send new positions of a generation."""
        rows, length = int(told.get("rows", 1)), int(told.get("new", 1))
        hidden_BSD = frames_of(rows, length, self.terms.hidden_size)
        beams_B = tuple(map(int, told["beams"].split(","))) if "beams" in told else ()
        return self.session.decode(int(told.get("cache", 1)), hidden_BSD, (length,) * rows, beams_B)

    def hear(self, message: Message) -> None:
        """Take what the server sends; raise `RemoteProtocolError`, and change nothing, for what it may not send now."""
        match message:
            case messages.Welcome(session=token):
                self.up += [Attach(session=token), self.claim()]
            case messages.Refusal() | messages.Shutdown():
                self.is_connected = False
            case messages.Pong():
                pass
            case _:
                heard = self.session.receive(message)
                if heard is not None:
                    self._follow(heard)

    def _follow(self, message: Message) -> None:
        match message:
            case messages.ForwardDone(request_id=number):
                is_training = self.session.open_round is not None or self.has_own_loop
                if is_training and self.terms.needs_backward:
                    self.answered.append(number)
            case messages.Committed():
                self._applied(message.step, message.commit_number)
            case messages.StepRefused():
                self.session.abandon_step(message.next_step)
                self._forget_step()
            case messages.Resumed():
                self._go_on(message)
            case messages.RoundOpened():
                self._begin(message)
            case messages.Merged() | messages.RoundsEnded():
                self.records.held_round = message.round_number
                self._forget_step()
            case messages.WentBack():
                self.records.step, self.records.commit_number = message.step, message.commit_number
            case messages.Farewell():
                self.is_connected = False

    def _begin(self, round_: messages.RoundOpened) -> None:
        if round_.layers:
            self.records.held_round = round_.round_number - 1
        self._forget_step()
        if not round_.num_steps:
            self.session.sit_out()

    def _go_on(self, resumed: messages.Resumed) -> None:
        records = self.records
        if resumed.verdict == "rewind":
            held_round = min(records.held_round, resumed.held_round)
            self.records = Records(step=resumed.step, commit_number=resumed.commit_number, held_round=held_round)
            self.session = self._new_session()
            self.up.append(self.claim())
            return
        if resumed.verdict == "anew" or resumed.step == records.pending_step:
            records.step, records.commit_number = resumed.step, resumed.commit_number
        records.pending_step = 0
        if resumed.layers:
            records.held_round = resumed.held_round

    def claim(self) -> Resume:
        records = self.records
        return self.session.resume(
            held_round=records.held_round,
            step=records.step,
            commit_number=records.commit_number,
            pending_step=records.pending_step,
        )

    def _applied(self, step: int, commit_number: int) -> None:
        self.records.step, self.records.commit_number = step, commit_number
        self._forget_step()

    def _forget_step(self) -> None:
        self.records.pending_step = 0
        self._forget_micro_batches()

    def _forget_micro_batches(self) -> None:
        self.num_begun = 0
        self.answered.clear()

    def _new_session(self) -> ClientSession:
        return (OwnLoopClientSession if self.has_own_loop else ClientSession)(self.terms)


Call: TypeAlias = Callable[[Clinic, Mapping[str, str]], Message]

CALLS: Mapping[str, Call] = {
    "ready": lambda clinic, told: clinic.session.ready(int(told.get("examples", 5))),
    "evaluate": lambda clinic, told: clinic.forward(0),
    "forward": lambda clinic, told: clinic.forward(int(told.get("step", clinic.session.next_step))),
    "backward": lambda clinic, told: clinic.backward(),
    "commit": lambda clinic, told: clinic.commit(int(told.get("labels", 4))),
    "resume": lambda clinic, told: clinic.claim(),
    "upload": lambda clinic, told: clinic.upload(),
    "report": lambda clinic, told: clinic.report(told.get("phase", "round"), float(told.get("loss", 2.0))),
    "goodbye": lambda clinic, told: clinic.session.goodbye({"num_examples": 5.0}),
    "leave": lambda clinic, told: clinic.leave(told.get("reason", "stopped"), comes_back="back" in told),
    "ping": lambda clinic, told: Ping(number=1),
    "decode": lambda clinic, told: clinic.decode(told),
    "end-cache": lambda clinic, told: clinic.session.end_cache(int(told.get("cache", 1))),
    "discard": lambda clinic, told: clinic.discard(),
    "keep": lambda clinic, told: clinic.own_loop.keep(),
    "go-back": lambda clinic, told: clinic.own_loop.go_back(int(told.get("commit", 0))),
}
IN_OWN_LOOPS = ("discard", "keep", "go-back")
ALWAYS = ("report", "leave", "ping", "end-cache")
"""Calls that no state of a session forbids."""
