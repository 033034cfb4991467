"""What trains of the backbone: one set of weights with an optimizer for all, or in `per_client` a copy for each client.

A state names the common tensors as the model does, and a client's own after `own/` and its id.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from splitfl.config.kind import BackboneKind
from splitfl.config.trees import RunConfig
from splitfl.protocol.tensors import digest_of
from splitfl.training.optimizer import PartOptimizer, is_moment

_OWN = "own/"  # before a client's id, in the names of a state


@dataclass(slots=True, kw_only=True)
class Copy:
    """Parameters that train together, by their names in the whole model, and their optimizer."""

    parameters: dict[str, nn.Parameter]
    optimizer: PartOptimizer
    version: int = 0
    """Changes whenever the weights move; unique among all copies."""
    has_learned: bool = False
    """Whether they have moved since the copy was made."""


class Copies:
    """Who trains which weights of the backbone.

    A client's copy begins at its first training micro-batch with the common weights and ends with the merge, which
    makes the common weights anew. In between its optimizer's moments wait for the next one.
    """

    def __init__(self, trainable: Mapping[str, nn.Parameter], run: RunConfig) -> None:
        """Take those parameters of a filled backbone that train; they become the common ones."""
        self._run = run
        self._last_version = 0
        self.are_per_client = run.backbone_kind is BackboneKind.COPIES
        self.most_held = 0
        """Clients whose copies or moments were held at once, at most."""
        self.common = Copy(parameters=dict(trainable), optimizer=self._optimizer_of(trainable))
        self._own: dict[str, Copy] = {}
        self._moments: dict[str, Mapping[str, Tensor]] = {}

    def training(self, client_id: str) -> Copy:
        """Return what this client's steps move, made from the common weights if it has none yet."""
        if not self.are_per_client:
            return self.common
        if client_id not in self._own:
            self._own[client_id] = self._made(self._moments.pop(client_id, {}))
            self.most_held = max(self.most_held, len(self._own) + len(self._moments))
        return self._own[client_id]

    def serving(self, client_id: str) -> Copy:
        """Return what this client evaluates and generates with."""
        return self._own.get(client_id, self.common)

    def moved(self, copy: Copy) -> None:
        """Take note that a copy's weights have changed."""
        self._last_version += 1
        copy.version, copy.has_learned = self._last_version, True

    def begin_round(self, clients: Iterable[str]) -> None:
        """Forget the copies and moments of all but these clients."""
        for owners in (self._own, self._moments):
            for client_id in owners.keys() - set(clients):
                del owners[client_id]

    def merge_into(self, weights: Mapping[str, Tensor]) -> None:
        """Make these the common weights, or keep the old ones if there are none, and end all copies.

        Tensors under a live graph are left as they are: a client in the middle of a step computes it to its end for
        nothing.
        """
        with torch.no_grad():
            for name, merged in weights.items():
                self.common.parameters[name].copy_(merged)
        for client_id, copy in self._own.items():
            self._moments[client_id] = copy.optimizer.moments()
        self._own.clear()
        if self._run.federation.optimizer_state == "reset":
            self._moments.clear()
        self.moved(self.common)

    def state(self) -> dict[str, Tensor]:
        """Return all weights and moments by name, the live ones; copies that have not moved are not in it."""
        tensors = dict(self.common.optimizer.state())
        for client_id in sorted(self._own.keys() | self._moments.keys()):
            tensors |= {f"{_OWN}{client_id}/{name}": value for name, value in self._state_of(client_id).items()}
        return tensors

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state` has returned."""
        self._own.clear()
        self._moments.clear()
        mine: dict[str, dict[str, Tensor]] = {}
        common = {}
        for name, value in state.items():
            if not name.startswith(_OWN):
                common[name] = value
                continue
            _, client_id, of_client = name.split("/", 2)
            mine.setdefault(client_id, {})[of_client] = value
        self.common.optimizer.load_state(common)
        self.moved(self.common)
        for client_id, tensors in mine.items():
            if all(map(is_moment, tensors)):
                self._moments[client_id] = {name: value.clone() for name, value in tensors.items()}
                continue
            self.load_own(client_id, tensors)

    def load_own(self, client_id: str, state: Mapping[str, Tensor]) -> None:
        """Go back to what one client's optimizer has returned as its `state`."""
        copy = self.training(client_id)
        copy.optimizer.load_state(state)
        self.moved(copy)

    def _state_of(self, client_id: str) -> Mapping[str, Tensor]:
        copy = self._own.get(client_id)
        if copy is None:
            return self._moments[client_id]
        return copy.optimizer.state() if copy.has_learned else copy.optimizer.moments()

    def _made(self, moments: Mapping[str, Tensor]) -> Copy:
        parameters = {name: nn.Parameter(p.detach().clone()) for name, p in self.common.parameters.items()}
        optimizer = self._optimizer_of(parameters)
        optimizer.load_moments(moments)
        return Copy(parameters=parameters, optimizer=optimizer, version=self.common.version)

    def _optimizer_of(self, parameters: Mapping[str, nn.Parameter]) -> PartOptimizer:
        return PartOptimizer(parameters, self._run.optimizer, self._run.num_training_steps)


def weights_in(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights among the tensors of a state, without the moments."""
    return {name: value for name, value in state.items() if not is_moment(name)}


def digest_in(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) over the weights among the tensors of a client's state, in the model's order."""
    return digest_of(weights_in(state).values())


def owners_in(state: Mapping[str, Tensor]) -> Sequence[str]:
    """Name the clients whose own copies have moved, by a state of everything."""
    return sorted({name.split("/", 2)[1] for name in weights_in(state) if name.startswith(_OWN)})
