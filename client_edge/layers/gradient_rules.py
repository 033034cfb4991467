"""What is done to a step's gradients before their norms are taken: a list of rules, put together once by `Edge`.

A further rule is a class here, or in a file of its own, and a line in `client_edge.layers.edge.rules_of`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

_ROUND_START = "round_start/"


class GradientRule:
    """Changes the gradients of each step; what it remembers goes into the client's snapshots.

    This one does nothing: a rule writes over what it needs.
    """

    def change(self, step: int) -> None:
        """Change the gradients of a step all of whose micro-batches have gone their way."""

    def discard(self) -> None:
        """Drop what is kept of a step that is applied nowhere."""

    def stepped(self, rate: float) -> None:
        """Take note of a step that is applied, and of what its gradients are multiplied by."""

    def round_ends(self, *, counted: bool) -> None:
        """Merged layers have come and are not here yet; `counted` if the merge has taken what this client trained."""

    def round_begins(self, more: Sequence[Tensor]) -> None:
        """Merged layers are here, and `more` tensors have come after them."""

    def state(self) -> dict[str, Tensor]:
        """Return what is remembered, by name; the tensors are the live ones."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state` has returned."""

    def forget(self) -> None:
        """Begin as at the first step: the first layers are here."""


class RoundStart:
    """The merged layers as they were when the round began."""

    def __init__(self, merged: Mapping[str, nn.Parameter]) -> None:
        self._merged = merged
        self._layers = {name: parameter.detach().clone() for name, parameter in merged.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._layers[name]

    def mark(self) -> None:
        """Have the round begin now."""
        for name, parameter in self._merged.items():
            self._layers[name].copy_(parameter.detach())

    def state(self) -> dict[str, Tensor]:
        """Return the layers by name; the tensors are the live ones."""
        return {_ROUND_START + name: layer for name, layer in self._layers.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state` has returned."""
        for name, layer in self._layers.items():
            layer.copy_(state[_ROUND_START + name])


class Proximal(GradientRule):
    """FedProx: mu (w - w0), w0 being the layers of the last merge, keeps a client near the others.

    The gradient of mu/2 |w - w0|² (Li et al. 2020, arXiv:1812.06127, equation 2).
    """

    def __init__(self, mu: float, merged: Mapping[str, nn.Parameter]) -> None:
        self._mu = mu
        self._merged = merged
        self._start = RoundStart(merged)

    @torch.no_grad()
    def change(self, step: int) -> None:
        """Add the term."""
        for name, parameter in self._merged.items():
            pull = (parameter - self._start[name]).mul_(self._mu)
            parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)

    def round_begins(self, more: Sequence[Tensor]) -> None:
        """Take the merged layers for w0."""
        self._start.mark()

    def state(self) -> dict[str, Tensor]:
        """Return w0."""
        return self._start.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to an earlier w0."""
        self._start.restore(state)

    def forget(self) -> None:
        """Take the first layers for w0."""
        self._start.mark()
