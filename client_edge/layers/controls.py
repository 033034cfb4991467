"""SCAFFOLD on the client: what is added to its gradients, so that many steps on its own text do not lead it astray.

Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1 with option II. Controls are float32 whatever the layers' type:
they are differences of layers over small learning rates.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from client_edge.layers.gradient_rules import GradientRule, RoundStart

_EVERYONES = "control/"
_OWN = "own_control/"
_RATE = "control_rate"


class Controls(GradientRule):
    """The server's c and this client's c_i, for each merged layer."""

    def __init__(self, merged: Mapping[str, nn.Parameter]) -> None:
        """Both begin at 0; with no layers there is nothing to correct, to keep or to settle."""
        self._merged = merged
        self._start = RoundStart(merged)
        self._begin_at_zero()

    def forget(self) -> None:
        """Begin at 0, as at the first step."""
        self._start.mark()
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        merged = self._merged
        self._everyones = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in merged.items()}
        self._own = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in merged.items()}
        self._rate = 0.0
        """Sum of what the round's gradients were multiplied by: learning rate times clip coefficient."""

    def change(self, step: int) -> None:
        """Add c - c_i to the gradients."""
        for name, parameter in self._merged.items():
            correction = self._everyones[name] - self._own[name]
            if parameter.grad is None:
                parameter.grad = correction.to(parameter.dtype)
            else:
                parameter.grad.add_(correction)

    def stepped(self, rate: float) -> None:
        """Take note of a step and of what its gradients are multiplied by."""
        self._rate += rate

    @torch.no_grad()
    def round_ends(self, *, counted: bool) -> None:
        """Settle c_i: c_i <- c_i - c + (x - y_i) / sum of rates if the server has merged y_i, else it stays.

        What the way x - y_i is divided by is what its gradients were multiplied by, so c_i is their weighted mean,
        clipped or not.
        """
        if counted and self._rate > 0:
            for name, parameter in self._merged.items():
                # float64, rounded once, as the server does it: one client's c_i is its c, to the bit
                way = _exact(self._start[name]) - _exact(parameter)
                change = way / self._rate - _exact(self._everyones[name])
                self._own[name].copy_(_exact(self._own[name]) + change)
        self._rate = 0.0

    def round_begins(self, more: Sequence[Tensor]) -> None:
        """Take over the server's c."""
        for control, new in zip(self._everyones.values(), more, strict=True):
            control.copy_(new)
        self._start.mark()

    def state(self) -> dict[str, Tensor]:
        """Return c, c_i, where the round began and what its rates add up to."""
        if not self._merged:
            return {}
        everyones = {_EVERYONES + name: control for name, control in self._everyones.items()}
        own = {_OWN + name: control for name, control in self._own.items()}
        return {**self._start.state(), **everyones, **own, _RATE: torch.tensor(self._rate, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state` has returned."""
        self._start.restore(state)
        for name in self._merged:
            self._everyones[name].copy_(state[_EVERYONES + name])
            self._own[name].copy_(state[_OWN + name])
        self._rate = float(state.get(_RATE, 0.0))


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)  # not every device has it
