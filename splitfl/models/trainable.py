"""What trains: adapters put into blocks, `requires_grad` set by configuration, and the adapters' first values."""

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from splitfl.config.identity import LoraSection
from splitfl.config.trees import RunConfig
from splitfl.errors import ConfigError
from splitfl.models.cut import Cut
from splitfl.models.locks import TORCH_IS_PATCHED
from splitfl.telemetry.units import counted

_ADAPTER = ".lora_"


def choose_trainable(cut: Cut, run: RunConfig) -> list[str]:
    """Put adapters into an empty or real model and mark what trains; return sentences worth telling at the start.

    Raises `ConfigError` when nothing would train, or when an adapter's target module is in none of the blocks.
    """
    modes = _mode_per_layer(cut, run)
    for number, mode in modes.items():
        if mode == "lora":
            _add_adapters(cut, cut.blocks[number], run.lora)
    embeddings = set(cut.anatomy.input_names)
    for name, parameter in cut.parameters():
        layer = cut.layer_of(name)
        if layer is not None:
            parameter.requires_grad = modes[layer] == "full" or (modes[layer] == "lora" and is_adapter(name))
        else:
            parameter.requires_grad = run.train.embeddings if _end_of(name, cut) in embeddings else run.train.norm_head
    if not cut.trainable():
        raise ConfigError("nothing trains: set train.bottom, train.top or train.backbone to lora or full")
    return _notes(cut, run)


def is_adapter(name: str) -> bool:
    """Tell an adapter's parameter from a checkpoint's, by name."""
    return _ADAPTER in name


def checkpoint_name(name: str) -> str:
    """Return the name that a parameter has in the checkpoint: adapters wrap the layer they are put on."""
    return name.replace(".base_layer.", ".")


def first_adapter_values(name: str, values: Tensor, seed: int) -> None:
    """Write an adapter's first values: A uniform as in the LoRA paper's code (Kaiming, a = sqrt 5), B zero.

    Drawn from (seed, name), so the order in which tensors are made never matters.
    """
    if ".lora_B." in name:
        values.zero_()
        return
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    drawn = torch.empty(values.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    values.copy_(drawn)


def _mode_per_layer(cut: Cut, run: RunConfig) -> dict[int, str]:
    modes = dict.fromkeys(cut.layers_of("bottom"), run.train.bottom) | dict.fromkeys(
        cut.layers_of("top"), run.train.top
    )
    middle = cut.layers_of("backbone")
    if run.train.backbone_layers > len(middle):
        raise ConfigError(
            f"train.backbone_layers = {run.train.backbone_layers}: the backbone has {counted(len(middle), 'block')};"
            " 0 means all"
        )
    learning = set(middle[-run.train.backbone_layers :]) if run.backbone_trains else set()
    return {**modes, **{layer: run.train.backbone if layer in learning else "none" for layer in middle}}


def _end_of(name: str, cut: Cut) -> str:
    """Return the child of the block owner that a parameter outside the blocks belongs to; "" for the head."""
    prefix = ".".join(cut.anatomy.owner_path) + "."
    return name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else ""


def _add_adapters(cut: Cut, block: nn.Module, lora: LoraSection) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    targets = lora.target_modules or _family_targets(cut, block)
    known = sorted({name.split(".")[-1] for name, child in block.named_modules() if _is_linear(child)})
    unknown = set(targets) - set(known)
    if unknown:
        raise ConfigError(
            f"lora.target_modules: no {', '.join(sorted(unknown))} in a block; known here: {', '.join(known)}"
        )
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # peft divides by r, a float serves
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        fan_in_fan_out=any(type(child).__name__ == "Conv1D" for child in block.modules()),
    )
    with TORCH_IS_PATCHED:
        inject_adapter_in_model(config, block, low_cpu_mem_usage=True)
    for name, parameter in block.named_parameters():
        if is_adapter("." + name):
            # in float32 whatever the model's type is: their updates are small
            parameter.data = parameter.data.float()


def _family_targets(cut: Cut, block: nn.Module) -> Iterable[str]:
    """Return peft's choice for the family, all linear layers of a block where it has none."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    family = KNOWN.get(cut.whole.config.model_type)
    if family:
        return tuple(family)
    return tuple(sorted({name.split(".")[-1] for name, child in block.named_modules() if _is_linear(child)}))


def _is_linear(child: nn.Module) -> bool:
    return isinstance(child, nn.Linear) or type(child).__name__ == "Conv1D"


def _notes(cut: Cut, run: RunConfig) -> list[str]:
    notes = []
    tied = cut.whole.get_output_embeddings().weight is cut.whole.get_input_embeddings().weight
    if tied and run.train.norm_head and not run.train.embeddings:
        notes.append(
            "the LM head is tied to the embedding and stays frozen with it: train.norm_head trains the final norm alone"
            " unless train.embeddings = true"
        )
    if not cut.trainable("client"):
        notes.append("nothing on the clients trains: their merges are empty")
    if not cut.trainable("server"):
        notes.append("nothing on the server trains: the backbone stays as it is")
    return notes
