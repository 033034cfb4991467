"""Write a checkpoint with one tensor a parameter: `python -m splitfl.models.rewrite SOURCE DESTINATION [GGUF_FILE]`.

It loads the whole model as transformers does (GGUF, experts that are stored one by one). So it runs in a process of its
own, once, and the caller keeps the result.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from splitfl.errors import ModelError


def rewrite(directory: Path, destination: Path, *, gguf_file: str = "") -> None:
    """Convert in a process of its own; `destination` appears whole or not at all."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "splitfl.models.rewrite", str(directory), str(destination)]
    done = subprocess.run([*command, *([gguf_file] if gguf_file else [])], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(f"{directory}: could not be converted to plain safetensors: {last}")


def _convert(source: Path, destination: Path, gguf_file: str | None) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from splitfl.models import checkpoint

    model, found = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf_file, dtype="auto", output_loading_info=True
    )
    if found["missing_keys"]:  # transformers would go on with random values
        sys.exit(f"it has no tensor {min(found['missing_keys'])} ({len(found['missing_keys'])} missing in all)")
    half_done = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    half_done.mkdir(parents=True)
    try:
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # plain weights are written
        model.config.save_pretrained(half_done)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(half_done)
        if gguf_file:
            AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(half_done)
        persistent = set(model.state_dict())
        tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
        tensors |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
        checkpoint.save_tensors(half_done / "model.safetensors", tensors, mode=0o644)
        shutil.rmtree(destination, ignore_errors=True)
        half_done.replace(destination)
    finally:
        shutil.rmtree(half_done, ignore_errors=True)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
