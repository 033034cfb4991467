"""How far the layers that a client uploads may have moved since the merge that it began with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfl.config.identity import OptimizerSection
from splitfl.config.trees import RunConfig
from splitfl.errors import RemoteProtocolError

_SLICE = 1 << 20  # elements


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The farthest that a tensor may move: its own size, and `max_update` times as far as the round's steps reach.

    A step of AdamW moves a value by its learning rate, and by 7.3 times that at most. This is for betas of 0.9 and
    0.999, by the inequality of Cauchy and Schwarz, whatever the gradients. A step of SGD moves all values together by
    the learning rate times the norm that gradients are clipped to. The tensor's own size is for weight decay and for
    rounding.
    """

    optimizer: OptimizerSection
    max_update: float
    """`strategy.max_update`; 0 means no bound."""

    @classmethod
    def of(cls, run: RunConfig) -> "Bound":
        """Return the bound of a run's uploads."""
        return cls(optimizer=run.optimizer, max_update=run.strategy.max_update)

    def check(self, layers: Mapping[str, Tensor], begun: Mapping[str, Tensor], path: float) -> float:
        """Return how far these layers have gone of what they may: from 0 to 1, of the tensor that has gone farthest.

        `begun` are the layers that their client began with, `path` is the sum of the learning rates of its steps since.
        Raises `RemoteProtocolError` above 1.
        """
        if not self.max_update or math.isinf(path):
            return 0.0
        return max((self._share(name, layer, begun[name], path) for name, layer in layers.items()), default=0.0)

    def _share(self, name: str, layer: Tensor, begun: Tensor, path: float) -> float:
        moved, own = _rms_of_change(layer, begun)
        limit = own + self.max_update * self._reach(path, layer.numel())
        if moved > limit:
            raise RemoteProtocolError(
                f"layers that no training here makes: {name} has moved by {moved:.3g} (root mean square) since the last"
                f" merge, more than the {limit:.3g} that strategy.max_update = {self.max_update:g} allows"
            )
        return moved / limit if limit else 0.0

    def _reach(self, path: float, num_values: int) -> float:
        """Return how far a tensor's values move at a step's usual pace (root mean square)."""
        if self.optimizer.optim != "sgd" or not self.optimizer.max_grad_norm:
            return path
        return path * self.optimizer.max_grad_norm / math.sqrt(max(num_values, 1))


def _rms_of_change(layer: Tensor, begun: Tensor) -> tuple[float, float]:
    """Return the root mean squares of what has changed and of what was, in float64, a slice at a time."""
    moved = own = 0.0
    for now, before in zip(layer.reshape(-1).split(_SLICE), begun.reshape(-1).split(_SLICE), strict=True):
        was = before.double()
        own += float(was.square().sum())
        moved += float(torch.sub(now.double(), was).square().sum())
    num_values = max(layer.numel(), 1)
    return math.sqrt(moved / num_values), math.sqrt(own / num_values)
