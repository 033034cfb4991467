"""A run's result as a PEFT adapter: a few megabytes that `PeftModel.from_pretrained` puts on the base model."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from splitfl.config.trees import RunConfig
from splitfl.errors import ConfigError
from splitfl.models import checkpoint
from splitfl.models.cut import Cut
from splitfl.models.trainable import is_adapter
from splitfl.telemetry.units import counted

_ADAPTER_FILE = "adapter_model.safetensors"
# In a file of adapters peft names the model inside its own, and leaves out the name of the adapter.
_PREFIX = "base_model.model."
_ADAPTER_NAME = ".default"


def write_adapter(cut: Cut, run: RunConfig, trained: Mapping[str, Tensor], folder: Path, *, base: str) -> None:
    """Write `adapter_config.json` and the adapters; raise `ConfigError` when more than adapters was trained.

    `base` is what they belong on: the hub id of a model or its directory, absolute, since peft takes it as it is.
    """
    from peft import LoraConfig

    others = [name for name in trained if not is_adapter(name)]
    if others:
        raise ConfigError(
            f"the run has trained {counted(len(others), 'tensor that is no adapter', 'tensors that are no adapters')}"
            f" ({others[0]} is the first), and an adapter"
            " directory cannot hold them: export with --format merged"
        )
    adapted = [name.rsplit(".lora_", 1)[0] for name in trained]
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        r=run.lora.r,
        lora_alpha=run.lora.alpha,
        lora_dropout=run.lora.dropout,
        target_modules=sorted({name.rsplit(".", 1)[-1] for name in adapted}),
        # only blocks that have adapters get them again
        layers_to_transform=sorted({layer for name in adapted if (layer := cut.layer_of(name)) is not None}),
        layers_pattern=cut.anatomy.blocks_name,
        fan_in_fan_out=any(cut.whole.get_submodule(name).fan_in_fan_out for name in adapted),
    ).save_pretrained(folder)
    tensors = {_PREFIX + name.replace(_ADAPTER_NAME, ""): tensor for name, tensor in trained.items()}
    checkpoint.save_tensors(folder / _ADAPTER_FILE, tensors, mode=0o644)
