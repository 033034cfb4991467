"""Strategies: whom to ask in a round, and how to fold what comes back. Names as in Flower."""

import random
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from splitfl.config import FederationSection
from splitfl.errors import ConfigError

Update = tuple[Mapping[str, Tensor], float]
"""A client's layers by name, and their weight."""


class Strategy(Protocol):
    """Decides about a round; keeps no copy of what it is given."""

    def configure_train(self, round_number: int, clients: Sequence[str]) -> Sequence[str]:
        """Return the clients that train in a round, from those that are ready (sorted)."""
        ...

    def aggregate_train(self, updates: Sequence[Update]) -> dict[str, Tensor]:
        """Fold the layers of a round's clients, given in the order of their ids."""
        ...


class FedAvg:
    """The weighted mean of the clients' layers (McMahan et al. 2017, arXiv:1602.05629, algorithm 1)."""

    def __init__(self, federation: FederationSection, seed: int) -> None:
        self._federation = federation
        self._seed = seed

    def configure_train(self, round_number: int, clients: Sequence[str]) -> Sequence[str]:
        """Draw `fraction_train` of the clients, at least `min_train_clients`, by the run's seed."""
        wanted = max(self._federation.min_train_clients, int(self._federation.fraction_train * len(clients)), 1)
        if wanted >= len(clients):
            return list(clients)
        return sorted(random.Random(f"{self._seed} {round_number}").sample(list(clients), wanted))

    def aggregate_train(self, updates: Sequence[Update]) -> dict[str, Tensor]:
        """Return the weighted mean."""
        return weighted_mean(updates)


def weighted_mean(updates: Sequence[Update]) -> dict[str, Tensor]:
    """Average layers by weight, one tensor at a time, in the order given.

    Sums are float64 and the mean is rounded once to the layers' type, so that the mean of equals is the same bits.
    Raises `ConfigError` when there is nothing to merge, when the layers differ in name or shape, or when no weight is
    positive.
    """
    if not updates:
        raise ConfigError("nothing to merge: no client's layers came in")
    weights = [weight for _, weight in updates]
    if min(weights) < 0 or not sum(weights) > 0:
        raise ConfigError(f"weights of a merge must not be negative and not all zero, got {weights}")
    first = updates[0][0]
    if any(list(layers) != list(first) for layers, _ in updates):
        raise ConfigError("layers of a merge must have the same names in the same order")
    return {name: _mean_of([(layers[name], weight) for layers, weight in updates], name) for name in first}


def _mean_of(tensors: Sequence[tuple[Tensor, float]], name: str) -> Tensor:
    first = tensors[0][0]
    total = torch.zeros(first.shape, dtype=torch.float64)
    for tensor, weight in tensors:
        if tensor.shape != first.shape:
            raise ConfigError(f"{name}: shapes {tuple(first.shape)} and {tuple(tensor.shape)} cannot be merged")
        total.add_(tensor.double(), alpha=weight)
    return (total / sum(weight for _, weight in tensors)).to(first.dtype)


def strategy_for(federation: FederationSection, seed: int) -> Strategy:
    """Return the strategy that the config names."""
    return {"FedAvg": FedAvg}[federation.strategy](federation, seed)
