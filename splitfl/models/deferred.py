"""Logits that are computed when somebody looks at them, so that a loss can do without.

`model(input_ids, labels=...)` of transformers makes the logits first and the loss from them. With a `DeferringHead` in
the LM head's place it makes a note of what the logits would be. The loss takes `chunked_loss` instead, and a reader of
`outputs.logits` gets the plain model's values, bit for bit.

Shapes: B micro-batch, S sequence, D hidden width, V vocabulary.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from splitfl.errors import ModelError
from splitfl.models.loss import IGNORED_LABEL, Head, are_same, chunked_loss, head_of, tried_on

# What is known of logits without computing them.
_KNOWN = {getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad")}
_KNOWN |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point}
# What models do to logits before the loss: scales, softcapping, float32. `deferrable_head` proves what it comes to.
_LATER = {Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, Tensor.div, Tensor.__truediv__, torch.div}
_LATER |= {Tensor.tanh, torch.tanh, Tensor.float, Tensor.contiguous}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """How to compute logits, as they would have been when the head was called."""

    linear: nn.Linear
    hidden_BSD: Tensor
    weight_version: int
    is_grad_enabled: bool
    autocast: torch.dtype | None
    steps: tuple[Callable[[Tensor], Tensor], ...] = field(default=())

    def cook(self) -> Tensor:
        if self.linear.weight._version != self.weight_version:
            raise ModelError(
                "the LM head has learned since these logits were due: read outputs.logits before optimizer.step(), or"
                ' set train.loss = "plain" on the server'
            )
        kind = self.hidden_BSD.device.type
        casting = torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None)
        with torch.set_grad_enabled(self.is_grad_enabled), casting:
            logits_BSV = nn.functional.linear(self.hidden_BSD, self.linear.weight, self.linear.bias)
        for step in self.steps:
            logits_BSV = step(logits_BSV)
        return logits_BSV


class DeferredLogits(Tensor):
    """Logits BSV that nobody has looked at yet; any use but the loss computes them, once."""

    _recipe: _Recipe
    _cooked: Tensor | None

    @staticmethod
    def of(recipe: _Recipe, dtype: torch.dtype) -> "DeferredLogits":
        """Return logits of this dtype that `recipe` will give."""
        linear, hidden_BSD = recipe.linear, recipe.hidden_BSD
        learns = hidden_BSD.requires_grad or linear.weight.requires_grad
        logits: DeferredLogits = Tensor._make_wrapper_subclass(
            DeferredLogits,
            (*hidden_BSD.shape[:-1], linear.out_features),
            dtype=dtype,
            device=hidden_BSD.device,
            requires_grad=recipe.is_grad_enabled and learns,
        )
        logits._recipe, logits._cooked = recipe, None
        return logits

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer what is known, put off what only scales, and compute the logits for anything else."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in _KNOWN:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if func in _LATER and isinstance(first, DeferredLogits) and all(isinstance(a, int | float) for a in args[1:]):
            return first._then(func, args[1:], kwargs)
        args, kwargs = tree_map(_computed, (tuple(args), dict(kwargs)))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own is no class method, but is called as one
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do the same below autograd, where `__torch_function__` is turned off."""
        args, kwargs = tree_map(_computed, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    @property
    def is_computed(self) -> bool:
        """Whether anybody has looked."""
        return self._cooked is not None

    def computed(self) -> Tensor:
        """Return the logits as an ordinary tensor; raise `ModelError` when the head has changed in between."""
        if self._cooked is None:
            self._cooked = self._recipe.cook()
        return self._cooked

    def are_those_of(self, head: Head) -> bool:
        """Tell whether `head`, given what the LM head was given, has these logits."""
        return are_same(head.logits(self._recipe.hidden_BSD), self.computed())

    def loss(self, head: Head, labels_BS: Tensor, num_items: Tensor | int | None) -> Tensor:
        """Return the causal LM loss as `chunked_loss` has it; `head` says what is done to the logits."""
        recipe = self._recipe
        hidden_BSD, dtype = recipe.hidden_BSD, recipe.autocast
        weight_VD: Tensor = recipe.linear.weight
        bias_V: Tensor | None = recipe.linear.bias
        if dtype is not None:
            weight_VD, hidden_BSD = weight_VD.to(dtype), hidden_BSD.to(dtype)
            bias_V = None if bias_V is None else bias_V.to(dtype)
        with torch.autocast(hidden_BSD.device.type, enabled=False):
            head = replace(head, weight_VD=weight_VD, bias_V=bias_V)
            return chunked_loss(head, hidden_BSD, labels_BS.to(hidden_BSD.device), num_items)

    def _then(self, func: Any, others: Sequence[Any], kwargs: Mapping[str, Any]) -> "DeferredLogits":
        def step(logits_BSV: Tensor) -> Tensor:
            result: Tensor = func(logits_BSV, *others, **kwargs)
            return result

        dtype = torch.float32 if func is Tensor.float else self.dtype
        return DeferredLogits.of(replace(self._recipe, steps=(*self._recipe.steps, step)), dtype)


def _computed(value: Any) -> Any:
    return value.computed() if isinstance(value, DeferredLogits) else value


class DeferringHead(nn.Linear):
    """An LM head that puts its logits off."""

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """Return logits BSV that are computed when somebody looks."""
        kind = hidden_BSD.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        recipe = _Recipe(
            linear=self,
            hidden_BSD=hidden_BSD,
            weight_version=self.weight._version,
            is_grad_enabled=torch.is_grad_enabled(),
            autocast=autocast,
        )
        return DeferredLogits.of(recipe, autocast or hidden_BSD.dtype)


def deferrable_head(view: PreTrainedModel, base: nn.Module) -> Head | None:
    """Return what a model does between its LM head's input and its logits, None if `chunked_loss` does not know that.

    `view` is a model of its own around `base`, which keeps the head that it is given here. Decided by trying; a family
    may scale before the head (minicpm3) or after it (cohere), and only the latter is the head's.
    """
    head = head_of(view, base)
    if head is None:
        return None
    _give_deferring_head(view)
    with torch.no_grad():
        logits_BSV = view(inputs_embeds=tried_on(view), use_cache=False).logits
        if not isinstance(logits_BSV, DeferredLogits):
            return None
        candidates = (head, replace(head, scale=1.0, cap=math.inf))
        return next((each for each in candidates if logits_BSV.are_those_of(each)), None)


def defer_logits(model: PreTrainedModel, head: Head) -> None:
    """Have `model(..., labels=...)` take its loss without logits; `head` is what `deferrable_head` has found for it.

    Its LM head is replaced by one that shares the parameters, so that another model with the same head stays as it is.
    """
    _give_deferring_head(model)
    model.loss_function = partial(_loss, replace(head, weight_VD=torch.empty(0), bias_V=None))


def _give_deferring_head(model: PreTrainedModel) -> None:
    linear = copy.copy(model.get_output_embeddings())
    linear.__dict__.update({name: copy.copy(linear.__dict__[name]) for name in ("_parameters", "_buffers")})
    linear.__class__ = DeferringHead
    model.set_output_embeddings(linear)


def _loss(
    head: Head,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED_LABEL,
    shift_labels: Tensor | None = None,
    **more: Any,
) -> Tensor:
    """Be `ForCausalLMLoss`, without logits where what is asked for is what `chunked_loss` computes."""
    if isinstance(logits, DeferredLogits) and shift_labels is None and ignore_index == IGNORED_LABEL:
        return logits.loss(head, labels, num_items_in_batch)
    loss: Tensor = ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **more)
    return loss
