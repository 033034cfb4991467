"""Layers of earlier merges on disk, while clients train from them: at most as many as clients are at work."""

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from splitfl.models import checkpoint
from splitfl.models.checkpoint import TensorFile


class Versions:
    """Everyone's layers as they were, by the number of the merge that made them."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "versions"

    def put_aside(self, number: int, layers: Mapping[str, Tensor]) -> None:
        """Keep the layers of a merge."""
        self._folder.mkdir(exist_ok=True)
        checkpoint.save_tensors(self._path(number), layers)

    def keep_only(self, numbers: Collection[int]) -> None:
        """Forget all others."""
        self._folder.mkdir(exist_ok=True)
        kept = {self._path(number) for number in numbers}
        for path in self._folder.iterdir():
            if path not in kept:
                path.unlink()

    def layers_of(self, number: int) -> Mapping[str, Tensor]:
        """Return those of a merge, each read when it is asked for; raise `ModelError` if they cannot be."""
        return TensorFile(self._path(number))

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.safetensors"
