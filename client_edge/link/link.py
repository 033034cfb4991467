"""The wire as the client's training loop sees it: a question, and its typed answer or an error.

Shapes: B micro-batch, S sequence, D hidden width, P tensors that train on the client.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from client_edge.connection.connection import Connection
from splitfl.errors import RemoteProtocolError
from splitfl.models.layout import Layout
from splitfl.protocol.messages import (
    BackwardDone,
    Committed,
    Farewell,
    ForwardDone,
    Merged,
    Probe,
    Probed,
    Report,
    RoundOpened,
    RoundsEnded,
    TensorFrames,
)
from splitfl.protocol.roles import Role
from splitfl.session.client_session import ClientSession


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Activations:
    """The backbone's activations for a micro-batch."""

    request_id: int
    hidden_BSD: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gradient:
    """The end of a micro-batch: its gradient at the first cut, None where nothing below that trains."""

    request_id: int
    gradient_BSD: Tensor | None


Answer: TypeAlias = Activations | Gradient


class Link:
    """What the loop asks of a server that goes by rounds. Use from one thread."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    @property
    def session(self) -> ClientSession:
        """The state of the session on the present connection."""
        return self.connection.session

    # micro-batches and steps

    def send_forward(self, hidden_BSD: Tensor, layout: Layout, *, step: int, micro_batch: int) -> int:
        """Send activations on; returns the request's number. `step` 0 is an evaluation."""
        message = self.session.forward(
            step=step,
            micro_batch=micro_batch,
            hidden_BSD=self.connection.tensors.pack(Role.HIDDEN, hidden_BSD),
            lengths_B=layout.lengths_B,
            example_lengths=layout.example_lengths,
        )
        self.connection.send(message)
        return message.request_id

    def send_backward(self, request_id: int, gradient_BSD: Tensor) -> None:
        """Send the gradient of the activations that came back for a request."""
        self.connection.send(
            self.session.backward(request_id, self.connection.tensors.pack(Role.GRADIENT, gradient_BSD))
        )

    def receive(self) -> Answer:
        """Wait for the next answer to a micro-batch."""
        match self.connection.answer("the backbone", ForwardDone, BackwardDone):
            case ForwardDone(request_id=number, hidden_BSD=frames):
                return Activations(request_id=number, hidden_BSD=self.connection.tensors.unpack(Role.HIDDEN, frames))
            case BackwardDone(request_id=number, gradient_BSD=frames):
                return Gradient(request_id=number, gradient_BSD=self._gradient(frames))

    def commit(self, *, num_label_tokens: int, loss: float, norms_P: Tensor) -> Committed:
        """Ask for the step to be applied; raise `StepClosed` when it is refused: then it is applied on neither side."""
        frames = self.connection.tensors.pack(Role.NORMS, norms_P)
        self.connection.send(self.session.commit(num_label_tokens=num_label_tokens, loss=loss, norms_P=frames))
        return self.connection.answer("the commit of this step", Committed)

    def _gradient(self, frames: TensorFrames | None) -> Tensor | None:
        if (frames is not None) != self.connection.run.bottom_trains:
            rule = "needs its gradient" if frames is None else "has no use for a gradient"
            raise RemoteProtocolError(f"an answer of the wrong kind: what is below the first cut {rule}")
        return None if frames is None else self.connection.tensors.unpack(Role.GRADIENT, frames)

    # rounds

    def open_round(self, num_examples: int) -> RoundOpened | RoundsEnded:
        """Wait for the next round, or for the word that there is none."""
        self.connection.send(self.session.ready(num_examples))
        return self.connection.answer("the next round", RoundOpened, RoundsEnded)

    def merge(self, layers: Mapping[str, Tensor], *, num_examples: int, num_tokens: int) -> Merged:
        """Hand over this round's layers and wait for everyone's; the tensors must not be written to meanwhile."""
        tensors = self.connection.tensors
        frames = tuple(tensors.pack(Role.LAYER, layer) for layer in layers.values())
        self.connection.send(self.session.upload(num_examples=num_examples, num_tokens=num_tokens, layers=frames))
        return self._await_merge()

    def sit_out(self) -> Merged:
        """Wait for the merge of a round that others train in, or that we have uploaded for on another connection."""
        if not self.session.awaits_merge:
            self.session.sit_out()
        return self._await_merge()

    def unpack(self, layers: Sequence[TensorFrames]) -> list[Tensor]:
        """Return the layers of a merge, and their controls if there are any; raise `RemoteProtocolError` for poison."""
        tensors, num_layers = self.connection.tensors, len(self.session.terms.layer_shapes)
        roles = (Role.LAYER if at < num_layers else Role.CONTROL for at in range(len(layers)))
        return [tensors.unpack(role, layer) for role, layer in zip(roles, layers, strict=True)]

    def _await_merge(self) -> Merged:
        return self.connection.answer("the merge of this round", Merged)

    # beside the training

    def report(self, topic: str, *, phase: str, round_number: int, metrics: dict[str, float], digest: str = "") -> None:
        """Tell the server a measurement."""
        self.connection.send(
            Report(topic=topic, phase=phase, round_number=round_number, metrics=metrics, digest=digest)
        )

    def goodbye(self, metrics: dict[str, float]) -> None:
        """End the session in order."""
        self.connection.send(self.session.goodbye(metrics))
        self.connection.answer("the server's farewell", Farewell)

    def probe(self) -> tuple[int, float]:
        """Send one full frame there and back, before resuming; return its bytes and the seconds that it took."""
        sent = os.urandom(self.connection.run.link.frame_bytes)
        frame = TensorFrames(dtype="u8", shape=(len(sent),), buffers=(sent,))
        begun_s = time.monotonic()
        self.connection.send(Probe(content=frame))
        came = self.connection.answer("a full frame to come back", Probed)
        if b"".join(came.content.buffers) != sent:
            raise RemoteProtocolError(f"a frame of {len(sent)} bytes came back with other content")
        return len(sent), time.monotonic() - begun_s
