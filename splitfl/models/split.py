"""`split` and `join`: the cut within one process, on a model that is already in memory."""

from torch import Tensor
from transformers import PreTrainedModel

from splitfl.errors import ModelError
from splitfl.models.anatomy import view_of
from splitfl.models.cut import Backbone, Cut
from splitfl.models.stand_in import StandIn
from splitfl.telemetry.units import counted


class _NearBlocks:
    """A backbone in this process, as the stand-in sees it: autograd runs through."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def __call__(
        self, hidden_BSD: Tensor, mask_BS: Tensor | None, position_ids_BS: Tensor | None, *, training: bool
    ) -> Tensor:
        self._backbone.train(training)
        hidden: Tensor = self._backbone(hidden_BSD, mask_BS, position_ids_BS)
        return hidden

    def new_cache(self) -> "_NearCache":
        return _NearCache(self._backbone)


class _NearCache:
    """The backbone's cache, in this process too."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._cache = backbone.new_cache()

    def decode(self, hidden_BSD: Tensor, lengths_B: tuple[int, ...], beams_B: tuple[int, ...]) -> Tensor:
        self._backbone.eval()
        return self._backbone.decode(self._cache, hidden_BSD, lengths_B, beams_B)

    def end(self) -> None:
        """Nothing to do: the cache goes with this object."""


def split(model: PreTrainedModel, *, bottom_layers: int = 1, top_layers: int = 1) -> tuple[PreTrainedModel, Backbone]:
    """Cut a causal LM in two that work as one: (client, backbone).

    `client` is a model of the same class that holds the embedding, the first and last blocks, the final norm and the LM
    head. Calling it runs the backbone. `loss.backward()` leaves gradients on both sides, equal bit for bit to the whole
    model's on CPU. Both share `model`'s parameters, and no `requires_grad` changes. Raises `ModelError` for a model
    that cannot be cut there.
    """
    cut = Cut.of(_unwrapped(model), bottom_layers=bottom_layers, top_layers=top_layers)
    backbone = cut.backbone()
    return cut.client_model(_NearBlocks(backbone)), backbone


def join(client: PreTrainedModel, backbone: Backbone) -> PreTrainedModel:
    """Put the parts from `split` together: an ordinary model of the original class, sharing the parameters of both."""
    cut = backbone.cut
    owner_path = ".".join(cut.anatomy.owner_path)
    try:
        blocks = list(client.get_submodule(cut.anatomy.blocks_path).children())
    except AttributeError:
        blocks = []
    stand_ins = [block for block in blocks if isinstance(block, StandIn)]
    if len(stand_ins) != 1 or len(blocks) != cut.bottom_layers + 1 + cut.top_layers:
        raise ModelError(
            "join takes the client and the backbone of one split: this backbone needs"
            f" {counted(cut.bottom_layers, 'block')} below"
            f" it and {cut.top_layers} above"
        )
    at = blocks.index(stand_ins[0])
    middle = [cut.blocks[layer] for layer in cut.layers_of("backbone")]
    whole = view_of(
        client,
        cut.anatomy,
        [*blocks[:at], *middle, *blocks[at + 1 :]],
        cut.whole.config,
        owns_input=True,
        owns_output=True,
    )
    owner = whole.get_submodule(owner_path)
    del owner._forward_pre_hooks[stand_ins[0].hook.id]
    del owner._forward_pre_hooks_with_kwargs[stand_ins[0].hook.id]
    whole.generation_config = cut.whole.generation_config
    return whole


def _unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """Look inside a `peft.PeftModel`: its adapters sit in the blocks and are cut with them."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
