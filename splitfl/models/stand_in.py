"""The module that takes the backbone's place in a client's block list.

Shapes: B micro-batch, S sequence, D hidden width.
"""

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import DynamicCache

from splitfl.errors import DataError, ModelError
from splitfl.models.context import context_of
from splitfl.models.remote_cache import RemoteCache, RemoteLayer, put_remote_layer, remote_layer


class RemoteBlocks(Protocol):
    """The backbone as the client sees it: one differentiable function, and caches to generate with."""

    def __call__(
        self, hidden_BSD: Tensor, mask_BS: Tensor | None, position_ids_BS: Tensor | None, *, training: bool
    ) -> Tensor:
        """Return the backbone's activations BSD for the client's."""
        ...

    def new_cache(self) -> RemoteCache:
        """Return the backbone's part of a new generation's cache."""
        ...


class StandIn(nn.Module):
    """Call the remote blocks where a block would be called.

    Blocks get a finished attention mask, from which rows cannot be read in every family. So the caller's mask and
    positions are taken from the module that owns the blocks, just before it runs. So is the cache, in which the
    stand-in has an entry of its own.
    """

    def __init__(self, remote: RemoteBlocks, number: int, *, gives_tuple: bool = False) -> None:
        """Stand where block `number` of the client's model is; `gives_tuple` if its family's blocks do."""
        super().__init__()
        self._remote = remote
        self._number = number
        self._gives_tuple = gives_tuple
        self._mask_BS: Tensor | None = None
        self._position_ids_BS: Tensor | None = None
        self._layer: RemoteLayer | None = None

    def watch(self, owner: nn.Module) -> None:
        """Take each call's mask, positions and cache from `owner`, the module whose block list this stand-in is in."""
        self.hook = owner.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(
        self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise ModelError(
                "a split model takes attention_mask as a tensor of batch x length, 1 where there is a token"
            )
        self._mask_BS = mask
        self._position_ids_BS = kwargs.get("position_ids")
        cache = self._cache_of(owner, kwargs)
        if cache is None:
            self._layer = None
            return args, kwargs
        self._layer = remote_layer(cache, self._number)
        if self._layer is None:
            _check_prompt(owner, args, kwargs)
            self._layer = put_remote_layer(cache, self._number, self._new_cache())
        return args, kwargs | {"past_key_values": cache}

    def _cache_of(self, owner: nn.Module, kwargs: dict[str, Any]) -> Any:
        """Return the call's cache, a new one if it asks for one, None if it uses none."""
        cache = kwargs.get("past_key_values")
        return DynamicCache(config=owner.config) if cache is None and kwargs.get("use_cache") else cache

    def forward(self, hidden_BSD: Tensor, *_: object, **__: object) -> Tensor | tuple[Tensor]:
        """Return the remote blocks' activations; whatever else a block is given is the remote side's own to compute."""
        layer, self._layer = self._layer, None  # not kept: it lives as long as its generation
        remote_BSD = self._run(hidden_BSD) if layer is None else layer.decode(hidden_BSD, self._mask_BS)
        return (remote_BSD,) if self._gives_tuple else remote_BSD

    def _new_cache(self) -> RemoteCache:
        return self._remote.new_cache()

    def _run(self, hidden_BSD: Tensor) -> Tensor:
        return self._remote(hidden_BSD, self._mask_BS, self._position_ids_BS, training=self.training)


def _check_prompt(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a prompt that the model has no positions for, before anything is computed or sent."""
    given = args[0] if args else kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    context = context_of(owner.config)
    if given is not None and context and given.shape[1] > context:
        raise DataError(
            f"a prompt of {given.shape[1]} tokens, more than the {context} of this model's context: shorten it"
        )
