"""The interface of a strategy: whom to ask in a round, and how to fold what comes back. Names as in Flower."""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from splitfl.config.sections import FederationSection, StrategySection
from splitfl.federation.updates import Update


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """What a merge comes to."""

    layers: dict[str, Tensor]
    """Everyone's layers from now on."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """What the strategy wants to be given at the next merge, such as a momentum."""


class Strategy(ABC):
    """Decides about a round. It remembers nothing: what it needs again is in `Folded.state`, which is kept on disk."""

    def __init__(self, federation: FederationSection, options: StrategySection, seed: int) -> None:
        self._federation = federation
        self._options = options
        self._seed = seed

    @property
    def max_client_weight(self) -> float:
        """Largest share of a merge that one client may be, see `federation.weights`."""
        return self._options.max_client_weight

    def configure_train(self, round_number: int, clients: Sequence[str]) -> Sequence[str]:
        """Return the clients that train in a round, from the ready ones (sorted).

        Draws `fraction_train` of them, at least `min_train_clients`, by the run's seed.
        """
        wanted = max(self._federation.min_train_clients, int(self._federation.fraction_train * len(clients)), 1)
        if wanted >= len(clients):
            return list(clients)
        return sorted(random.Random(f"{self._seed} {round_number}").sample(list(clients), wanted))

    def objection(self, weights: Sequence[float]) -> str:
        """Say why uploads of these weights cannot be merged, so that the old layers stay; "" if they can."""
        if sum(weights) > 0:
            return ""
        return f"no upload weighs anything by federation.weight_by = {self._federation.weight_by}"

    @abstractmethod
    def aggregate_train(
        self, updates: Sequence[Update], held: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> Folded:
        """Fold the layers of a round's clients, given in the order of their ids.

        `held` are the layers the round began with, `state` is what the last merge has left ({} before the first).
        Changes nothing it is given. Raises `ConfigError` when the layers differ in name or shape.
        """

    def aggregate_controls(
        self,
        updates: Sequence[Update],
        held: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        *,
        rates: Sequence[float],
        num_clients: int,
    ) -> dict[str, Tensor]:
        """Return what this merge makes of the control variates, to be kept with `Folded.state`; {} if it has none.

        `rates` are the sums, for each client, of a step's learning rate times its clip coefficient. `num_clients` is
        the number of all clients of the run, whether they trained or not.
        """
        return {}

    def controls(self, held: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the control variates that go to every client after the layers, one for each; [] if it has none."""
        return []
