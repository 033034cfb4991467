"""The backbone's blocks where they lie. They compute with the weights that they are pointed at, which copies nothing.

A graph holds on to the parameters of its forward, so micro-batches with different weights may overlap in any order.
Shapes: B micro-batch, S sequence, D hidden width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from server_backbone.compute.blocks_worker import MicroBatch, Positions
from server_backbone.compute.placement import DeviceMap, connect_devices
from splitfl.models.cut import Cut
from splitfl.models.packing import check_packing
from splitfl.models.remote_cache import BackboneCache
from splitfl.training.stopwatch import Stopwatch

Weights = Mapping[str, nn.Parameter]
"""Parameters in the place of the trained ones, by their names in the whole model."""


class Blocks:
    """The middle of the model on its device or devices, and the time that it takes."""

    def __init__(self, cut: Cut, device: torch.device, device_map: DeviceMap | None = None) -> None:
        """Take a cut whose server side is filled, where a device map says if there is one."""
        self.device = device
        self.backbone = cut.backbone()
        if device_map is not None:
            connect_devices(self.backbone, device_map)
        self.trainable: Weights = cut.trainable("server")
        self._places = _places_of(self.backbone, self.trainable)
        self._adapted = [module for module in self.backbone.modules() if isinstance(module, BaseTunerLayer)]
        self.compute = Stopwatch()

    def check_packing(self, max_seq_length: int) -> None:
        """Raise `ModelError` if the blocks do not keep examples apart that share a row."""
        check_packing(self.backbone.base, max_seq_length=max_seq_length)

    def run(self, weights: Weights, batch: MicroBatch, *, trains: bool) -> Tensor:
        """Return the activations BSD of a micro-batch, with dropout if the blocks train."""
        length = batch.hidden_BSD.shape[1]
        self._use(weights, trains=trains)
        with self.compute.running(), self._adapters(off=batch.adapters_off):
            mask_BS = batch.layout.mask(length, self.device)
            position_ids_BS = batch.layout.position_ids(length, self.device)
            return self.backbone(batch.hidden_BSD.to(self.device), mask_BS, position_ids_BS)

    def new_cache(self) -> BackboneCache:
        """Return an empty cache of a generation; raise `ModelError` for a family that keeps more than that."""
        return self.backbone.new_cache()

    def decode(self, weights: Weights, cache: BackboneCache, positions: Positions) -> Tensor:
        """Return the activations BSD of new positions after a cache; raise `DataError` for wrong padding."""
        self._use(weights, trains=False)
        with self.compute.running(), self._adapters(off=positions.adapters_off):
            hidden_BSD = positions.hidden_BSD.to(self.device)
            return self.backbone.decode(cache, hidden_BSD, positions.lengths_B, positions.beams_B)

    def _use(self, weights: Weights, *, trains: bool) -> None:
        for registry, key, name in self._places:
            registry[key] = weights[name]
        self.backbone.train(trains)

    @contextmanager
    def _adapters(self, *, off: bool) -> Iterator[None]:
        """Have the backbone's adapters sit out all that is run inside, as peft's `disable_adapter` does."""
        if not off:
            yield
            return
        for layer in self._adapted:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._adapted:
                layer.enable_adapters(True)


def _places_of(backbone: nn.Module, trainable: Weights) -> Sequence[tuple[dict[str, nn.Parameter | None], str, str]]:
    """Return where in the blocks each parameter is held: registry, key in it, and its name in the whole model."""
    names = {parameter: name for name, parameter in trainable.items()}
    return [
        (module._parameters, key, names[parameter])
        for module in backbone.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter in names
    ]
