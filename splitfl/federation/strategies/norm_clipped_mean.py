"""The weighted mean of changes that are clipped to a norm."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from splitfl.federation.strategy import Folded, Strategy
from splitfl.federation.updates import Update, alike, exact_means, names_of


class NormClippedMean(Strategy):
    """FedAvg of changes scaled down to `clipping_norm` where they are larger (Sun et al. 2019, arXiv:1911.07963)."""

    def aggregate_train(
        self, updates: Sequence[Update], held: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> Folded:
        """Return the weighted mean; where nobody is clipped it is FedAvg's to the bit."""
        names_of(updates)  # before distances are taken
        clipped = [(self._clipped(layers, held), weight) for layers, weight in updates]
        return Folded(layers={name: mean.to(held[name].dtype) for name, mean, _ in exact_means(clipped)})

    def _clipped(self, layers: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        norm = _distance(layers, held)
        limit = self._options.clipping_norm
        return layers if norm <= limit else _Shortened(layers, held, limit / norm)


def _distance(layers: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> float:
    """Return the norm of the change, reading one tensor of each at a time."""
    changes = (alike(layers[name], before, name).double() - before.double() for name, before in held.items())
    return math.sqrt(sum(float(change.square().sum()) for change in changes))


class _Shortened(Mapping[str, Tensor]):
    """Layers that have gone only a share of their way from `held`, computed as each is asked for."""

    def __init__(self, layers: Mapping[str, Tensor], held: Mapping[str, Tensor], share: float) -> None:
        self._layers = layers
        self._held = held
        self._share = share

    def __getitem__(self, name: str) -> Tensor:
        return torch.lerp(self._held[name].double(), self._layers[name].double(), self._share)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)
