"""Adaptive optimizers on the server (Reddi et al. 2021, arXiv:2003.00295, algorithm 2).

As in Flower, the second moment begins at 0 and FedAdam's rate is corrected for moments that begin at 0. The paper
begins the second moment at tau² or more and corrects nothing.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from splitfl.federation.strategy import Folded, Strategy
from splitfl.federation.updates import Update, exact_means

_NUM_MERGES = "num_merges"
_FIRST = "first/"
_SECOND = "second/"


class _Adaptive(Strategy):
    """Takes a step along the first moment of the clients' mean change, scaled by the root of the second."""

    def aggregate_train(
        self, updates: Sequence[Update], held: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> Folded:
        """Return the layers after the server's step; `state` holds both moments (float32) and counts the merges."""
        num_merges = 1 + int(state.get(_NUM_MERGES, torch.zeros(())))
        rate = self._rate(num_merges)
        folded = Folded(layers={}, state={_NUM_MERGES: torch.tensor(float(num_merges))})
        for name, mean, dtype in exact_means(updates):
            before = held[name].double()
            change = mean - before
            zero = torch.zeros_like(change)
            first = self._first_moment(state.get(_FIRST + name, zero).double(), change)
            second = self._second_moment(state.get(_SECOND + name, zero).double(), change.square())
            folded.state[_FIRST + name] = first.to(torch.float32)
            folded.state[_SECOND + name] = second.to(torch.float32)
            folded.layers[name] = (before + rate * first / (second.sqrt() + self._options.tau)).to(dtype)
        return folded

    def _rate(self, num_merges: int) -> float:
        """Return the rate of a merge, counted from 1."""
        return self._options.eta

    def _first_moment(self, last: Tensor, change: Tensor) -> Tensor:
        return self._options.beta_1 * last + (1 - self._options.beta_1) * change

    @abstractmethod
    def _second_moment(self, last: Tensor, square: Tensor) -> Tensor: ...


class FedAdagrad(_Adaptive):
    """Divides by the root of all squared changes so far; without momentum."""

    def _first_moment(self, last: Tensor, change: Tensor) -> Tensor:
        return change

    def _second_moment(self, last: Tensor, square: Tensor) -> Tensor:
        return last + square


class FedAdam(_Adaptive):
    """Divides by the root of a running mean of squared changes."""

    def _rate(self, num_merges: int) -> float:
        """Return eta, corrected as Flower does: by t + 1 where Adam's own correction has t."""
        beta_1, beta_2, t = self._options.beta_1, self._options.beta_2, num_merges
        return self._options.eta * math.sqrt(1 - beta_2 ** (t + 1)) / (1 - beta_1 ** (t + 1))

    def _second_moment(self, last: Tensor, square: Tensor) -> Tensor:
        return self._options.beta_2 * last + (1 - self._options.beta_2) * square


class FedYogi(_Adaptive):
    """As FedAdam, but the second moment moves by a step that does not depend on how far off it is."""

    def _second_moment(self, last: Tensor, square: Tensor) -> Tensor:
        return last - (1 - self._options.beta_2) * square * (last - square).sign()
