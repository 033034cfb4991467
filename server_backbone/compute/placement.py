"""The backbone spread over several devices of one machine, by Accelerate's device map. Not run on a GPU.

Accelerate decides from the sizes of the blocks and the free memory, and its hooks carry activations from device to
device. Gradients go back the same way. Optimizer state lies where its weights lie.
"""

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from splitfl.errors import ModelError
from splitfl.models.cut import Backbone, Cut

Strategy: TypeAlias = Literal["auto", "balanced", "balanced_low_0", "sequential"]
DeviceMap: TypeAlias = Mapping[str, int | str]
"""Names of modules in the backbone's base model -> devices; "" is all of it."""


def device_map_of(cut: Cut, strategy: Strategy, max_memory: Mapping[int | str, int] | None = None) -> DeviceMap:
    """Let Accelerate spread an empty backbone; `max_memory` (bytes by device) is what is free unless given.

    Raises `ModelError` when it would leave a part where it cannot train: on disk, or on the CPU beside GPUs.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    base = cut.backbone().base
    whole_blocks = sorted({type(block).__name__ for block in cut.blocks})
    free = get_max_memory(dict(max_memory) if max_memory else None)
    if strategy != "sequential":
        low_zero = strategy == "balanced_low_0"
        free = get_balanced_memory(base, free, no_split_module_classes=whole_blocks, low_zero=low_zero)
    device_map: DeviceMap = infer_auto_device_map(base, free, no_split_module_classes=whole_blocks)
    allowed = "cpu" if not torch.cuda.is_available() else ""
    left_over = [name or "all" for name, device in device_map.items() if device in {"cpu", "disk"} - {allowed}]
    if left_over:
        raise ModelError(
            f"server.device_map = {strategy!r}: the devices' free memory does not hold the backbone"
            f" (left over: {', '.join(left_over)}): give the clients more blocks"
            " (model.bottom_layers, model.top_layers), set model.dtype to bfloat16, or use larger devices"
        )
    return device_map


def devices_of(cut: Cut, device_map: DeviceMap) -> dict[Tensor, torch.device]:
    """Return the device of every empty parameter and buffer that a map places, for `Cut.fill`."""
    base = cut.backbone().base
    return {
        tensor: torch.device(device)
        for name, device in device_map.items()
        for tensor in (*base.get_submodule(name).parameters(), *base.get_submodule(name).buffers())
    }


def connect_devices(backbone: Backbone, device_map: DeviceMap) -> None:
    """Put the hooks on a filled backbone that carry activations to where the next block is, and back to the caller."""
    from accelerate import dispatch_model

    if dict(device_map) == {"": "cpu"}:
        return  # they come from the CPU, and go nowhere else
    skipped = backbone.cut.whole._skip_keys_device_placement  # caches are placed by the blocks themselves
    dispatch_model(backbone.base, dict(device_map), skip_keys=skipped, force_hooks=True)
