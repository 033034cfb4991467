"""One hash over what a model is, so that a run knows it again wherever it lies and whatever it is called.

It is over what decides weights and tokens: each tensor's name, type, shape and bytes, `config.json` without notes, and
the tokenizer's files. The spread of the tensors over files, and other files in the folder, do not count.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from splitfl.config.sections import ModelSection
from splitfl.errors import ModelError
from splitfl.models import checkpoint
from splitfl.models.origin import DESCRIPTION_FILES, Origin, locate
from splitfl.models.source import Shards

# What these files say of the model besides what it is: who wrote them, and what a run's settings decide.
_NOTES: Mapping[str, frozenset[str]] = {
    "config.json": frozenset(
        {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
    ),
    "tokenizer_config.json": frozenset({"name_or_path"}),
}
# How to write answers down; no weight and no token of training depends on it.
_NOT_COUNTED = frozenset({"generation_config.json"})
# A file that was changed so lately may be changed again within the same tick of the file system's clock.
_SETTLED_NS = 2_000_000_000


def content_sha256(origin: Origin, cache_dir: Path) -> str:
    """Return the SHA-256 (hex) of a model's content; raise `ModelError` for files that cannot be read.

    Every tensor is read once; the cache remembers what a file held by its path, size, times and inode.
    """
    parts = [[name, _digest_of(path)] for name, path in _described(origin.directory)]
    for path in Shards(origin).all_files():
        parts += _tensors_of(path, cache_dir / "hashes")
    return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()


def locate_same(section: ModelSection, cache_dir: Path) -> Origin:
    """Find a run's model; raise `ModelError` when what lies there now is not what the run was begun with."""
    origin = locate(section.model_name_or_path, cache_dir)
    if section.checkpoint_sha256 and (found := content_sha256(origin, cache_dir)) != section.checkpoint_sha256:
        raise ModelError(
            f"{section.model_name_or_path} holds another model than the run was begun with (model.checkpoint_sha256 is"
            f" {found:.12}…, was {section.checkpoint_sha256:.12}…): put that one back"
        )
    return origin


def _described(directory: Path) -> Iterator[tuple[str, Path]]:
    for name in DESCRIPTION_FILES:
        if name not in _NOT_COUNTED and (directory / name).is_file():
            yield name, directory / name


def _digest_of(path: Path) -> str:
    """Hash a described file; of one of JSON the values, without notes."""
    content = path.read_bytes()
    if path.suffix == ".json":
        with suppress(ValueError, RecursionError):  # its reader will say what is wrong with it
            content = json.dumps(_without_notes(path.name, json.loads(content)), sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def _without_notes(name: str, values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if key not in _NOTES.get(name, frozenset())}


def _tensors_of(path: Path, cache_dir: Path) -> list[list[str]]:
    """Return name, type, shape and hash of each tensor of a file."""
    stat = path.stat()
    marks = (path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)
    known = cache_dir / f"{hashlib.sha256(' '.join(map(str, marks)).encode()).hexdigest()}.json"
    tensors = _read(known)
    if tensors is None:
        tensors = list(_hashed(path))
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS:
            _write(known, tensors)
    return tensors


def _hashed(path: Path) -> Iterator[list[str]]:
    for name, entry in checkpoint.entries_of(path).items():
        digest = hashlib.sha256()
        for chunk in checkpoint.piece_of_entry(entry).chunks():
            digest.update(chunk)
        yield [name, entry.dtype, str(list(entry.shape)), digest.hexdigest()]


def _read(known: Path) -> list[list[str]] | None:
    try:
        match json.loads(known.read_text(encoding="utf-8")):
            case [*tensors] if all(isinstance(each, list) and set(map(type, each)) == {str} for each in tensors):
                return tensors
    except (OSError, ValueError):
        pass
    return None


def _write(known: Path, tensors: list[list[str]]) -> None:
    """Keep it for the next start; a cache that cannot be written is only slower."""
    half_done = known.with_name(f".{known.name}.{os.getpid()}.partial")
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        half_done.write_text(json.dumps(tensors), encoding="utf-8")
        half_done.replace(known)
    except OSError:
        with suppress(OSError):
            half_done.unlink(missing_ok=True)
