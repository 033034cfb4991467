"""Control variates against the drift of clients on unlike data."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from splitfl.federation.strategy import Folded, Strategy
from splitfl.federation.updates import Update, alike, exact_means

_CONTROL = "control/"
_NUM_CLIENTS = "num_clients"


class SCAFFOLD(Strategy):
    """SCAFFOLD, option II (Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1).

    A client adds c - c_i to every gradient (`client_edge.layers.controls`). How its own c_i changes with a round
    follows from the layers it uploads, so that nothing else need be sent up, or believed.
    """

    def aggregate_train(
        self, updates: Sequence[Update], held: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> Folded:
        """Return the layers `server_learning_rate` of the way to the mean; 1, the mean itself, is FedAvg's."""
        rate = self._options.server_learning_rate
        layers = {
            name: torch.lerp(held[name].double(), mean, rate).to(dtype) for name, mean, dtype in exact_means(updates)
        }
        return Folded(layers=layers)

    def aggregate_controls(
        self,
        updates: Sequence[Update],
        held: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        *,
        rates: Sequence[float],
        num_clients: int,
    ) -> dict[str, Tensor]:
        """Return c, the mean of all clients' c_i (float32) once these clients' have changed, and the number of clients.

        c + |S|/N mean(c_i+ - c_i), where c_i+ - c_i = (x - y_i) / sum of rates - c. The c_i of a client that is new
        since the last merge is 0, so c is first scaled to the number there are now.
        """
        num_before = float(state.get(_NUM_CLIENTS, torch.tensor(float(num_clients))))
        controls = {_NUM_CLIENTS: torch.tensor(float(num_clients))}
        for name, before in held.items():
            control = self._control(name, before, state).double()
            total = control * num_before
            for (layers, _), rate in zip(updates, rates, strict=True):
                if rate > 0:
                    total += (before.double() - alike(layers[name], before, name).double()) / rate - control
            controls[_CONTROL + name] = (total / num_clients).to(torch.float32)
        return controls

    def controls(self, held: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[Tensor]:
        """Return c in the layers' order, 0 before the first merge."""
        return [self._control(name, layer, state) for name, layer in held.items()]

    def _control(self, name: str, layer: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        control = state.get(_CONTROL + name)
        return torch.zeros(layer.shape, dtype=torch.float32) if control is None else control
