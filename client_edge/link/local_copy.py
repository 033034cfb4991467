"""The client's layers from a copy of the model that this machine has, or may have from the hub.

Only bytes count: what differs from the server's file in one bit is not used.
"""

import os
from pathlib import Path

from splitfl.errors import ConfigError, ModelError
from splitfl.models.cut import Cut
from splitfl.models.origin import locate
from splitfl.models.source import lacking, weights_in, write_part


def take_from_local_copy(model_name_or_path: str, cut: Cut, path: Path, *, cache_dir: Path) -> str:
    """Write the client's tensors to `path`, named by the SHA-256 (hex) wanted, if the copy has them bit for bit.

    Returns what to tell. Of a copy on the hub only the files with the client's tensors are downloaded. Raises
    `ModelError` when there is no such copy.
    """
    if path.exists():
        return "the layers are here from an earlier run"
    weights = weights_in(locate(model_name_or_path, cache_dir), cut, seed=0)
    if missing := lacking(weights, cut, "client"):
        return f"{model_name_or_path} stores {missing[0]} otherwise than it is computed: the server sends the layers"
    own = path.with_name(f".{path.name}.{os.getpid()}.own")
    try:
        if write_part(own, cut, "client", weights) != path.name:
            return f"{model_name_or_path} is not, bit for bit, what the server trains: the server sends the layers"
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)
    return f"the layers are {model_name_or_path}'s own, bit for bit: the server sends none"


def digest_of_local_copy(model_name_or_path: str, cut: Cut, *, cache_dir: Path) -> str:
    """Return the SHA-256 (hex) that the client's part of this machine's copy has, as the server would write it."""
    if not model_name_or_path:
        raise ConfigError(
            'policy.known_weights = "own" compares with your own copy of the model: name it in'
            " client.model_name_or_path"
        )
    weights = weights_in(locate(model_name_or_path, cache_dir), cut, seed=0)
    if missing := lacking(weights, cut, "client"):
        raise ModelError(
            f"{model_name_or_path} stores {missing[0]} otherwise than it is computed, so it cannot be compared: set"
            " policy.known_weights to a hash"
        )
    compared = cache_dir / f".{os.getpid()}.compared"
    try:
        return write_part(compared, cut, "client", weights)
    finally:
        compared.unlink(missing_ok=True)
