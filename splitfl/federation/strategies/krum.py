"""Krum: the clients whose layers lie nearest to most others' (Blanchard et al. 2017, arXiv:1703.02757)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from splitfl.federation.strategy import Folded, Strategy
from splitfl.federation.updates import Update, stacks, weighted_mean
from splitfl.federation.weights import capped
from splitfl.telemetry.units import counted


class MultiKrum(Strategy):
    """The weighted mean of the clients with the lowest scores."""

    def objection(self, weights: Sequence[float]) -> str:
        """Refuse fewer clients than the guarantee needs, or than are to be kept."""
        num_malicious, num_kept = self._options.num_malicious_clients, self._num_kept(len(weights))
        name = self._federation.strategy
        if len(weights) < 2 * num_malicious + 3:
            return (
                f"{counted(len(weights), 'client')} finished, {name} with num_malicious_clients = {num_malicious} needs"
                f" {2 * num_malicious + 3}"
            )
        if len(weights) < num_kept:
            return f"{counted(len(weights), 'client')} finished, {name} has num_clients_to_keep = {num_kept}"
        return super().objection(weights)

    def aggregate_train(
        self, updates: Sequence[Update], held: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> Folded:
        """Return the mean of those kept; of equal scores the first client in the order of ids is taken."""
        scores = _scores(updates, self._options.num_malicious_clients)
        best = sorted(range(len(updates)), key=lambda client: scores[client])[: self._num_kept(len(updates))]
        # among those kept somebody may be more than its share again
        weights = capped({str(client): updates[client][1] for client in sorted(best)}, self.max_client_weight)
        return Folded(layers=weighted_mean([(updates[client][0], weights[str(client)]) for client in sorted(best)]))

    def _num_kept(self, num_clients: int) -> int:
        return self._options.num_clients_to_keep or num_clients - self._options.num_malicious_clients


class Krum(MultiKrum):
    """The layers of the one client with the lowest score."""

    def _num_kept(self, num_clients: int) -> int:
        return 1


def _scores(updates: Sequence[Update], num_malicious: int) -> list[float]:
    """Return for each client the sum of the squared distances to its n - f - 2 nearest others."""
    squares = torch.zeros((len(updates), len(updates)), dtype=torch.float64)
    for _, values, _ in stacks(updates):
        for client, own in enumerate(values):
            for other in range(client):  # pair by pair: all differences at once would be n² tensors
                squares[client, other] += (own - values[other]).square().sum()
    squares += squares.T.clone()
    # the nearest of all is the client itself, at distance 0; one other counts at least, as in Flower
    num_nearest = max(1, len(updates) - num_malicious - 2)
    return [float(row.sort().values[1 : 1 + num_nearest].sum()) for row in squares]
