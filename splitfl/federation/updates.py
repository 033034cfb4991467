"""Clients' updates at the end of a round, and arithmetic over them that holds one tensor at a time.

Updates may be mappings that read a tensor from disk each time it is asked for. Nothing here keeps one for longer than
it needs it. So memory does not grow with the number of clients where the arithmetic allows that.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from splitfl.errors import ConfigError

Update = tuple[Mapping[str, Tensor], float]
"""A client's layers by name, and their weight."""


def weighted_mean(updates: Sequence[Update]) -> dict[str, Tensor]:
    """Average layers by weight, one tensor at a time, in the order given.

    Sums are float64 and the mean is rounded once to the layers' type, so that the mean of equals is the same bits.
    Raises `ConfigError` when there is nothing to merge, when the layers differ in name or shape, or when no weight is
    positive.
    """
    return {name: mean.to(dtype) for name, mean, dtype in exact_means(updates)}


def exact_means(updates: Sequence[Update]) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Yield each tensor's name, weighted mean in float64 before rounding, and the layers' type.

    Raises `ConfigError` as `weighted_mean` does.
    """
    names = names_of(updates)
    weights = [weight for _, weight in updates]
    if min(weights) < 0 or not sum(weights) > 0:
        raise ConfigError(f"weights of a merge must not be negative and not all zero, got {weights}")
    for name in names:
        first = updates[0][0][name]
        total = torch.zeros(first.shape, dtype=torch.float64)
        for layers, weight in updates:
            total.add_(alike(layers[name], first, name).double(), alpha=weight)
        yield name, total.div_(sum(weights)), first.dtype


def stacks(updates: Sequence[Update]) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Yield each tensor's name, all clients' values of it in float64, clients first, and the layers' type.

    Memory: as many copies of one tensor as there are clients. Raises `ConfigError` when there is nothing to merge, or
    when the layers differ in name or shape.
    """
    for name in names_of(updates):
        first = updates[0][0][name]
        stacked = torch.empty((len(updates), *first.shape), dtype=torch.float64)
        for row, (layers, _) in zip(stacked, updates, strict=True):
            row.copy_(alike(layers[name], first, name))
        yield name, stacked, first.dtype


def names_of(updates: Sequence[Update]) -> list[str]:
    """Return the names of the tensors in their order; raise `ConfigError` unless all updates have the same."""
    if not updates:
        raise ConfigError("nothing to merge: no client's layers came in")
    first = list(updates[0][0])
    if any(list(layers) != first for layers, _ in updates):
        raise ConfigError("layers of a merge must have the same names in the same order")
    return first


def alike(tensor: Tensor, first: Tensor, name: str) -> Tensor:
    """Return the tensor; raise `ConfigError` unless it has the shape of the first."""
    if tensor.shape != first.shape:
        raise ConfigError(f"{name}: shapes {tuple(first.shape)} and {tuple(tensor.shape)} cannot be merged")
    return tensor
