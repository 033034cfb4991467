"""Where a model's files come from: a directory, a GGUF file that is converted once, or the hub, file by file."""

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from splitfl.errors import ModelError
from splitfl.models.rewrite import rewrite

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
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A model's directory; one of the hub's is filled file by file, as files are asked for."""

    directory: Path
    hub_id: str = ""

    def file(self, name: str) -> Path:
        """Return one of the model's files, downloaded if need be; raise `ModelError` where it is not to be had."""
        path = self.directory / name
        if path.exists():
            return path
        if not self.hub_id:
            raise ModelError(f"{self.directory}: lacks {name}; save the model with save_pretrained to get it")
        from huggingface_hub import hf_hub_download

        # the cache names a snapshot's folder by its commit, so the file is of the same revision as the others
        return _from_hub(self.hub_id, lambda: hf_hub_download(self.hub_id, name, revision=self.directory.name))


def locate(model_name_or_path: str, cache_dir: Path) -> Origin:
    """Find a model: a directory, a .gguf file (converted into the cache, once), or a hub id (only described so far)."""
    path = Path(model_name_or_path).expanduser()
    if path.is_dir():
        gguf_file = _gguf_file_in(path)
        return Origin(directory=_converted(gguf_file, cache_dir) if gguf_file else path)
    if path.suffix == ".gguf" and path.is_file():
        return Origin(directory=_converted(path, cache_dir))
    if path.exists():
        raise ModelError(f"{path} is a file: model_name_or_path names a directory, a .gguf file or a hub id")
    if not is_hub_id(model_name_or_path):
        raise ModelError(f"{model_name_or_path}: no such directory (and not a hub id, which is written OWNER/NAME)")
    from huggingface_hub import snapshot_download

    described = [*DESCRIPTION_FILES, INDEX_FILE]
    directory = _from_hub(model_name_or_path, lambda: snapshot_download(model_name_or_path, allow_patterns=described))
    return Origin(directory=directory, hub_id=model_name_or_path)


def is_hub_id(model_name_or_path: str) -> bool:
    """Tell a name on the hub from a path: OWNER/NAME, where nothing of that name is on this machine."""
    has_form = model_name_or_path.count("/") == 1 and not model_name_or_path.startswith((".", "/", "~"))
    return has_form and not Path(model_name_or_path).exists()


def _from_hub(hub_id: str, download: Callable[[], str]) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(download())
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{hub_id}: no such directory, and not to be had from the hub: {reason}") from None


def _gguf_file_in(directory: Path) -> Path | None:
    """Return the GGUF file of a directory that has no safetensors; raise `ModelError` where there are several."""
    found = sorted(directory.glob("*.gguf"))
    if not found or any(directory.glob("*.safetensors")):
        return None
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ModelError(f"{directory} holds {len(found)} GGUF files: let model_name_or_path name one of {names}")
    return found[0]


def _converted(gguf_file: Path, cache_dir: Path) -> Path:
    """Return a directory with a GGUF file's model as safetensors, converted if this has not been done before."""
    stat = gguf_file.stat()
    marks = f"{gguf_file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    directory = cache_dir / "converted" / f"{gguf_file.stem}-{hashlib.sha256(marks.encode()).hexdigest()[:16]}"
    if not (directory / SINGLE_FILE).is_file():
        if importlib.util.find_spec("gguf") is None:
            raise ModelError(f"{gguf_file}: reading GGUF needs the package gguf: pip install 'splitfl[gguf]'")
        rewrite(gguf_file.parent, directory, gguf_file=gguf_file.name)
    return directory
