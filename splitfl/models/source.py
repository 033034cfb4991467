"""Models built empty, and the weights they are filled with: from a checkpoint, or from files of the welcome.

Classes come from the installed transformers only; code that a checkpoint brings along is refused.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from splitfl.config.sections import ModelSection
from splitfl.config.trees import RunConfig
from splitfl.errors import ConfigError, ModelError
from splitfl.models import checkpoint
from splitfl.models.anatomy import num_positions
from splitfl.models.checkpoint import Entry
from splitfl.models.cut import Cut, Side
from splitfl.models.locks import TORCH_IS_PATCHED
from splitfl.models.origin import INDEX_FILE, SINGLE_FILE, Origin
from splitfl.models.rewrite import rewrite
from splitfl.models.trainable import checkpoint_name, choose_trainable, first_adapter_values, is_adapter

# The weights themselves, as the server offers them and a client asks for them.
WEIGHTS_FILE = "client.safetensors"
ADAPTERS_FILE = "adapters.safetensors"


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
    """Build a run's model without memory, cut and with its adapters in place; also what is worth telling about it.

    Raises `ModelError` for a model that cannot be cut so, `ConfigError` for rows longer than it has positions for.
    """
    model = empty_model(read_config(directory), run.model)
    cut = Cut.of(model, bottom_layers=run.model.bottom_layers, top_layers=run.model.top_layers)
    longest = num_positions(model, cut.anatomy)
    if longest is not None and run.text.max_seq_length > longest:
        raise ConfigError(
            f"text.max_seq_length = {run.text.max_seq_length}, but this {model.config.model_type} has positions for"
            f" {longest} tokens: set it to {longest} or less"
        )
    return cut, choose_trainable(cut, run)


class Weights:
    """A checkpoint's tensors by name, adapters' first values included."""

    def __init__(self, entries: Mapping[str, Entry], *, prefix: str, seed: int, later: Mapping[str, Tensor]) -> None:
        """Take where tensors lie, the base model's name (some leave it out), and `later` values that win."""
        self._entries = entries
        self._prefix = prefix + "."
        self._seed = seed
        self._later = later

    def has(self, names: Sequence[str]) -> bool:
        """Tell whether a tensor is there under any of its names, without opening the file that holds it."""
        return self._known_as(names) is not None

    def find(self, names: Sequence[str]) -> Entry | None:
        """Return where a tensor lies under any of its names."""
        known_as = self._known_as(names)
        return None if known_as is None else self._entries[known_as]

    def _known_as(self, names: Sequence[str]) -> str | None:
        spellings = [(name, name.removeprefix(self._prefix)) for name in map(checkpoint_name, names)]
        return next((name for name in itertools.chain(*spellings) if name in self._entries), None)

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


class Shards(Mapping[str, Entry]):
    """A checkpoint's tensors by name; a file is opened, and had from the hub, when one of its tensors is asked for."""

    def __init__(self, origin: Origin) -> None:
        """Read the index, or the headers where there is none; raise `ModelError` for a directory without weights."""
        self._origin = origin
        self._opened: dict[str, dict[str, Entry]] = {}
        self._file_of = self._indexed() if (origin.directory / INDEX_FILE).exists() else self._opened_all()

    def all_files(self) -> list[Path]:
        """Have all files here and return them; raise `ModelError` for one that is not to be had."""
        return [self._origin.file(name) for name in sorted(set(self._file_of.values()))]

    def __getitem__(self, name: str) -> Entry:
        file = self._file_of[name]
        if name not in self._open(file):
            raise ModelError(f"{self._origin.directory / file}: has no tensor {name}, which {INDEX_FILE} says it has")
        return self._open(file)[name]

    def __contains__(self, name: object) -> bool:
        return name in self._file_of  # what a mapping does by itself would open the file

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def _open(self, file: str) -> dict[str, Entry]:
        if file not in self._opened:
            self._opened[file] = checkpoint.entries_of(self._origin.file(file))
        return self._opened[file]

    def _indexed(self) -> dict[str, str]:
        index = self._origin.directory / INDEX_FILE
        try:
            weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            is_beside_it = all(Path(file).name == file for file in weight_map.values())
        except (ValueError, KeyError, TypeError):
            is_beside_it = False
        if not is_beside_it:
            raise ModelError(f"{index}: not an index of safetensors files in its folder")
        return weight_map

    def _opened_all(self) -> dict[str, str]:
        files = sorted(path.name for path in self._origin.directory.glob("*.safetensors")) or [SINGLE_FILE]
        return {name: file for file in files for name in self._open(file)}


def weights_in(origin: Origin, cut: Cut, *, seed: int) -> Weights:
    """Open a checkpoint as the weights of a model: only files that hold what is read are opened."""
    return Weights(Shards(origin), prefix=cut.anatomy.base_prefix(), seed=seed, later={})


def lacking(weights: Weights, cut: Cut, *sides: Side) -> list[str]:
    """Name the tensors of these sides that the weights do not have."""
    wanted = [names for side in sides for names, _ in cut.tensors_of(side).values()]
    return [names[0] for names in wanted if not is_adapter(names[0]) and not weights.has(names)]


def server_weights(origin: Origin, cut: Cut, *, seed: int, cache_dir: Path) -> Weights:
    """Open a checkpoint on the server, rewriting it once if its tensors are not the modules' own.

    Some families (mixtures of experts) are stored otherwise than they are computed. Only transformers' own loading
    knows how. It needs the whole model in memory, so a process of its own does it.
    """
    weights = weights_in(origin, cut, seed=seed)
    if not origin.hub_id:  # the clients' tensors are needed as well: better to miss a file now than after the backbone
        Shards(origin).all_files()
    if not lacking(weights, cut, "client", "server"):
        return weights
    rewritten = cache_dir / "rewritten" / _identity(origin)
    if not (rewritten / SINGLE_FILE).exists():
        rewrite(origin.directory, rewritten)
    weights = weights_in(Origin(directory=rewritten), cut, seed=seed)
    if missing := lacking(weights, cut, "client", "server"):
        raise ModelError(f"{origin.directory}: has no tensor {missing[0]} ({len(missing)} missing in all)")
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


def _identity(origin: Origin) -> str:
    """Name a checkpoint by its files' path, sizes and times, to know a rewritten copy again; all are had for it."""
    files = Shards(origin).all_files()
    marks = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join([str(origin.directory.resolve()), *marks]).encode()).hexdigest()[:32]
