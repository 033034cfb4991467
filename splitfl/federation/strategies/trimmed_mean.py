"""The coordinate-wise trimmed mean."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from splitfl.federation.strategy import Folded, Strategy
from splitfl.federation.updates import Update, stacks


class FedTrimmedAvg(Strategy):
    """The mean of every value without the extremes, whatever the clients weigh (Yin et al. 2018, definition 2)."""

    def aggregate_train(
        self, updates: Sequence[Update], held: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> Folded:
        """Return the means without the `beta` largest and smallest; few clients (below 1 / beta) lose none."""
        num_trimmed = int(self._options.beta * len(updates))
        kept = slice(num_trimmed, len(updates) - num_trimmed)
        return Folded(
            layers={
                name: values.sort(dim=0).values[kept].mean(dim=0).to(dtype) for name, values, dtype in stacks(updates)
            }
        )
