"""Where the blocks of a Hugging Face causal LM are, and shallow copies of it that hold only some of them.

Nothing here copies model code or weights. A *view* is a copy of the few module objects on the way from the model to its
block list, sharing every parameter. In a view the block list is another one, and the config says so. The ends that the
view does not own are neutral: identity after the blocks, zero for learned positions, nothing for the embedding.

Shapes: B micro-batch, S sequence, D hidden width, V vocabulary.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from splitfl.errors import ModelError
from splitfl.models.numbering import numbered

# Attributes of block owners that hold a projection before or after the blocks (opt).
_INPUT_PROJECTIONS = ("project_in",)
_OUTPUT_PROJECTIONS = ("project_out",)
# Norms of block owners that act on the embedding, before the blocks (bloom; mbart and its kin).
_INPUT_NORMS = ("word_embeddings_layernorm", "layernorm_embedding")
# Positions that are computed, not learned, and added to the embedding (xglm, trocr).
_INPUT_POSITIONS = ("embed_positions",)
_INPUT_NAMES = (*_INPUT_PROJECTIONS, *_INPUT_NORMS, *_INPUT_POSITIONS)
# Numbers of block owners that scale embeddings wherever they come from (granite): 1 for a side that does not embed.
_INPUT_SCALES = ("embedding_multiplier",)
# Tables of positions inside blocks (gptj, codegen), and the field that gives their length where no tensor has it (mpt).
_POSITION_TABLE = "embed_positions"
_POSITION_LENGTHS = {"mpt": "max_seq_len"}
# What a block that attends to an encoder calls it (bart and its kin, mllama).
_CROSS_ATTENTION = ("encoder_attn", "crossattention", "cross_attn")

# Fields of a config that say, if they are set, why its blocks cannot be parted. A block then needs another block's
# values or the token ids, neither of which crosses the cut.
_TIES_BETWEEN_BLOCKS = {
    "num_kv_shared_layers": "its last blocks use the keys and values of earlier ones",
    "hidden_size_per_layer_input": "each of its blocks is fed from the token ids, which only the client has",
    "conv_L_cache": "some of its blocks keep a convolutional state instead of keys and values",
    "output_router_logits": "the router's auxiliary loss (output_router_logits) would need the routers of both sides:"
    " set output_router_logits to false",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """Where things are in one causal LM."""

    owner_path: tuple[str, ...]
    """Attributes from the causal LM to the module that owns the blocks, e.g. ("model", "decoder")."""

    blocks_name: str
    """Attribute of the owner that is the block list, e.g. "layers" or "h"."""

    num_blocks: int

    input_names: tuple[str, ...]
    """Children of the owner that act before the blocks: embeddings, positions, input dropout and projection."""

    output_names: tuple[str, ...]
    """Children of the owner that act after the blocks: final norm and output projection."""

    @property
    def blocks_path(self) -> str:
        """Prefix of the block's parameter names, e.g. "model.layers"."""
        return ".".join((*self.owner_path, self.blocks_name))

    def base_prefix(self) -> str:
        """Name of the base model inside the causal LM, e.g. "model" or "transformer"."""
        return self.owner_path[0]


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Find the blocks and the ends of a causal LM, or raise `ModelError` saying why it cannot be cut."""
    kind = model.config.model_type
    _refuse_by_config(model)
    num_blocks = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks and _holds_distinct_blocks(module)
    ]
    if len(found) != 1:
        raise ModelError(
            f"{kind} cannot be cut: {len(found)} lists of modules have num_hidden_layers = {num_blocks} entries,"
            " and exactly one must"
        )
    *owner_path, blocks_name = found[0].split(".")
    if not owner_path:
        raise ModelError(f"{kind} cannot be cut: its blocks belong to the causal LM itself, not to a base model")
    owner = model.get_submodule(".".join(owner_path))
    if any(
        name in _CROSS_ATTENTION for block in owner.get_submodule(blocks_name) for name, _ in block.named_children()
    ):
        raise ModelError(
            f"{kind} cannot be cut: its blocks attend to an encoder: only decoder-only causal LMs can be cut"
        )
    if not any(child is model.get_input_embeddings() for child in owner.children()):
        raise ModelError(
            f"{kind} cannot be cut: its embedding is not beside its blocks, so what happens in between is unknown"
        )
    inputs, outputs = _ends(kind, owner, blocks_name)
    return Anatomy(
        owner_path=tuple(owner_path),
        blocks_name=blocks_name,
        num_blocks=len(owner.get_submodule(blocks_name)),
        input_names=inputs,
        output_names=outputs,
    )


def _refuse_by_config(model: PreTrainedModel) -> None:
    """Raise `ModelError` for what a config says of a model that no module list shows."""
    kind, config = model.config.model_type, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind} is an encoder-decoder model: only decoder-only causal LMs can be cut")
    if not model.can_generate():
        raise ModelError(f"{type(model).__name__} has no LM head: load it with AutoModelForCausalLM")
    text = config.get_text_config()
    if text is not config:
        raise ModelError(
            f"{kind} cannot be cut: it is a model of several parts, of which only the language model"
            f" ({text.model_type}) is a causal LM: save that one by itself"
        )
    if _keeps_recurrent_state(model):
        raise ModelError(
            f"{kind} cannot be cut: its blocks keep a state other than keys and values (recurrent, convolutional or"
            " compressed), which padding and the key-value cache do not reach"
        )
    for name, reason in _TIES_BETWEEN_BLOCKS.items():
        if getattr(config, name, None):
            raise ModelError(f"{kind} cannot be cut: {reason}")


def _keeps_recurrent_state(model: PreTrainedModel) -> bool:
    """Tell state-space, convolutional and hybrid families, by transformers' own mark or by the names of layer types."""
    layer_types = getattr(model.config, "layer_types", None) or ()
    return model._is_stateful or any(
        kind == "linear_attention" or not kind.endswith("attention") for kind in layer_types
    )


def _holds_distinct_blocks(blocks: nn.ModuleList) -> bool:
    """Tell blocks from lists of leaves that happen to be as long; blocks that share weights count as one."""
    return all(any(block.children()) for block in blocks)


def _ends(kind: str, owner: nn.Module, blocks_name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    inputs, outputs = [], []
    norms = []
    for name, child in owner.named_children():
        if name == blocks_name:
            continue
        if isinstance(child, nn.Embedding | nn.Dropout) or name in _INPUT_NAMES:
            inputs.append(name)
        elif "Norm" in type(child).__name__:  # before the next line: some norms have no weights (olmo)
            norms.append(name)
        elif _is_stateless(child):
            continue
        elif name in _OUTPUT_PROJECTIONS:
            outputs.append(name)
        else:
            raise ModelError(
                f"{kind} cannot be cut: what {name} ({type(child).__name__}) does around the blocks is unknown"
            )
    if len(norms) > 1:
        raise ModelError(f"{kind} cannot be cut: it has {len(norms)} norms around its blocks ({', '.join(norms)})")
    return tuple(inputs), tuple(outputs + norms)


def _is_stateless(child: nn.Module) -> bool:
    """Rotary embeddings and the like: no weights, needed by every segment."""
    return not isinstance(child, nn.Dropout) and not any(True for _ in child.parameters())


def num_positions(model: PreTrainedModel, anatomy: Anatomy) -> int | None:
    """Return the length of the longest row that the model has positions for, None where they are computed."""
    config = model.config
    owner = model.get_submodule(".".join(anatomy.owner_path))
    learned = [child for child in owner.children() if isinstance(child, nn.Embedding)]
    if any(child is not model.get_input_embeddings() for child in learned):
        length: int = config.max_position_embeddings  # some tables have a few rows more, for padding (opt, biogpt)
        return length
    in_blocks = (len(buffer) for name, buffer in owner.named_buffers() if name.endswith("." + _POSITION_TABLE))
    return next(in_blocks, getattr(config, _POSITION_LENGTHS.get(config.model_type, ""), None))


class NoPosition(nn.Module):
    """Stand where learned positions were: adds nothing, whatever it is called with."""

    def forward(self, *_: object, **__: object) -> Tensor:
        """Return a scalar zero, which broadcasts and keeps the dtype of what it is added to."""
        return torch.zeros(())


def view_of(
    model: PreTrainedModel,
    anatomy: Anatomy,
    blocks: Sequence[nn.Module],
    config: PreTrainedConfig,
    *,
    owns_input: bool,
    owns_output: bool,
) -> PreTrainedModel:
    """Return a shallow causal LM with these blocks, numbered from 0, in its list, sharing all parameters with `model`.

    `config` is the view's own, see `config_for`.
    """
    view = _shallow(model, config)
    owner: nn.Module = view
    for name in anatomy.owner_path:
        child = _shallow(owner.get_submodule(name), config)
        owner._modules[name] = child
        owner = child
    owner._modules[anatomy.blocks_name] = nn.ModuleList(numbered(block, i) for i, block in enumerate(blocks))
    if not owns_input:
        for name in anatomy.input_names:
            owner._modules[name] = _neutral_input(name, owner.get_submodule(name))
        for name in _INPUT_SCALES:
            if name in vars(owner):
                setattr(owner, name, 1.0)
    if not owns_output:
        for name in anatomy.output_names:
            owner._modules[name] = None if name in _OUTPUT_PROJECTIONS else nn.Identity()
        _drop_head(view, anatomy)
    return view


def base_of(view: PreTrainedModel, anatomy: Anatomy) -> nn.Module:
    """Return the base model (no LM head) inside a view."""
    return view.get_submodule(anatomy.base_prefix())


def _shallow(module: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """Copy one module object, not what it holds; replacing a child of the copy leaves the original alone."""
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if name.startswith("_") and isinstance(value, dict):  # torch's registries: children, parameters, buffers, hooks
            twin.__dict__[name] = copy.copy(value)
    if isinstance(module, PreTrainedModel):
        twin.config = config
    return twin


def config_for(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """Copy a config for other blocks; `layers` names, for each, the layer whose per-layer settings it takes."""
    num_blocks = config.num_hidden_layers
    twin = copy.deepcopy(config)
    for name, value in vars(config).items():
        # by name, because a list of token ids may be as long as there are layers
        if "layer" in name and isinstance(value, list | tuple) and len(value) == num_blocks:
            twin.__dict__[name] = type(value)(value[layer] for layer in layers)
    attribute = (config.attribute_map or {}).get("num_hidden_layers", "num_hidden_layers")
    twin.__dict__[attribute] = len(layers)
    twin.use_cache = False
    return twin


def _neutral_input(name: str, child: nn.Module) -> nn.Module | None:
    if isinstance(child, nn.Embedding) or name in _INPUT_POSITIONS:
        return NoPosition()
    if isinstance(child, nn.Dropout) or name in _INPUT_NORMS:
        return nn.Identity()
    return None


def _drop_head(view: PreTrainedModel, anatomy: Anatomy) -> None:
    """Forget everything of the causal LM but its base model."""
    for name in list(view._modules):
        if name != anatomy.base_prefix():
            view._modules[name] = None
