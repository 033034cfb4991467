"""The module that takes the backbone's place in a client's block list.

Shapes: B micro-batch, S sequence, D hidden width.
"""

from typing import Any, Protocol

from torch import Tensor, nn

from splitfl.errors import ModelError


class FarBlocks(Protocol):
    """The backbone as the client sees it: one differentiable function."""

    def __call__(
        self, hidden_BSD: Tensor, mask_BS: Tensor | None, position_ids_BS: Tensor | None, *, training: bool
    ) -> Tensor:
        """Return the backbone's activations BSD for the client's."""
        ...


class StandIn(nn.Module):
    """Call the far blocks where a block would be called.

    Blocks are handed a finished attention mask, from which rows cannot be read in every family; the mask and the
    positions that the caller gave are therefore taken from the module that owns the blocks, just before it runs.
    """

    def __init__(self, far: FarBlocks, *, gives_tuple: bool = False) -> None:
        super().__init__()
        self._far = far
        self._gives_tuple = gives_tuple
        self._mask_BS: Tensor | None = None
        self._position_ids_BS: Tensor | None = None

    def watch(self, owner: nn.Module) -> None:
        """Take each call's mask and positions from `owner`, the module whose block list this stand-in is in."""
        self.hook = owner.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, _owner: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise ModelError(
                "a split model takes attention_mask as a tensor of batch x length, 1 where there is a token"
            )
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            raise ModelError("a split model keeps no key-value cache yet: pass use_cache=False")
        self._mask_BS = mask
        self._position_ids_BS = kwargs.get("position_ids")

    def forward(self, hidden_BSD: Tensor, *_: object, **__: object) -> Tensor | tuple[Tensor]:
        """Return the far blocks' activations; whatever else a block is given is the far side's own to compute."""
        far_BSD = self._far(hidden_BSD, self._mask_BS, self._position_ids_BS, training=self.training)
        return (far_BSD,) if self._gives_tuple else far_BSD
