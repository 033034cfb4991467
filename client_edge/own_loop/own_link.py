"""The wire as a user's own loop sees it: one question, one answer."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from client_edge.link.link import Link, M
from splitfl.errors import Refused, RemoteProtocolError
from splitfl.models.layout import Layout
from splitfl.protocol.messages import BackwardDone, Committed, Declined, ForwardDone, Kept, WentBack
from splitfl.protocol.tensors import describe
from splitfl.session.client_session import ClientSession
from splitfl.session.own_loop import OwnLoopClientSession
from splitfl.session.terms import Terms

_NO_NORMS = torch.empty(0, dtype=torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """What the far blocks are to know of a batch besides its activations."""

    layout: Layout
    adapters_off: bool


class OwnLoopLink(Link):
    """One client's session with a server that has no rounds."""

    @property
    def has_credit(self) -> bool:
        """Whether the server keeps another micro-batch's activations."""
        return self.session.has_credit

    @property
    def max_packed_examples(self) -> int:
        """Examples that the rows of a batch may be packed from; 0 if the server's blocks do not keep them apart."""
        return int(self.welcome.limits.get("packed_examples", 0.0))

    def forward(self, hidden_BSD: Tensor, rows: Rows, *, step: int, micro_batch: int) -> tuple[int, Tensor]:
        """Return the request's number and the backbone's activations; `step` 0 needs no gradient."""
        message = self._own_session.forward_in_loop(
            step=step,
            micro_batch=micro_batch,
            hidden_BSD=describe(hidden_BSD, self.run.link.frame_bytes),
            lengths_B=rows.layout.lengths_B,
            left_padded=rows.layout.left_padded,
            example_lengths=rows.layout.example_lengths,
            adapters_off=rows.adapters_off,
        )
        self._send(message)
        return message.request_id, self.activations()

    def activations(self) -> Tensor:
        """Wait for the activations that were asked for."""
        return self._real(self._answer(ForwardDone, "the backbone").hidden_BSD)

    def backward(self, request_id: int, gradient_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient for a request's activations, and the norms of the step's far gradients so far (Q)."""
        self.send_backward(request_id, gradient_BSD)
        done = self._answer(BackwardDone, "the backbone")
        if done.gradient_BSD is None or done.norms_Q is None:
            raise RemoteProtocolError("a gradient without values, or without the norms of the server's own")
        return self._real(done.gradient_BSD), self._real(done.norms_Q)

    def commit_step(self, step: int, *, learning_rate: float, clip_coefficient: float) -> Committed:
        """Ask for a step to be applied; raise `StepClosed` when it is refused: then it is applied on neither side."""
        self._send(
            self._own_session.commit_in_loop(
                step=step,
                norms_P=describe(_NO_NORMS, self.run.link.frame_bytes),
                learning_rate=learning_rate,
                clip_coefficient=clip_coefficient,
            )
        )
        return self._answer(Committed, "the commit of this step")

    def discard(self, step: int) -> None:
        """Tell the server that a step is given up; there is no answer to wait for."""
        self._send(self._own_session.discard(step))

    def keep(self) -> int:
        """Have the server keep a snapshot of the backbone; return the commit that names it."""
        self._send(self._own_session.keep())
        return self.kept()

    def kept(self) -> int:
        """Wait for the snapshot that was asked for."""
        return self._unless_declined(Kept).commit_number

    def go_back(self, commit_number: int) -> int:
        """Bring the backbone back to a snapshot; return this client's last step as of then, or raise `Refused`."""
        self._send(self._own_session.go_back(commit_number))
        return self._unless_declined(WentBack).step

    def _unless_declined(self, wanted: type[M]) -> M:
        answer = self._one_of((wanted, Declined), "a snapshot of the backbone")
        if isinstance(answer, Declined):
            raise Refused(answer.reason)
        return cast(M, answer)

    @property
    def _own_session(self) -> OwnLoopClientSession:
        if not isinstance(self.session, OwnLoopClientSession):
            raise TypeError("a session of rounds on a link without them")
        return self.session

    def _new_session(self, terms: Terms) -> ClientSession:
        return OwnLoopClientSession(terms)
