"""From a run's folder to an ordinary Hugging Face directory: the model with adapters merged in, or a PEFT adapter.

One tensor is in memory at a time, so a machine that could not hold the model can still write it.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from splitfl.config.own import default_cache_dir
from splitfl.config.trees import ServerConfig
from splitfl.errors import ConfigError, ModelError
from splitfl.models import checkpoint
from splitfl.models.adapter import write_adapter
from splitfl.models.card import CARD_FILE, Format, card_of
from splitfl.models.checkpoint import Piece, TensorFile
from splitfl.models.content import locate_same
from splitfl.models.cut import Cut
from splitfl.models.origin import DESCRIPTION_FILES
from splitfl.models.source import Weights, empty_cut, server_weights
from splitfl.models.trainable import checkpoint_name, is_adapter
from splitfl.reporting.report import build_report
from splitfl.telemetry.metrics import read_events

CONFIG_FILE = "config.toml"
TRAINED_FILE = "trained.safetensors"
_TRAINED_BY = "trained-{client_id}.safetensors"
# What would make a folder of adapters look like a model.
_OF_A_WHOLE_MODEL = {"config.json", "generation_config.json"}
_SHARD_BYTES = 5_000_000_000  # as large as the hub likes a file


def trained_file(client_id: str = "") -> str:
    """Return the name of the file in a run's folder that holds what was trained; with a client's name its alone."""
    return _TRAINED_BY.format(client_id=client_id) if client_id else TRAINED_FILE


def export_run(run_dir: Path, output_dir: Path, format_: Format = "merged", client_id: str = "") -> Path:
    """Write what a run has trained so far; `output_dir` appears whole or not at all.

    `client_id` names whose copy, where every own-loop client has one.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise ConfigError(f"{run_dir}: not a run's folder: it has no {CONFIG_FILE}")
    trained_path = run_dir / trained_file(client_id)
    if not trained_path.is_file():
        raise ConfigError(f"{run_dir}: {_nothing(run_dir, client_id)}")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ConfigError(f"{output_dir} exists and is not empty: name another folder, or remove it first")
    config = ServerConfig.load(run_dir / CONFIG_FILE)
    cache_dir = config.server.cache_dir or default_cache_dir()
    origin = locate_same(config.model, cache_dir)
    cut, _ = empty_cut(origin.directory, config)
    trained = TensorFile(trained_path)
    if format_ == "adapter":
        described = set(DESCRIPTION_FILES) - _OF_A_WHOLE_MODEL
        with _appearing(output_dir, origin.directory, described, _card(run_dir, config, "adapter")) as folder:
            write_adapter(cut, config, trained, folder, base=origin.hub_id or str(origin.directory.resolve()))
        return output_dir
    weights = server_weights(origin, cut, seed=config.seed, cache_dir=cache_dir)
    return export_model(cut, weights, origin.directory, config, run_dir, output_dir, client_id)


def _nothing(run_dir: Path, client_id: str) -> str:
    """Say why there is nothing to export."""
    pattern = _TRAINED_BY.format(client_id="*")
    names = sorted(path.stem.removeprefix("trained-") for path in run_dir.glob(pattern))
    if names:
        return f"there is a backbone for each client, and none merged: name one of {', '.join(names)} with --client"
    if client_id:
        return f"no backbone of {client_id}: only own-loop clients with server_mode = per_client have one each"
    return "nothing to export yet: the run has not finished its first round"


def export_model(
    cut: Cut,
    weights: Weights,
    directory: Path,
    config: ServerConfig,
    run_dir: Path,
    output_dir: Path,
    client_id: str = "",
    *,
    replaces: bool = False,
) -> Path:
    """Write config, tokenizer, model card and weights: what `AutoModelForCausalLM.from_pretrained` loads.

    `replaces` what was exported there before, as when a run has gone on after its end.
    """
    card = _card(run_dir, config, "merged")
    with _appearing(output_dir, directory, DESCRIPTION_FILES, card, replaces=replaces) as folder:
        _name_dtype(folder / "config.json", cut.whole.dtype)
        _write_weights(_pieces(cut, weights, TensorFile(run_dir / trained_file(client_id))), folder)
    return output_dir


def _card(run_dir: Path, config: ServerConfig, format_: Format) -> str:
    return card_of(config, build_report(read_events(run_dir / "metrics.jsonl")), format_)


@contextmanager
def _appearing(
    output_dir: Path, directory: Path, described: Iterable[str], card: str, *, replaces: bool = False
) -> Iterator[Path]:
    """Give a folder with these of the model's files and a card; it becomes `output_dir` if nothing goes wrong."""
    half_done, replaced = (output_dir.with_name(f".{output_dir.name}.{what}") for what in ("partial", "replaced"))
    for left_over in (half_done, replaced):
        shutil.rmtree(left_over, ignore_errors=True)
    half_done.mkdir(parents=True)
    try:
        for name in described:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, half_done / name)
        (half_done / CARD_FILE).write_text(card, encoding="utf-8")
        yield half_done
        if output_dir.exists() and replaces:
            output_dir.replace(replaced)
        elif output_dir.exists():
            output_dir.rmdir()
        half_done.replace(output_dir)
    finally:
        for left_over in (half_done, replaced):
            shutil.rmtree(left_over, ignore_errors=True)


def _pieces(cut: Cut, weights: Weights, trained: Mapping[str, Tensor]) -> dict[str, Piece]:
    adapted = {name.rsplit(".lora_", 1)[0] for name in trained if is_adapter(name)}
    pieces: dict[str, Piece] = {}
    for side in ("client", "server"):
        for name, (names, empty) in cut.tensors_of(side).items():
            if is_adapter(name):
                continue
            layer = name.removesuffix(".base_layer.weight")
            if name in trained:
                piece = checkpoint.piece_of_tensor(partial(trained.__getitem__, name), empty.dtype, empty.shape)
            elif layer != name and layer in adapted:
                merged = partial(_merged, cut, weights, trained, layer, names, empty)
                piece = checkpoint.piece_of_tensor(merged, empty.dtype, empty.shape)
            else:
                piece = _stored(weights, names, empty)
            pieces[checkpoint_name(name)] = piece
    return pieces


def _stored(weights: Weights, names: list[str], empty: Tensor) -> Piece:
    """Take a tensor over from the checkpoint, in the run's type."""
    entry = weights.find(names)
    if entry is None:
        raise ModelError(f"the checkpoint has no tensor {names[0]}")
    if checkpoint.DTYPES[entry.dtype] == empty.dtype:
        return checkpoint.piece_of_entry(entry)

    def read() -> Tensor:
        values = torch.empty(empty.shape, dtype=empty.dtype)
        checkpoint.read_into(entry, values)
        return values

    return checkpoint.piece_of_tensor(read, empty.dtype, empty.shape)


def _merged(
    cut: Cut, weights: Weights, trained: Mapping[str, Tensor], layer: str, names: list[str], empty: Tensor
) -> Tensor:
    """Return W + scaling * B A, in float32 and then the model's type (LoRA, arXiv:2106.09685, section 4.1)."""
    base = torch.empty(empty.shape, dtype=empty.dtype)
    weights.read(names, base)
    update = trained[f"{layer}.lora_B.default.weight"] @ trained[f"{layer}.lora_A.default.weight"]
    module = cut.whole.get_submodule(layer)
    if module.fan_in_fan_out:  # gpt2's Conv1D keeps its weight transposed
        update = update.T
    return (base.float() + update.float() * module.scaling["default"]).to(empty.dtype)


def _name_dtype(config_file: Path, dtype: torch.dtype) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the name transformers 4 had for it
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(pieces: dict[str, Piece], folder: Path) -> None:
    shards: list[dict[str, Piece]] = [{}]
    size = 0
    for name, piece in pieces.items():
        if shards[-1] and size + piece.num_bytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = piece
        size += piece.num_bytes
    if len(shards) == 1:
        checkpoint.write(folder / "model.safetensors", shards[0])
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        checkpoint.write(folder / file_name, shard)
        where |= dict.fromkeys(shard, file_name)
    total = sum(piece.num_bytes for piece in pieces.values())
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
