"""The gradients of an embedding that is the head too: they arise apart, and the order of their sum decides the bits."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from client_edge.layers.gradient_rules import GradientRule

_Gradients = list[Tensor | None]


class Tied(GradientRule):
    """What is done about the gradients of tied tensors, around each backward of a micro-batch and at the step's end."""

    def at_the_top(self, number: int) -> AbstractContextManager[None]:
        """Surround the backward of a micro-batch, by its number, through the head."""
        return nullcontext()

    def at_the_bottom(self, number: int) -> AbstractContextManager[None]:
        """Surround the backward of the same micro-batch through the embedding."""
        return nullcontext()


class AddedEachTime(Tied):
    """Adds both gradients of one micro-batch before it accumulates them, as the whole model does."""

    def __init__(self, tied: Sequence[nn.Parameter]) -> None:
        self._tied = tied
        self._of_heads: dict[int, _Gradients] = {}

    @contextmanager
    def at_the_top(self, number: int) -> Iterator[None]:
        """Keep the head's gradients out of the sum until the embedding's can be added first."""
        before = take(self._tied)
        try:
            yield
        finally:
            self._of_heads[number] = take(self._tied)
            put(self._tied, before)

    @contextmanager
    def at_the_bottom(self, number: int) -> Iterator[None]:
        """Bring them back; a head's gradient is as large as the head, so nobody else may hold it."""
        before = take(self._tied)
        put(self._tied, self._of_heads.pop(number))
        try:
            yield
        finally:
            now = take(self._tied)
            put(self._tied, [_sum(old, new) for old, new in zip(before, now, strict=True)])

    def discard(self) -> None:
        """Drop the heads' gradients that wait."""
        self._of_heads.clear()


class AddedInTheEnd(Tied):
    """Keeps the embedding's gradients out of the head's sum until the step's end, for the loss without logits.

    They are some rows where the head's are a whole matrix. So no second matrix is ever needed, however many
    micro-batches are under way. The order of the sum does not depend on how they overlap.
    """

    def __init__(self, tied: Sequence[nn.Parameter]) -> None:
        self._tied = tied
        self._of_embeddings: dict[int, _Gradients] = {}

    @contextmanager
    def at_the_bottom(self, number: int) -> Iterator[None]:
        """Set the embedding's gradients aside."""
        before = take(self._tied)
        try:
            yield
        finally:
            self._of_embeddings[number] = take(self._tied)
            put(self._tied, before)

    def change(self, step: int) -> None:
        """Add what was set aside, micro-batch after micro-batch."""
        embedded, self._of_embeddings = self._of_embeddings, {}
        for number in sorted(embedded):
            for parameter, rows in zip(self._tied, embedded[number], strict=True):
                if rows is not None:
                    parameter.grad = _sum(parameter.grad, rows)

    def discard(self) -> None:
        """Drop what was set aside."""
        self._of_embeddings.clear()


def tied_gradients(bottom: nn.Module, top: nn.Module, device: torch.device, *, takes_plain_loss: bool) -> Tied:
    """Return what is done about the tensors that train in both segments; there may be none."""
    in_bottom = set(bottom.parameters())
    tied = [parameter for parameter in top.parameters() if parameter in in_bottom and parameter.requires_grad]
    if takes_plain_loss:
        return AddedEachTime(tied)
    if device.type != "mps":  # which has no sparse tensors
        _give_sparse_gradients(bottom, tied)
    return AddedInTheEnd(tied)


def _give_sparse_gradients(bottom: nn.Module, tied: Sequence[nn.Parameter]) -> None:
    for module in bottom.modules():
        if isinstance(module, nn.Embedding) and any(module.weight is parameter for parameter in tied):
            module.sparse = True


def take(parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Return the gradients, and leave none."""
    gradients = [parameter.grad for parameter in parameters]
    put(parameters, [None] * len(parameters))
    return gradients


def put(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Put gradients where a backward or a step will find them."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _sum(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old.add_(new)
