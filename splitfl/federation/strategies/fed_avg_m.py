"""FedAvg with momentum on the server."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from splitfl.federation.strategy import Folded, Strategy
from splitfl.federation.updates import Update, exact_means


class FedAvgM(Strategy):
    """Treats the mean change of the clients as a gradient for SGD with momentum (Hsu et al. 2019, arXiv:1909.06335)."""

    def aggregate_train(
        self, updates: Sequence[Update], held: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> Folded:
        """Return the layers after the server's step; `state` is the momentum (float32) by tensor."""
        rate, decay = self._options.server_learning_rate, self._options.server_momentum
        folded = Folded(layers={})
        for name, mean, dtype in exact_means(updates):
            before = held[name].double()
            momentum = mean - before
            if name in state:
                momentum += decay * state[name].double()
            folded.state[name] = momentum.to(torch.float32)
            folded.layers[name] = (before + rate * momentum).to(dtype)
        return folded
