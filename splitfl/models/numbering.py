"""Blocks under other numbers: attention finds its keys and values in a cache by its block's number, `layer_idx`."""

import copy

from torch import nn

_NUMBER = "layer_idx"


def numbered(block: nn.Module, number: int) -> nn.Module:
    """Return a block that uses this number, the block itself if it does already or keeps none.

    Only the modules on the way to a number are copied. They go on sharing their registries of parameters and buffers,
    so memory that one of them gets later is the other's too.
    """
    if all(getattr(module, _NUMBER, number) == number for module in block.modules()):
        return block
    twin = copy.copy(block)
    twin.__dict__["_modules"] = {
        name: child if child is None else numbered(child, number) for name, child in block._modules.items()
    }
    if hasattr(twin, _NUMBER):
        twin.__dict__[_NUMBER] = number
    return twin
