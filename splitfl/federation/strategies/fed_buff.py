"""Buffered asynchronous merges (Nguyen et al. 2022, arXiv:2106.06639): nobody waits for the slowest client."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from splitfl.federation.strategy import Folded, Strategy
from splitfl.federation.updates import Update, exact_means


class FedBuff(Strategy):
    """A step along the mean of the changes in the buffer, each scaled down by its staleness (algorithm 1).

    Clients are never drawn, and a merge takes whatever is in the buffer. `Rebased` decides the layers that an upload is
    compared with.
    """

    def aggregate_train(
        self, updates: Sequence[Update], held: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> Folded:
        """Return `held` + rate * mean change; the layers of `updates` are changes from `held` (see `Rebased`)."""
        rate = self._options.server_learning_rate
        return Folded(
            layers={
                # with a rate of 1 this is the mean itself, to the bit
                name: torch.lerp(held[name].double(), mean, rate).to(held[name].dtype)
                for name, mean, _ in exact_means(updates)
            }
        )


def staleness_scale(staleness: int) -> float:
    """Return what a change counts that was begun so many merges ago: 1 / sqrt(1 + staleness), as in the paper."""
    return 1.0 / math.sqrt(1.0 + staleness)


class Rebased(Mapping[str, Tensor]):
    """Layers as if their client had begun with everyone's newest, computed as each is asked for.

    That is `held` + scale * (uploaded - begun), in float64. With nothing stale it is the upload, to the bit.
    """

    def __init__(
        self, uploaded: Mapping[str, Tensor], begun: Mapping[str, Tensor], held: Mapping[str, Tensor], staleness: int
    ) -> None:
        self._uploaded = uploaded
        self._begun = begun
        self._held = held
        self._staleness = staleness

    def __getitem__(self, name: str) -> Tensor:
        if not self._staleness:
            return self._uploaded[name]
        change = self._uploaded[name].double() - self._begun[name].double()
        return self._held[name].double().add_(change, alpha=staleness_scale(self._staleness))

    def __iter__(self) -> Iterator[str]:
        return iter(self._uploaded)

    def __len__(self) -> int:
        return len(self._uploaded)
