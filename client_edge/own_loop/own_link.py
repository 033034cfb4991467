"""The wire as a user's own loop sees it: one question, one answer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from client_edge.connection.connection import Connection
from splitfl.errors import Refused, RemoteProtocolError
from splitfl.models.layout import Layout
from splitfl.protocol.messages import BackwardDone, Committed, Declined, ForwardDone, Kept, WentBack
from splitfl.protocol.roles import Role
from splitfl.session.own_loop import OwnLoopClientSession

_NO_NORMS = torch.empty(0, dtype=torch.float32)
_SNAPSHOT = "a snapshot of the backbone"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """What the remote blocks are to know of a batch besides its activations."""

    layout: Layout
    adapters_off: bool


class OwnLoopLink:
    """What a user's loop asks of a server that has no rounds. Use from one thread."""

    def __init__(self, connection: Connection) -> None:
        """Take a connection that has agreed on sessions of an own loop."""
        self.connection = connection

    @property
    def session(self) -> OwnLoopClientSession:
        """The state of the session on the present connection."""
        if not isinstance(self.connection.session, OwnLoopClientSession):
            raise TypeError("a session of rounds on a link without them")
        return self.connection.session

    @property
    def has_credit(self) -> bool:
        """Whether the server keeps another micro-batch's activations."""
        return self.session.has_credit

    @property
    def max_packed_examples(self) -> int:
        """Examples that the rows of a batch may be packed from; 0 if the server's blocks do not keep them apart."""
        return int(self.connection.welcome.limits.get("packed_examples", 0.0))

    def forward(self, hidden_BSD: Tensor, rows: Rows, *, step: int, micro_batch: int) -> tuple[int, Tensor]:
        """Return the request's number and the backbone's activations; `step` 0 needs no gradient."""
        message = self.session.forward_in_loop(
            step=step,
            micro_batch=micro_batch,
            hidden_BSD=self.connection.tensors.pack(Role.HIDDEN, hidden_BSD),
            lengths_B=rows.layout.lengths_B,
            left_padded=rows.layout.left_padded,
            example_lengths=rows.layout.example_lengths,
            adapters_off=rows.adapters_off,
        )
        self.connection.send(message)
        return message.request_id, self.activations()

    def activations(self) -> Tensor:
        """Wait for the activations that were asked for."""
        done = self.connection.answer("the backbone", ForwardDone)
        return self.connection.tensors.unpack(Role.HIDDEN, done.hidden_BSD)

    def backward(self, request_id: int, gradient_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient for a request's activations, and the norms of the step's remote gradients so far (Q)."""
        tensors = self.connection.tensors
        self.connection.send(self.session.backward(request_id, tensors.pack(Role.GRADIENT, gradient_BSD)))
        done = self.connection.answer("the backbone", BackwardDone)
        if done.gradient_BSD is None or done.norms_Q is None:
            raise RemoteProtocolError("a gradient without values, or without the norms of the server's own")
        return tensors.unpack(Role.GRADIENT, done.gradient_BSD), tensors.unpack(Role.NORMS, done.norms_Q)

    def commit_step(self, step: int, *, learning_rate: float, clip_coefficient: float) -> Committed:
        """Ask for a step to be applied; raise `StepClosed` when it is refused: then it is applied on neither side."""
        self.connection.send(
            self.session.commit_in_loop(
                step=step,
                norms_P=self.connection.tensors.pack(Role.NORMS, _NO_NORMS),
                learning_rate=learning_rate,
                clip_coefficient=clip_coefficient,
            )
        )
        return self.connection.answer("the commit of this step", Committed)

    def discard(self, step: int) -> None:
        """Tell the server that a step is given up; there is no answer to wait for."""
        self.connection.send(self.session.discard(step))

    def keep(self) -> int:
        """Have the server keep a snapshot of the backbone; return the commit that names it."""
        self.connection.send(self.session.keep())
        return self.kept()

    def kept(self) -> int:
        """Wait for the snapshot that was asked for."""
        match self.connection.answer(_SNAPSHOT, Kept, Declined):
            case Kept(commit_number=commit_number):
                return commit_number
            case Declined(reason=reason):
                raise Refused(reason)

    def go_back(self, commit_number: int) -> int:
        """Bring the backbone back to a snapshot; return this client's last step as of then, or raise `Refused`."""
        self.connection.send(self.session.go_back(commit_number))
        match self.connection.answer(_SNAPSHOT, WentBack, Declined):
            case WentBack(step=step):
                return step
            case Declined(reason=reason):
                raise Refused(reason)
