"""The coordinate-wise median."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from splitfl.federation.strategy import Folded, Strategy
from splitfl.federation.updates import Update, stacks


class FedMedian(Strategy):
    """The median of every value, whatever the clients weigh (Yin et al. 2018, arXiv:1803.01498, definition 1)."""

    def aggregate_train(
        self, updates: Sequence[Update], held: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> Folded:
        """Return the medians; of an even number of values the mean of the middle two."""
        return Folded(layers={name: _median(values).to(dtype) for name, values, dtype in stacks(updates)})


def _median(values: Tensor) -> Tensor:
    ordered = values.sort(dim=0).values
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else ordered[middle - 1 : middle + 1].mean(dim=0)
