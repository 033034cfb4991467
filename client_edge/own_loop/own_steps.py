"""The steps of a user's own loop: the open one, its commit, and the way back when the connection is lost.

A step is open from its first training micro-batch until it is committed or given up. Until then the micro-batches are
kept as they were sent. On a new connection, or after a step that was given up, they are sent again in their order. That
gives the server the same gradients, and the loop never learns of it.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from client_edge.connection.endings import StepClosed
from client_edge.own_loop.own_link import OwnLoopLink, Rows
from splitfl.errors import ConfigError, PeerGone, Refused
from splitfl.protocol.messages import Resumed
from splitfl.telemetry.units import counted

T = TypeVar("T")


class Ticket:
    """Held by autograd's graph of one micro-batch: when it is gone, no gradient will come."""

    def __init__(self, micro_batch: "_MicroBatch") -> None:
        self.micro_batch = micro_batch
        micro_batch.ticket = weakref.ref(self)


@dataclass(slots=True, eq=False)
class _MicroBatch:
    """One micro-batch of the open step, as it was sent."""

    hidden_BSD: Tensor
    rows: Rows
    step: int
    request_id: int = 0
    gradient_BSD: Tensor | None = None
    ticket: "weakref.ref[Ticket] | None" = None

    @property
    def has_gradient(self) -> bool:
        return self.gradient_BSD is not None

    @property
    def may_get_gradient(self) -> bool:
        return not self.has_gradient and self.ticket is not None and self.ticket() is not None


@dataclass(frozen=True, slots=True)
class _Sent:
    """One message of the open step: a micro-batch's activations, or their gradient."""

    micro_batch: _MicroBatch
    is_gradient: bool


class OwnSteps:
    """The steps of one loop, over one connection after another. Use from the link's thread."""

    def __init__(self, link: OwnLoopLink) -> None:
        """Find out where the server is, and begin there."""
        self._link, self._connection = link, link.connection
        self.on_refused: Callable[[], None] = lambda: None
        """Called to forget this side's gradients of a step that is applied on neither."""
        self._applied_step = self._commit_number = 0
        self._pending_step = 0
        """A step whose commit is asked for and not answered."""
        self._step = 1
        self._sent: list[_Sent] = []
        self._refusal = ""
        self.norms_Q: Tensor | None = None
        """Norms of the remote gradients of the open step; None before the first."""
        self._begin()

    @property
    def has_gradients(self) -> bool:
        """Whether the server holds gradients of a step that is neither committed nor given up."""
        return any(sent.is_gradient for sent in self._sent)

    def evaluate(self, hidden_BSD: Tensor, rows: Rows) -> Tensor:
        """Return activations that no gradient will come for."""
        return self._persist(lambda: self._ask_evaluation(hidden_BSD, rows))

    def _ask_evaluation(self, hidden_BSD: Tensor, rows: Rows) -> Tensor:
        self._make_room()
        try:
            return self._link.forward(hidden_BSD, rows, step=0, micro_batch=0)[1]
        except StepClosed as closed:
            self._lose_step(closed.refusal.reason, closed.refusal.next_step)  # told where the loop goes on with it
            return self._link.activations()

    def forward(self, hidden_BSD: Tensor, rows: Rows) -> tuple[Tensor, Ticket]:
        """Return activations, and what `backward` wants for their gradient."""
        self.check_refusal()
        micro_batch = _MicroBatch(hidden_BSD, rows, self._step)

        def ask() -> Tensor:
            self._make_room()
            return self._send_forward(micro_batch, sum(not sent.is_gradient for sent in self._sent))

        got_BSD = self._persist(ask)
        self._sent.append(_Sent(micro_batch, is_gradient=False))
        return got_BSD, Ticket(micro_batch)

    def backward(self, ticket: Ticket, gradient_BSD: Tensor) -> Tensor:
        """Return the gradient for what was given to `forward`."""
        micro_batch = ticket.micro_batch
        self.check_refusal()
        if micro_batch.step != self._step or micro_batch.has_gradient:
            raise Refused(
                f"this loss is of step {micro_batch.step}, which is applied or given up, or backward was called on it"
                " before: compute the loss again"
            )
        back_BSD = self._persist(lambda: self._send_gradient(micro_batch, gradient_BSD))
        micro_batch.gradient_BSD = gradient_BSD
        self._sent.append(_Sent(micro_batch, is_gradient=True))
        return back_BSD

    def commit(self, learning_rate: float, clip_coefficient: float) -> None:
        """Have the server apply the open step; raise `Refused` when it is applied on neither side."""
        self.check_refusal()
        self._pending_step = self._step

        def ask() -> None:
            if self._pending_step:  # else a new connection has brought the answer
                committed = self._link.commit_step(
                    self._step, learning_rate=learning_rate, clip_coefficient=clip_coefficient
                )
                self._take_applied(committed.step, committed.commit_number)

        self._persist(ask)

    def give_up_gradients(self) -> None:
        """Drop the server's gradients; micro-batches that may still get one begin the next step."""
        self._begin_again([sent for sent in self._sent if sent.micro_batch.may_get_gradient])

    def keep(self) -> int:
        """Have the server keep a snapshot; return the commit that names it."""
        return self._persist(self._ask_to_keep)

    def _ask_to_keep(self) -> int:
        try:
            return self._link.keep()
        except StepClosed as closed:
            self._lose_step(closed.refusal.reason, closed.refusal.next_step)
            return self._link.kept()

    def go_back(self, commit_number: int) -> None:
        """Bring the backbone back to a snapshot; raise `Refused` when the server declines."""
        if self._sent:
            self._begin_again([])
        step = self._persist(lambda: self._link.go_back(commit_number))
        self._take_applied(step, commit_number)

    # the open step

    def _send_forward(self, micro_batch: _MicroBatch, number: int) -> Tensor:
        micro_batch.step = self._step
        micro_batch.request_id, got_BSD = self._link.forward(
            micro_batch.hidden_BSD, micro_batch.rows, step=self._step, micro_batch=number
        )
        return got_BSD

    def _send_gradient(self, micro_batch: _MicroBatch, gradient_BSD: Tensor) -> Tensor:
        back_BSD, self.norms_Q = self._link.backward(micro_batch.request_id, gradient_BSD)
        return back_BSD

    def _send_again(self) -> None:
        """Send the open step as it was sent before."""
        number = 0
        for sent in self._sent:
            gradient_BSD = sent.micro_batch.gradient_BSD
            if sent.is_gradient and gradient_BSD is not None:
                self._send_gradient(sent.micro_batch, gradient_BSD)
            else:
                self._send_forward(sent.micro_batch, number)
                number += 1

    def _make_room(self) -> None:
        """Free the server's activations that no gradient can come for any more, if the place is needed."""
        if self._link.has_credit:
            return
        waiting = [sent for sent in self._sent if sent.micro_batch.may_get_gradient]
        if len(waiting) >= self._connection.run.link.max_in_flight:
            raise ConfigError(
                f"{counted(len(waiting), 'loss waits', 'losses wait')} for their backward, which is"
                " link.max_in_flight of this run: raise it on"
                " the server, or run what gets no backward under torch.no_grad()"
            )
        self._begin_again([sent for sent in self._sent if sent.micro_batch.has_gradient or sent in waiting])

    def _begin_again(self, sent: Sequence[_Sent]) -> None:
        """Give the step up on the server, and send these of its messages again as the next one."""
        given_up, session = self._step, self._connection.welcome.session
        self._begin_step(given_up + 1)
        self._sent = list(sent)

        def ask() -> None:
            if self._connection.welcome.session == session:  # else a new connection has done it
                self._link.discard(given_up)
                self._send_again()

        self._persist(ask)

    def _take_applied(self, step: int, commit_number: int) -> None:
        self._applied_step, self._commit_number = step, commit_number
        self._begin_step(step + 1)

    def _begin_step(self, step: int) -> None:
        self._step, self._pending_step, self.norms_Q, self._sent = step, 0, None, []

    # refusals and lost connections

    def _persist(self, ask: Callable[[], T]) -> T:
        """Ask, over as many connections as it takes."""
        is_lost = False
        while True:
            try:
                if is_lost:
                    self._settle(self._resume())
                    is_lost = False
                    self.check_refusal()
                return ask()
            except StepClosed as closed:
                self._lose_step(closed.refusal.reason, closed.refusal.next_step)
                self.check_refusal()
            except PeerGone as gone:
                self._connection.reconnect(gone, resume_at=self._step)
                is_lost = True

    def _begin(self) -> None:
        resumed = self._persist(self._resume)
        self._take_applied(resumed.step, resumed.commit_number)
        self._step = max(self._step, resumed.next_step)

    def _resume(self) -> Resumed:
        return self._connection.resume(
            held_round=0, step=self._applied_step, commit_number=self._commit_number, pending_step=self._pending_step
        )

    def _settle(self, resumed: Resumed) -> None:
        """Go on where the server is: take the answer that was lost, or send the open step again."""
        if resumed.verdict != "go":
            raise Refused(
                f"{resumed.reason}: the server's blocks are not the ones that this model was trained with; connect"
                " again, and load the checkpoint that belongs to where the server is"
            )
        if self._pending_step and resumed.step == self._pending_step:
            self._take_applied(resumed.step, resumed.commit_number)
        elif self._sent and resumed.next_step > self._step:
            self._lose_step("the connection was lost", resumed.next_step)
        else:
            self._step = max(self._step, resumed.next_step)
            self._send_again()

    def _lose_step(self, reason: str, next_step: int) -> None:
        self._refusal = (
            f"step {self._step} is applied on neither side: {reason}. Its gradients are dropped here too: go on with"
            " the next batch, and raise federation.step_timeout on the server if steps take that long"
        )
        self._begin_step(max(self._step + 1, next_step))

    def check_refusal(self) -> None:
        """Raise `Refused`, once, if the server has closed the open step; both sides have forgotten it by then."""
        if self._refusal:
            reason, self._refusal = self._refusal, ""
            self.on_refused()
            raise Refused(reason)
