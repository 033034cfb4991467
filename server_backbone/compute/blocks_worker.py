"""All that the server knows of computing: `BlocksWorker`, and the data that goes in and comes out.

The worker of one process (`server_backbone.compute.worker`) is one; replicas of the backbone, or shards of it, could be
another. Shapes: B micro-batch, S sequence, D hidden width, P tensors that train on the client, Q tensors that train
here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor

from splitfl.models.layout import Layout

COMMON: Final = ""
"""In the place of a client: the weights that all share. No client has this id."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """A client's activations at the first cut."""

    hidden_BSD: Tensor
    layout: Layout
    request_id: int = 0
    """Names its graph until `backward`."""
    step: int = 0
    micro_batch: int = 0
    adapters_off: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Positions:
    """New positions of a generation (see `splitfl.models.remote_cache.RemoteCache`)."""

    hidden_BSD: Tensor
    lengths_B: tuple[int, ...]
    beams_B: tuple[int, ...]
    adapters_off: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Backpropagated:
    """The result of a backward."""

    gradient_BSD: Tensor | None
    """Of the activations that came in, None if nobody needs it."""
    norms_Q: Tensor
    """Of each of the client's gradients here of the step so far (float32), -1 where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """How an own-loop client scales a step of the backbone."""

    learning_rate: float
    clip_coefficient: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """One client's share in a commit."""

    client_id: str
    step: int
    num_label_tokens: int
    norms_P: Sequence[float]
    """Norms of the client's own gradients, in the model's order, -1 where there is none."""
    scaling: Scaling | None = None
    """An own-loop client's decision; None where the run's settings decide."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReducedStep:
    """A step whose gradients are added up: data, until it is applied."""

    client_id: str
    """Any of its members: it moves the weights that this client trains."""
    step: int
    clip_coefficient: float
    learning_rate: float
    gradients: Mapping[str, Tensor]
    """Their sum by tensor name, before clipping; applying it scales these tensors in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """The cost of computing so far."""

    compute_seconds: float
    most_copies: int
    """Clients whose copies or moments were held at once, at most."""


class Generating(Protocol):
    """Generations: each goes on after the cache of its own past."""

    def decode(self, client_id: str, cache_id: int, positions: Positions) -> Tensor | str:
        """Return the activations BSD of new positions, or why there are none; a cache that is new is made.

        A generation keeps the adapters with which it began, and ends when the weights move. Raises
        `RemoteProtocolError` for rows padded after a token, `ModelError` where no cache can be kept.
        """
        ...

    def end(self, client_id: str, cache_id: int | None = None) -> None:
        """Free a cache of a client, or all of them."""
        ...


class BlocksWorker(Protocol):
    """The blocks, the gradients that wait for their step, and what is learned. One thread uses it."""

    @property
    def generations(self) -> Generating:
        """The caches of generations, which the same blocks compute."""
        ...

    @property
    def used(self) -> Used:
        """The cost of computing so far."""
        ...

    def evaluate(self, client_id: str, batch: MicroBatch) -> Tensor:
        """Return the activations BSD without dropout, and keep nothing."""
        ...

    def forward(self, client_id: str, batch: MicroBatch) -> Tensor:
        """Return the activations BSD in training, and keep the graph for `backward` if anything learns from it."""
        ...

    def backward(self, client_id: str, request_id: int, gradient_BSD: Tensor) -> Backpropagated:
        """Run backward, free the graph, and add to the client's gradients.

        Raises `OutOfBounds` for gradients of the backbone that are not finite: in a sum with others they would be
        everybody's.
        """
        ...

    def reduce(self, contributions: Sequence[Contribution]) -> ReducedStep:
        """Add up what several clients have contributed to a step, and keep none of it: `apply` is next, or nothing."""
        ...

    def apply(self, step: ReducedStep) -> None:
        """Take the optimizer's step, of `reduce` or of a record; once, since the gradients are scaled in place."""
        ...

    def discard(self, client_id: str) -> None:
        """Free a client's graphs and gradients."""
        ...

    def state(self, client_id: str | None = None) -> dict[str, Tensor]:
        """Return weights and optimizer's moments by name, the live tensors; write them down before anything else.

        Of a client: what it trains and evaluates with, its own copy or the common weights; of `COMMON` always those. Of
        None it is everything.
        """
        ...

    def load(self, state: Mapping[str, Tensor], client_id: str | None = None) -> None:
        """Go back to what `state` has returned, for everybody or, where clients have copies, for one of them."""
        ...

    def begin_round(self, clients: Sequence[str]) -> None:
        """Forget what is kept of other clients than these from one round to the next."""
        ...

    def merged(self, weights: Mapping[str, Tensor]) -> None:
        """Have every client go on from these weights, or from the common ones if there are none; copies end."""
        ...
