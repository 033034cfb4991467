"""The weighted mean, and the strategies that differ from it on the client only."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from splitfl.federation.strategy import Folded, Strategy
from splitfl.federation.updates import Update, weighted_mean


class FedAvg(Strategy):
    """The weighted mean of the clients' layers (McMahan et al. 2017, arXiv:1602.05629, algorithm 1)."""

    def aggregate_train(
        self, updates: Sequence[Update], held: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> Folded:
        """Return the weighted mean; neither `held` nor `state` matters."""
        return Folded(layers=weighted_mean(updates))


class FedProx(FedAvg):
    """FedAvg of clients that stay near the last merge (Li et al. 2020, arXiv:1812.06127, algorithm 2).

    The proximal term acts where gradients are: `client_edge.layers.gradient_rules.Proximal`.
    """
