"""A model's description that came from a peer: read and bounded before the library is given it.

The library transformers takes nearly any value from `config.json` and the tokenizer's files. These may be names of
classes, of code on the hub, paths, and sizes that it builds before anybody has looked. Only a description that the
installed library can build, within bounds that every known model keeps, gets past this.
"""

import json
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from splitfl.config.trees import RunConfig
from splitfl.errors import ModelError, SplitflError
from splitfl.models.checkpoint import Entry
from splitfl.models.cut import Cut
from splitfl.models.source import Weights, empty_cut
from splitfl.models.trainable import is_adapter
from splitfl.protocol.tensors import norm_of
from splitfl.telemetry.units import printable

_MOST_CONFIG_BYTES = 1 << 20
# Values in a JSON file, counted before it is read: an empty list of three bytes becomes one of 64. The largest
# tokenizers in use have some 2.5 million.
_MOST_VALUES = 1 << 22
_MOST_DEPTH = 32
_MOST_ITEMS = 1 << 14
# Bounds that no known model comes near: how often something is built, and how large a side of a matrix is.
_MOST_REPEATED = 1 << 14
_REPEATED = re.compile(r"(?:^|_)(?:n_)?(?:layers?|blocks?|heads?|experts|stages|groups|depths?)(?:_|$)")
_MOST_SIZE = 1 << 31
_MOST_MODULES = 100_000
_MOST_BUFFER_BYTES = 1 << 32
# Names of code, which may lie anywhere.
_CODE = ("auto_map", "custom_pipelines", "quantization_config")
_PLACES = ("init_inputs", "name_or_path", "cache_dir")
_IMPLEMENTATION = re.compile(r"_implementation(?:_internal)?$")
_KNOWN_IMPLEMENTATIONS = (None, "eager", "sdpa", "grouped_mm", "batched_mm")
# A tokenizer that writes more than this many characters for one of the text's can fill any memory.
_MOST_GROWTH = 64
_MOST_PATTERN = 4096


def check_description(directory: Path) -> None:
    """Raise `ModelError` for a config or tokenizer that names code or paths, or asks for more than any model has."""
    path = directory / "config.json"
    _check_config(path, _json_object(path, _MOST_CONFIG_BYTES))
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "added_tokens.json"):
        if (directory / name).exists():
            tree = _json_object(directory / name, _MOST_CONFIG_BYTES * 32)
            _check_names(directory / name, tree)
            _drop_paths(directory / name, tree)
    if (directory / "vocab.json").exists():
        _check_values(directory / "vocab.json", (directory / "vocab.json").read_bytes())
    if (directory / "tokenizer.json").exists():
        _check_tokenizer(directory / "tokenizer.json")


def foreign_cut(directory: Path, run: RunConfig) -> Cut:
    """Build the model that a peer describes, empty; raise `ModelError` for one that is out of bounds or none."""
    try:
        with _counted_modules(directory):
            cut, _ = empty_cut(directory, run)
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in cut.whole.buffers())
    except SplitflError:
        raise
    except Exception as error:  # noqa: BLE001  # the library's code over a peer's values: anything may come of it
        raise _unusable(directory / "config.json", error) from None
    if buffers > _MOST_BUFFER_BYTES:
        raise ModelError(
            f"{directory / 'config.json'}: its model keeps {buffers} bytes of tables, more than any should"
        )
    return cut


def foreign_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load a peer's tokenizer with the installed classes only; raise `ModelError` where there is none to use."""
    try:
        # without this word the library asks on the terminal whether code may run that the files name
        loaded = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # noqa: BLE001  # tokenizers raises the bare class
        raise _no_tokenizer(_first_line(error)) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, which has no class that could be named here
            raise
        raise _no_tokenizer(_first_line(error)) from None
    if not isinstance(loaded, PreTrainedTokenizerBase):
        raise _no_tokenizer(f"a {type(loaded).__name__} is none")
    return loaded


def check_fits(cut: Cut, weights: Weights, adapters: Mapping[str, Entry]) -> None:
    """Raise `ModelError` unless the files hold the client's tensors in their shapes: memory is taken later."""
    for name, (names, tensor) in cut.tensors_of("client").items():
        entry = adapters.get(name) if is_adapter(name) else weights.find(names)
        if entry is None:
            raise ModelError(f"the server's files have no tensor {name}")
        if entry.shape != tuple(tensor.shape):
            raise ModelError(
                f"the server's tensor {name} has shape {list(entry.shape)} where the model has {list(tensor.shape)}"
            )


def check_finite(name: str, values: Tensor) -> None:
    """Raise `ModelError` for weights that are NaN or infinite."""
    if not values.is_floating_point() or not values.numel():
        return
    if not math.isfinite(norm_of(values)):
        raise ModelError(f"the server's tensor {name} has values that are not finite")


def _json_object(path: Path, most_bytes: int) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise ModelError(f"{path}: {size} bytes, and {most_bytes} are the most for such a file")
        raw = path.read_bytes()
        _check_values(path, raw)
        read = json.loads(raw.decode())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: not JSON") from None
    if not isinstance(read, dict):
        raise ModelError(f"{path}: no JSON object")
    return read


def _check_values(path: Path, raw: bytes) -> None:
    num_values = sum(map(raw.count, (b",", b"[", b"{")))
    if num_values > _MOST_VALUES:
        raise ModelError(f"{path}: {num_values} values, and {_MOST_VALUES} are the most for such a file")


def _check_config(path: Path, config: dict[str, Any]) -> None:
    _check_names(path, config)
    for key, value in _values_in(config):
        if isinstance(value, dict | list) and len(value) > _MOST_ITEMS:
            raise ModelError(f"{path}: {_quoted(key)} has {len(value)} entries, more than any model has")
        if not isinstance(value, int | float):
            continue
        most = _MOST_REPEATED if _REPEATED.search(key) else _MOST_SIZE
        if isinstance(value, int) and abs(value) > most:
            raise ModelError(f"{path}: {_quoted(key)} = {value:.3g} is more than any model has ({most})")


def _check_names(path: Path, tree: dict[str, Any]) -> None:
    for key, value in _values_in(tree):
        if key in _CODE and value:
            raise ModelError(
                f"{path}: brings its own code or formats ({key}), which splitfl does not take from a server"
            )
        if _IMPLEMENTATION.search(key) and value not in _KNOWN_IMPLEMENTATIONS:
            raise ModelError(f"{path}: {_quoted(key)} = {_quoted(value)} names code that may not be the library's own")
        if key == "tokenizer_class" and value is not None:
            _check_tokenizer_class(path, value)


def _drop_paths(path: Path, tree: dict[str, Any]) -> None:
    """Leave out of our copy the paths of the machine that a tokenizer was made on: none of them is one of ours."""
    kept = {key: value for key, value in tree.items() if not key.endswith("_file") and key not in _PLACES}
    if kept != tree:
        path.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")


def _check_tokenizer_class(path: Path, name: object) -> None:
    """Raise unless this names one of the library's tokenizers: the library itself would take any of its classes."""
    found = None
    is_name = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9]{1,64}", name)
    if is_name:
        found = tokenizer_class_from_name(str(name))
    # one that it does not know is read by the library's general class
    is_tokenizer = is_name and (found is None or issubclass(found, PreTrainedTokenizerBase))
    if not is_tokenizer:
        raise ModelError(f"{path}: tokenizer_class = {_quoted(name)} is no tokenizer of this transformers")


def _check_tokenizer(path: Path) -> None:
    growth = 1
    for key, value in _values_in(_json_object(path, 1 << 27), skips=("vocab", "merges", "added_tokens")):
        if (
            key in ("Regex", "String", "ids", "single", "pair")
            and isinstance(value, str | list)
            and len(value) > _MOST_PATTERN
        ):
            raise ModelError(f"{path}: {key} has {len(value)} entries or characters, and {_MOST_PATTERN} are the most")
        if isinstance(value, str) and key in ("content", "prepend"):
            growth *= max(1, len(value))
        if growth > _MOST_GROWTH:
            raise ModelError(f"{path}: may write more than {_MOST_GROWTH} characters for one of the text's")


def _values_in(tree: Any, *, skips: tuple[str, ...] = (), key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield every value with the key that it, or the list that it is in, has."""
    if depth > _MOST_DEPTH:
        raise ModelError(f"the server's model is described {_MOST_DEPTH} levels deep and deeper")
    yield key, tree
    inner = tree.items() if isinstance(tree, dict) else ((key, item) for item in tree) if isinstance(tree, list) else ()
    for name, value in inner:
        if name not in skips:
            yield from _values_in(value, skips=skips, key=name, depth=depth + 1)


@contextmanager
def _counted_modules(directory: Path) -> Iterator[None]:
    """Stop a model that is being built when it has more parts than any has."""
    count, thread = 0, threading.get_ident()

    def count_one(_module: nn.Module, _name: str, _child: nn.Module | None) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > _MOST_MODULES:
            raise ModelError(f"{directory / 'config.json'}: its model has more than {_MOST_MODULES} parts")

    hook = register_module_module_registration_hook(count_one)
    try:
        yield
    finally:
        hook.remove()


def _no_tokenizer(reason: str) -> ModelError:
    return ModelError(f"the server's model has no usable tokenizer: {reason}")


def _unusable(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path}: cannot be used with this transformers: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    said = (str(error).splitlines() or [""])[0][:200]
    return printable(said) or type(error).__name__


def _quoted(value: object) -> str:
    return f"{value!r:.64}"
