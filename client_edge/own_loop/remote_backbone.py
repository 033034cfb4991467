"""The backbone of a user's own loop, from any thread: it knows what a batch may be, and hands the rest to the steps."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from client_edge.generating.generation import RemoteGenerator
from client_edge.own_loop.own_link import OwnLoopLink, Rows
from client_edge.own_loop.own_steps import OwnSteps, Ticket
from client_edge.own_loop.owner_thread import OwnerThread
from splitfl.config.trees import RunConfig
from splitfl.errors import ConfigError, ModelError, PeerGone

T = TypeVar("T")


class RemoteBackbone:
    """The server's blocks, for one loop. May be used from any thread: what touches the link runs in one of its own."""

    def __init__(self, link: OwnLoopLink, thread: OwnerThread) -> None:
        """Take a link that was made in `thread`."""
        self._link, self._thread = link, thread
        self._is_closed = False
        self._steps = thread.call(lambda: OwnSteps(link))
        self.generator = RemoteGenerator(link.connection, self._do)
        """Generates with the same blocks; what is kept for it is gone when the connection is lost."""

    @property
    def run(self) -> RunConfig:
        """The run's settings, as the server has them now."""
        return self._link.connection.run

    @property
    def has_gradients(self) -> bool:
        """Whether the server holds gradients of a step that is neither committed nor given up."""
        return self._steps.has_gradients

    def norms(self) -> Tensor | None:
        """Return the norms Q of the remote gradients of the open step; None before the first."""
        return self._steps.norms_Q

    def tell_refused(self, told: Callable[[], None]) -> None:
        """Have `told` called to forget this side's gradients of a step that is applied on neither."""
        self._steps.on_refused = told

    def check(self, hidden_BSD: Tensor, rows: Rows) -> None:
        """Raise `ConfigError` for a batch that the server would refuse by its bounds."""
        terms, federation = self._link.session.terms, self.run.federation
        batch, length, _ = hidden_BSD.shape
        if batch > terms.max_batch_size:
            raise ConfigError(
                f"a batch of {batch} rows, more than the {terms.max_batch_size} of this run: raise"
                f" federation.per_device_train_batch_size = {federation.per_device_train_batch_size} on the server (a"
                " preference trainer puts two rows of each example into a batch)"
            )
        if length > terms.max_seq_length:
            raise ConfigError(
                f"rows of {length} tokens, more than text.max_seq_length = {terms.max_seq_length} of this run: shorten"
                " them, or raise it on the server"
            )
        if len(rows.layout.example_lengths) > self._link.max_packed_examples:
            raise ModelError(
                f"{len(rows.layout.example_lengths)} examples packed into the rows of a batch, where this server takes"
                f" {self._link.max_packed_examples} (0: its blocks do not keep the examples of a row apart): set"
                " packing and padding_free to False"
            )
        if rows.adapters_off and self.run.backbone_trains and self.run.train.backbone == "full":
            raise ConfigError(
                "a forward with adapters off, and train.backbone = full: the server's blocks have no adapters to turn"
                ' off; set train.backbone to "lora" on the server, or compute the reference log-probs before training'
                " (DPOConfig(precompute_ref_log_probs=True))"
            )

    # what the loop does

    def evaluate(self, hidden_BSD: Tensor, rows: Rows) -> Tensor:
        """Return activations that no gradient will come for."""
        return self._do(lambda: self._steps.evaluate(hidden_BSD, rows))

    def forward(self, hidden_BSD: Tensor, rows: Rows) -> tuple[Tensor, Ticket]:
        """Return activations, and what `backward` wants for their gradient."""
        return self._do(lambda: self._steps.forward(hidden_BSD, rows))

    def backward(self, ticket: Ticket, gradient_BSD: Tensor) -> Tensor:
        """Return the gradient for what was given to `forward`."""
        return self._do(lambda: self._steps.backward(ticket, gradient_BSD))

    def commit(self, learning_rate: float, clip_coefficient: float) -> None:
        """Have the server apply the open step; raise `Refused` when it is applied on neither side."""
        self._do(lambda: self._steps.commit(learning_rate, clip_coefficient))

    def give_up_gradients(self) -> None:
        """Drop the server's gradients; micro-batches that may still get one begin the next step."""
        self._do(self._steps.give_up_gradients)

    def keep(self) -> int:
        """Have the server keep a snapshot; return the commit that names it."""
        return self._do(self._steps.keep)

    def go_back(self, commit_number: int) -> None:
        """Bring the backbone back to a snapshot; raise `Refused` when the server declines."""
        self._do(lambda: self._steps.go_back(commit_number))

    def check_refusal(self) -> None:
        """Raise `Refused` if the server has closed the open step meanwhile."""
        self._do(self._steps.check_refusal)

    def close(self) -> None:
        """Leave; twice is fine."""
        if not self._is_closed:
            self._is_closed = True
            self._thread.end(self._link.connection.close)

    def _do(self, work: Callable[[], T]) -> T:
        if self._is_closed:
            raise PeerGone("this model is disconnected: call client_edge.connect again")
        return self._thread.call(work)
