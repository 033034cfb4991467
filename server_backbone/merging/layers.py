"""Everyone's layers: what all clients begin with, and what a strategy makes of their uploads."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from splitfl.federation.strategy import Strategy


class FirstLayers(Mapping[str, Tensor]):
    """What every client starts with: read from the checkpoint when asked for, since a server need not hold it."""

    def __init__(self, names: Sequence[str], read: Callable[[str], Tensor]) -> None:
        self._names = list(names)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Joined(Mapping[str, Tensor]):
    """A client's layers and its copy of the backbone as one, each tensor brought here when it is asked for."""

    def __init__(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        self._both = (first, second)

    def __getitem__(self, name: str) -> Tensor:
        first, second = self._both
        return second[name].cpu() if name in second else first[name]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(*self._both)

    def __len__(self) -> int:
        return sum(map(len, self._both))


class Layers:
    """The client-side layers that all have in common, in the model's order."""

    def __init__(self, strategy: Strategy, first: Mapping[str, Tensor]) -> None:
        """`first` are what every client starts with, by name, in the model's order."""
        self.strategy = strategy
        self.first = first
        self.held: Mapping[str, Tensor] = first
        """Everyone's now; these tensors are never written to again."""
        self.state: Mapping[str, Tensor] = {}
        """What the strategy wants to be given at the next merge; never written to again."""

    def restore(self, layers: Mapping[str, Tensor] | None, state: Mapping[str, Tensor]) -> None:
        """Go on with what the last merge has left, if there was one."""
        self.state = state
        if layers is not None:
            self.hold(layers)

    def hold(self, layers: Mapping[str, Tensor]) -> None:
        """Make these everyone's: those of an earlier moment."""
        self.held = {name: layers[name] for name in self.first}

    def fold(
        self,
        updates: Sequence[tuple[Mapping[str, Tensor], float]],
        before: Mapping[str, Tensor],
        *,
        rates: Sequence[float],
        num_clients: int,
    ) -> dict[str, Tensor]:
        """Fold updates, in the order of their names, into everyone's layers; return what comes of the backbone.

        A strategy sees a client's layers and its copy of the backbone as one update; `before` is what all copies began
        with, {} where there are none. `rates` and `num_clients` as in `Strategy.aggregate_controls`.
        """
        old = Joined(self.held, before)
        folded = self.strategy.aggregate_train(updates, old, self.state)
        controls = self.strategy.aggregate_controls(
            updates, old, self.state, rates=rates, num_clients=max(num_clients, len(updates))
        )
        backbone = {name: folded.layers.pop(name) for name in before}
        self.held, self.state = folded.layers, {**folded.state, **controls}
        return backbone

    def controls(self) -> list[Tensor]:
        """Return the control variates that go with the layers, [] if the strategy has none."""
        return self.strategy.controls(self.held, self.state)
