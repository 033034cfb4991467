"""A generation's key-value cache, in two parts: the client's blocks have theirs here, the backbone has its own.

In the client's cache one `RemoteLayer` stands where the stand-in stands among the blocks. It holds no keys, no values.
It counts the positions, so that the library makes masks and positions right even with no block in front. It also notes
how rows were reordered since the last token, and that goes to the backbone with the next one.

Shapes: B rows, S new positions, D hidden width.
"""

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from splitfl.errors import DataError, ModelError


class RemoteCache(Protocol):
    """The backbone's part of one generation's cache."""

    def decode(self, hidden_BSD: Tensor, lengths_B: tuple[int, ...], beams_B: tuple[int, ...]) -> Tensor:
        """Run new positions after the positions in the cache and return the backbone's activations BSD.

        `lengths_B` are the rows' tokens among the new positions, padded on the left; `beams_B` are the cached rows
        that the rows go on from, () when each goes on from its own.
        """
        ...

    def end(self) -> None:
        """Free the cache; twice is fine."""
        ...


class RemoteLayer(CacheLayerMixin):  # type: ignore[misc]
    """An entry without width in a client's cache, for all blocks of the backbone."""

    supports_early_init = False
    is_croppable = False

    def __init__(self, remote: RemoteCache, sliding_window: int | None) -> None:
        """Stand where the first of the backbone's blocks would keep its keys: its window sizes the library's masks."""
        super().__init__()
        self.is_sliding = sliding_window is not None
        self._window = sliding_window
        self._remote = remote
        self._length = 0
        self._beams_B: Tensor | None = None
        # a cache lives as long as the generation that holds it; at the end of the program the session ends them all
        weakref.finalize(self, remote.end).atexit = False

    def decode(self, hidden_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Have the backbone go on with new positions; `mask_BS` is over all positions so far, new ones included."""
        lengths_B = lengths_of(hidden_BSD, mask_BS)
        beams_B = () if self._beams_B is None else tuple(self._beams_B.tolist())
        got_BSD = self._remote.decode(hidden_BSD, lengths_B, beams_B)
        self._length += hidden_BSD.shape[1]
        self._beams_B = None
        return got_BSD

    def get_seq_length(self) -> int:
        """Return the number of positions so far."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of the keys a mask is made for, as transformers' own layers do."""
        offset = 0 if self._window is None else max(self._length - self._window + 1, 0)
        return self._length - offset + query_length, offset

    def get_max_length(self) -> int:
        """Return the window, -1 without one."""
        return -1 if self._window is None else self._window

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Remember which row each beam goes on from."""
        self._beams_B = beam_idx.cpu() if self._beams_B is None else self._beams_B[beam_idx.cpu()]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse what only contrastive search does, before the number of rows is known."""
        raise ModelError("a split model cannot repeat the rows of a cache: contrastive search needs the whole model")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to go back, which assisted decoding does: the backbone's cache only grows."""
        raise ModelError(
            "a split model cannot take tokens back out of its cache: assisted decoding needs the whole model"
        )

    def reset(self) -> None:
        """Refuse to begin again with the same cache."""
        raise ModelError("the cache of a split model cannot be reset: make a new DynamicCache")

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Do nothing: there is nothing to hold."""

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Raise: no block of this side has its keys here."""
        raise ModelError("this block of the client's has the number of the stand-in: the model was cut wrongly")


def remote_layer(cache: Any, number: int) -> RemoteLayer | None:
    """Return the entry of the stand-in, which is block `number`, None in a cache that has none yet."""
    if type(cache) is not DynamicCache or cache.offloading:
        raise ModelError(
            f"a split model generates with a DynamicCache and not with a {type(cache).__name__}: leave"
            " cache_implementation unset"
        )
    layer = cache.layers[number] if number < len(cache.layers) else None
    return layer if isinstance(layer, RemoteLayer) else None


def put_remote_layer(cache: DynamicCache, number: int, remote: RemoteCache) -> RemoteLayer:
    """Set the stand-in's entry in a cache that is empty; raise `ModelError` for one that is not."""
    if cache.get_seq_length():
        raise ModelError("a cache that another model has filled: a split model begins with an empty one")
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= number:
        cache.layers.append(cache.layer_class_to_replicate())
    place = cache.layers[number]
    layer = RemoteLayer(remote, getattr(place, "sliding_window", None))
    cache.layers[number] = layer
    return layer


class BackboneCache:
    """The backbone's own keys and values, and which positions of each row are tokens."""

    def __init__(self, config: Any) -> None:
        """Take the config of the backbone's blocks; raise `ModelError` where they keep more than keys and values."""
        self.keys_and_values = DynamicCache(config=config)
        kinds = {type(layer) for layer in self.keys_and_values.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
        if kinds:
            raise ModelError(
                f"{config.model_type} keeps more than keys and values of its past ({kinds.pop().__name__}): generate"
                " with use_cache=False"
            )
        self._length = 0
        self._padding_B: Tensor | None = None

    def reorder(self, beams_B: tuple[int, ...]) -> None:
        """Let each row go on from another; () leaves them as they are."""
        if not beams_B or self._padding_B is None:
            return
        index_B = torch.tensor(beams_B)
        self.keys_and_values.reorder_cache(index_B)
        self._padding_B = self._padding_B[index_B]

    def grown(self, num_new: int, lengths_B: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
        """Take note of new positions; return mask over all and positions of the new ones, None when no row is padded.

        Raises `DataError` for padding after a token.
        """
        before_B = torch.zeros(len(lengths_B), dtype=torch.long) if self._padding_B is None else self._padding_B
        new_B = num_new - torch.tensor(lengths_B)
        if bool(((new_B > 0) & (before_B < self._length)).any()):
            raise DataError("padding after the tokens of a row: a generation's rows are padded on the left")
        self._padding_B = before_B + new_B
        self._length += num_new
        if not self._padding_B.any():
            return None, None
        positions_BS = torch.arange(self._length) - self._padding_B.unsqueeze(1)
        return (positions_BS >= 0).long(), positions_BS[:, -num_new:].clamp(min=0)


def lengths_of(hidden_BSD: Tensor, mask_BS: Tensor | None) -> tuple[int, ...]:
    """Return the rows' tokens among the new positions, the last of those in `mask_BS`.

    Raises `DataError` for rows that are not padded on the left.
    """
    batch, num_new, _ = hidden_BSD.shape
    if mask_BS is None:
        return (num_new,) * batch
    new_BS = mask_BS[:, -num_new:].cpu() != 0
    if new_BS.shape != (batch, num_new) or not bool((new_BS[:, :-1] <= new_BS[:, 1:]).all()):
        raise DataError(
            "an attention_mask with holes or padded on the right: a generation's rows are padded on the left"
            ' (tokenizer.padding_side = "left")'
        )
    return tuple(new_BS.sum(dim=1).tolist())
