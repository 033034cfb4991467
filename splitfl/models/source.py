"""Where a model comes from: a directory or hub id on the server, files from the welcome on a client.

Classes come from the installed transformers only; code that a checkpoint brings along is refused.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from splitfl.config import ModelSection, RunConfig
from splitfl.errors import ModelError
from splitfl.models import checkpoint
from splitfl.models.checkpoint import Entry
from splitfl.models.cut import Cut, Side
from splitfl.models.locks import TORCH_IS_PATCHED
from splitfl.models.rewrite import rewrite
from splitfl.models.trainable import checkpoint_name, choose_trainable, first_adapter_values, is_adapter

# What a client gets besides weights, if the model's directory has it. The names are fixed: a peer never chooses a path.
DESCRIPTION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
# The weights themselves, as the server offers them and a client asks for them.
WEIGHTS_FILE = "client.safetensors"
ADAPTERS_FILE = "adapters.safetensors"


def locate(model_name_or_path: str) -> Path:
    """Return a directory with the model's files, downloading from the hub what is named by an id."""
    path = Path(model_name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path} is a file: model_name_or_path names a directory or a hub id")
    if model_name_or_path.count("/") != 1 or model_name_or_path.startswith((".", "/", "~")):
        raise ModelError(f"{model_name_or_path}: no such directory (and not a hub id, which is written OWNER/NAME)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_name_or_path, allow_patterns=[*DESCRIPTION_FILES, "*.safetensors*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{model_name_or_path}: no such directory, and not to be had from the hub: {reason}") from None


def read_config(directory: Path) -> PreTrainedConfig:
    """Read `config.json`; raise `ModelError` for an unknown family, one without a causal LM, or one with own code."""
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ModelError(f"{directory}: no config.json: is this a model's directory?") from None
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ModelError(f"{path}: has no model_type")
    if "auto_map" in raw:
        raise ModelError(
            f"{path}: brings its own code (auto_map), which splitfl does not run: use a family of transformers"
        )
    try:
        config = AutoConfig.for_model(**raw)
    except (ValueError, KeyError, TypeError) as error:
        first = str(error).splitlines()[0][:200]
        raise ModelError(
            f"{path}: model family {raw['model_type']!r} is not usable with this transformers: {first}"
        ) from None
    if getattr(config, "is_encoder_decoder", False):  # its decoder alone would load, and answer to no encoder
        raise ModelError(
            f"{path}: {config.model_type} is an encoder-decoder model: only decoder-only causal LMs can be cut"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{path}: transformers has no causal LM for model family {config.model_type!r}")
    return config


def empty_model(config: PreTrainedConfig, section: ModelSection) -> PreTrainedModel:
    """Build the causal LM with shapes but no memory, in evaluation mode."""
    choice = {} if section.attn_implementation == "auto" else {"attn_implementation": section.attn_implementation}
    try:
        with TORCH_IS_PATCHED, torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, section.dtype), **choice)
    except (ValueError, ImportError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ModelError(f"{config.model_type} cannot be built with this transformers: {reason}") from None
    return model.eval()


def empty_cut(directory: Path, run: RunConfig) -> tuple[Cut, list[str]]:
    """Build a run's model without memory, cut and with its adapters in place; also what is worth telling about it."""
    model = empty_model(read_config(directory), run.model)
    cut = Cut.of(model, bottom_layers=run.model.bottom_layers, top_layers=run.model.top_layers)
    return cut, choose_trainable(cut, run)


class Weights:
    """A checkpoint's tensors by name, adapters' first values included."""

    def __init__(self, entries: Mapping[str, Entry], *, prefix: str, seed: int, later: Mapping[str, Tensor]) -> None:
        """Take where tensors lie, the base model's name (some leave it out), and `later` values that win."""
        self._entries = entries
        self._prefix = prefix + "."
        self._seed = seed
        self._later = later

    def find(self, names: Sequence[str]) -> Entry | None:
        """Return where a tensor lies under any of its names."""
        for name in map(checkpoint_name, names):
            for known_as in (name, name.removeprefix(self._prefix)):
                if known_as in self._entries:
                    return self._entries[known_as]
        return None

    def read(self, names: Sequence[str], values: Tensor) -> None:
        """Fill `values`; raise `ModelError` when the checkpoint has no such tensor."""
        if names[0] in self._later:
            values.copy_(self._later[names[0]])
        elif is_adapter(names[0]):
            first_adapter_values(names[0], values, self._seed)
        elif entry := self.find(names):
            checkpoint.read_into(entry, values)
        else:
            raise ModelError(f"the checkpoint has no tensor {names[0]}")


def weights_of(paths: Iterable[Path], cut: Cut, *, seed: int, later: Mapping[str, Tensor] | None = None) -> Weights:
    """Open safetensors files as the weights of a model."""
    entries: dict[str, Entry] = {}
    for path in paths:
        entries |= checkpoint.entries_of(path)
    return Weights(entries, prefix=cut.anatomy.base_prefix(), seed=seed, later=later or {})


def shards_in(directory: Path) -> list[Path]:
    """Return a directory's safetensors files, those its index names or all."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ModelError(f"{index}: not an index of safetensors files") from None
        shards = [directory / name for name in names if Path(name).name == name]
    else:
        shards = sorted(directory.glob("*.safetensors"))
    missing = [shard.name for shard in shards if not shard.exists()]
    if not shards or missing:
        lacks = ", ".join(missing) or "safetensors files"
        raise ModelError(f"{directory}: lacks {lacks}; save the model with save_pretrained to get them")
    return shards


def server_weights(directory: Path, cut: Cut, *, seed: int, cache_dir: Path) -> Weights:
    """Open the checkpoint in a directory, rewriting it once if its tensors are not those of the model's modules.

    Some families (mixtures of experts) are stored otherwise than they are computed; only transformers' own loading
    knows how, and it needs the whole model in memory, so a process of its own does it.
    """
    weights = weights_of(shards_in(directory), cut, seed=seed)
    wanted = [names for side in ("client", "server") for names, _ in cut.tensors_of(side).values()]
    lacking = [names[0] for names in wanted if not is_adapter(names[0]) and weights.find(names) is None]
    if not lacking:
        return weights
    rewritten = cache_dir / "rewritten" / _identity(directory)
    if not (rewritten / "model.safetensors").exists():
        rewrite(directory, rewritten)
    weights = weights_of(shards_in(rewritten), cut, seed=seed)
    if lacking := [names[0] for names in wanted if not is_adapter(names[0]) and weights.find(names) is None]:
        raise ModelError(f"{directory}: has no tensor {lacking[0]} ({len(lacking)} missing in all)")
    return weights


def write_part(path: Path, cut: Cut, side: Side, weights: Weights) -> str:
    """Copy one side's tensors, as stored, into one file without holding them; returns its SHA-256 (hex)."""
    pieces = {}
    for name, (names, _) in cut.tensors_of(side).items():
        if is_adapter(name):
            continue
        entry = weights.find(names)
        if entry is None:
            raise ModelError(f"the checkpoint has no tensor {name}")
        pieces[checkpoint_name(name)] = checkpoint.piece_of_entry(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    return checkpoint.write(path, pieces)


def _identity(directory: Path) -> str:
    """Name a directory's weights by path, sizes and times, to know a rewritten copy again."""
    marks = [f"{shard.name} {shard.stat().st_size} {shard.stat().st_mtime_ns}" for shard in shards_in(directory)]
    return hashlib.sha256("\n".join([str(directory.resolve()), *marks]).encode()).hexdigest()[:32]
