"""A client that lies: it speaks the protocol over a real connection, with keys if it has any, and says what it likes.

`Liar` has just joined and resumed; its methods are the honest way through a round, for a lie at any point of it.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from packed import packed

from splitfl.config.trees import RunConfig
from splitfl.errors import PeerGone, Refused
from splitfl.models.source import empty_cut
from splitfl.protocol import codec
from splitfl.protocol.messages import (
    WIRE_VERSION,
    Attach,
    Backward,
    BackwardDone,
    Commit,
    Committed,
    Decode,
    Discard,
    Forward,
    ForwardDone,
    Hello,
    Message,
    Ping,
    Ready,
    Refusal,
    Resume,
    Resumed,
    RoundOpened,
    TensorFrames,
    Upload,
    Welcome,
    Why,
)
from splitfl.training.terms import terms_of
from splitfl.transport.keys import read_enrolment, read_key_pair
from splitfl.transport.security import ClientSecurity
from splitfl.transport.zeromq import Endpoint

M = TypeVar("M", bound=Message)

OPTIONS: dict[str, Any] = {"max_frame_bytes": 1 << 20, "heartbeat_interval": 60.0, "heartbeat_timeout": 120.0}
WIDTH = 32
ROWS, LENGTH = 2, 5


def activations(*, rows: int = ROWS, length: int = LENGTH, value: float = 0.1) -> TensorFrames:
    """Describe activations of the tiny model, all alike."""
    return packed(torch.full((rows, length, WIDTH), value), 1 << 18)


# Messages that a flood says at once.
_BURST = 8


class Liar:
    """One session of a client under a name, on a data and a control connection."""

    def __init__(
        self, port: int, name: str, model: Path, *, keys: Path | None = None, enrolment: Path | None = None
    ) -> None:
        """Connect; nothing is said yet. `model` is the run's, for the shapes of its layers."""
        self._model = model
        self.name = name
        self._address = f"tcp://127.0.0.1:{port}"
        self._security: ClientSecurity | None = None
        if keys is not None and enrolment is not None:
            server_key = read_enrolment(enrolment).server_public_key
            self._security = ClientSecurity(key_pair=read_key_pair(keys), server_public_key=server_key)
        self.endpoint = self._connect()
        self._to_say: tuple[Message, ...] = ()
        self._pinging: threading.Thread | None = None
        self._stopping = threading.Event()
        self.request_id = 0
        self.heard: list[Message] = []
        self._has_resumed = False

    def _connect(self) -> Endpoint:
        return Endpoint(self._address, security=self._security, **OPTIONS)

    def join(self) -> "Liar":
        """Say hello, attach a control connection that pings by itself, and keep what the welcome says."""
        self.say(Hello(wire_version=WIRE_VERSION, software="liar", client_id=self.name))
        self.welcome = self.wait_for(Welcome)
        self.run = RunConfig.model_validate_json(self.welcome.settings)
        self._pinging = threading.Thread(target=self._ping, daemon=True)
        self._pinging.start()
        self.terms = terms_of(self.run, empty_cut(self._model, self.run)[0])
        return self

    def resume(self, **claims: int) -> Resumed:
        """Say where we are: at the beginning, unless the claims say otherwise."""
        self.say(Resume(**{"held_round": 0, "step": 0, "commit_number": 0, "pending_step": 0, **claims}))
        self._has_resumed = True
        return self.wait_for(Resumed)

    def come_again(self) -> None:
        """Connect anew, and be where we were with a new session."""
        self.close()
        self.endpoint, self._stopping = self._connect(), threading.Event()
        self.join()
        if self._has_resumed:
            self.resume()

    def _ping(self) -> None:
        with self._connect() as control:
            try:
                control.send(codec.encode(Attach(session=self.welcome.session)))
                number = 0
                while not self._stopping.wait(0.2):
                    number += 1
                    for message in (*self._to_say, Ping(number=number)):
                        control.send(codec.encode(message))
                    self._to_say = ()
                    while control.recv(0.0) is not None:
                        pass
            except (PeerGone, Refused):
                return

    # what anybody may say

    def say_on_control(self, *messages: Message) -> None:
        """Have something said on the control connection, with the next ping."""
        self._to_say = messages

    def say(self, *messages: Message) -> None:
        """Send, whatever it is."""
        for message in messages:
            self.endpoint.send(codec.encode(message))

    def hear(self, timeout_s: float = 2.0) -> Message | None:
        """Return the next message, None when none comes or the connection has ended."""
        try:
            frames = self.endpoint.recv(timeout_s)
        except (PeerGone, Refused):
            return None
        if frames is None:
            return None
        self.heard.append(codec.decode(frames, max_frame_bytes=1 << 20))
        return self.heard[-1]

    def wait_for(self, kind: type[M], timeout_s: float = 20.0) -> M:
        """Return the next message of a kind; what comes before it is kept in `heard`."""
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            message = self.hear(left_s)
            if isinstance(message, kind):
                return message
            assert not isinstance(message, Refusal), f"refused while waiting for {kind.__name__}: {message}"
        raise AssertionError(f"no {kind.__name__} within {timeout_s} s; heard {self.heard[-3:]}")

    def refusal(self, timeout_s: float = 10.0) -> Refusal:
        """Return what the server says when it has had enough."""
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            message = self.hear(left_s)
            if isinstance(message, Refusal):
                return message
        raise AssertionError(f"not refused within {timeout_s} s; heard {self.heard[-3:]}")

    # the honest way

    def ready(self, round_number: int = 0) -> RoundOpened:
        """Wait for a round."""
        self.say(Ready(round_number=round_number, num_examples=10))
        return self.wait_for(RoundOpened, 40.0)

    def forward(self, step: int, micro_batch: int = 0, **changed: Any) -> Forward:
        """Make a micro-batch with the next number."""
        self.request_id += 1
        usual: dict[str, Any] = {
            "hidden_BSD": activations(),
            "lengths_B": (LENGTH,) * ROWS,
            "left_padded": False,
            "example_lengths": (),
            "adapters_off": False,
        }
        return Forward(request_id=self.request_id, step=step, micro_batch=micro_batch, **{**usual, **changed})

    def decode(self, cache_id: int) -> Decode:
        """Begin a generation with the next number."""
        self.request_id += 1
        return Decode(
            request_id=self.request_id,
            cache_id=cache_id,
            hidden_BSD=activations(),
            lengths_B=(LENGTH,) * ROWS,
            beams_B=(),
            adapters_off=False,
        )

    def discards(self, number: int) -> Message:
        """Make, as an own-loop client, a micro-batch of a step and then its giving up, and so on."""
        step = number // 2 + 1
        return Discard(step=step) if number % 2 else self.forward(step)

    def micro_batch(self, step: int, micro_batch: int = 0) -> None:
        """Take one micro-batch both ways."""
        message = self.forward(step, micro_batch)
        self.say(message)
        self.wait_for(ForwardDone)
        self.say(Backward(request_id=message.request_id, gradient_BSD=activations(value=1e-3)))
        self.wait_for(BackwardDone)

    def commit(self, step: int, **changed: Any) -> Commit:
        """Make the request to apply a step."""
        usual: dict[str, Any] = {
            "num_label_tokens": 2,
            "loss": 1.0,
            "norms_P": packed(torch.full((self.terms.num_trainable,), 1e-3), 1 << 18),
            "learning_rate": 0.0,
            "clip_coefficient": 1.0,
        }
        return Commit(step=step, **{**usual, **changed})

    def step(self, step: int) -> Committed:
        """Make a whole step."""
        for number in range(self.run.federation.gradient_accumulation_steps):
            self.micro_batch(step, number)
        self.say(self.commit(step))
        return self.wait_for(Committed)

    def upload(self, round_number: int, **changed: Any) -> Upload:
        """Make the round's layers: zeros."""
        usual: dict[str, Any] = {
            "num_examples": 10,
            "num_tokens": 10,
            "layers": tuple(packed(torch.zeros(shape), 1 << 18) for shape in self.terms.layer_shapes),
        }
        return Upload(round_number=round_number, **{**usual, **changed})

    # the end

    def close(self) -> None:
        """End both connections without a word."""
        self._stopping.set()
        if self._pinging is not None:
            self._pinging.join(timeout=5)
        self.endpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _t: TracebackType | None
    ) -> None:
        self.close()


def flood(liar: Liar, message: Callable[[int], Message], times: int = 200_000, patience_s: float = 25.0) -> Refusal:
    """Say something again and again without waiting for answers, until the server has had enough; return its words."""
    deadline_s = time.monotonic() + patience_s
    for number in range(times):
        while not _is_sent(liar, message(number)):
            assert time.monotonic() < deadline_s, f"message {number} of {times} is not taken"
        if number % _BURST == 0:
            time.sleep(0.002)  # to hear the answers: a server that cannot get rid of them says no more
            if (refusal := _refused(liar)) is not None:
                return refusal
            if any(isinstance(each, Refusal) for each in liar.heard):
                liar.heard.clear()  # no session here: the word that ended it found no room after the answers
                liar.come_again()
    while time.monotonic() < deadline_s:
        if (refusal := _refused(liar)) is not None:
            return refusal
        time.sleep(0.05)
    raise AssertionError(f"taken {times} times: {message(0)!r:.100}")


def _is_sent(liar: Liar, message: Message) -> bool:
    try:
        liar.say(message)
    except PeerGone:  # the queue is full
        time.sleep(0.005)
        _refused(liar)
        return False
    return True


def _refused(liar: Liar) -> Refusal | None:
    """Take in what has come, and return the first refusal that is none of what follows from another."""
    while liar.hear(0.0) is not None:
        pass
    return next((each for each in liar.heard if isinstance(each, Refusal) and each.code != Why.NO_SESSION), None)
