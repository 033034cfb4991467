"""Generations: the keys and values of each one's past, and which weights they were made with."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from server_backbone.compute.blocks import Blocks
from server_backbone.compute.blocks_worker import Positions
from server_backbone.compute.copies import Copies, Copy
from splitfl.errors import DataError, RemoteProtocolError
from splitfl.models.remote_cache import BackboneCache


@dataclass(frozen=True, slots=True, kw_only=True)
class _Generation:
    cache: BackboneCache
    version: int
    adapters_off: bool


class Generations:
    """The caches of all clients; how many there may be is decided elsewhere (`server_backbone.deciding.caches`)."""

    def __init__(self, blocks: Blocks, copies: Copies) -> None:
        self._blocks = blocks
        self._copies = copies
        self._known: dict[tuple[str, int], _Generation] = {}

    def decode(self, client_id: str, cache_id: int, positions: Positions) -> Tensor | str:
        """Return the activations BSD of new positions, or why there are none; see `Generating`."""
        copy = self._copies.serving(client_id)
        generation = self._known.get((client_id, cache_id)) or self._begin(client_id, cache_id, copy, positions)
        if generation.version != copy.version:
            self.end(client_id, cache_id)
            return "the backbone has learned since this generation began: begin it anew"
        positions = replace(positions, adapters_off=generation.adapters_off)
        try:
            with torch.inference_mode():
                return self._blocks.decode(copy.parameters, generation.cache, positions)
        except DataError as error:
            raise RemoteProtocolError(str(error)) from None

    def end(self, client_id: str, cache_id: int | None = None) -> None:
        """Free a cache of a client, or all of them."""
        for key in [key for key in self._known if key[0] == client_id and cache_id in (None, key[1])]:
            del self._known[key]

    def _begin(self, client_id: str, cache_id: int, copy: Copy, positions: Positions) -> _Generation:
        begun = _Generation(cache=self._blocks.new_cache(), version=copy.version, adapters_off=positions.adapters_off)
        self._known[client_id, cache_id] = begun
        return begun
