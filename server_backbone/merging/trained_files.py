"""Files of all that is trained: of the last moment, which exporting reads, and of the best round so far."""

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from splitfl.models import checkpoint
from splitfl.models.checkpoint import TensorFile
from splitfl.models.export import trained_file

_BEST_FILES = "best-*.safetensors"


class TrainedFiles:
    """What a run's folder has of its trained tensors."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def save(self, layers: Mapping[str, Tensor], backbone: Mapping[str, Tensor], client_id: str = "") -> None:
        """Write all that is trained, both sides of one moment in one file, which replaces the last one whole.

        With a client's name it is that client's alone.
        """
        checkpoint.save_tensors(self._run_dir / trained_file(client_id), {**layers, **backbone})

    def keep_best(self, round_number: int) -> None:
        """Keep what `save` has written last beside what it will write, as the best round's; the copy appears whole."""
        saved = TensorFile(self._run_dir / trained_file())
        pieces = {name: checkpoint.piece_of_entry(entry) for name, entry in saved.entries.items()}
        checkpoint.write(self._best(round_number), pieces, mode=0o600)

    def forget_other_bests(self, round_number: int) -> None:
        """Remove what `keep_best` has kept of any other round than this."""
        for path in self._run_dir.glob(_BEST_FILES):
            if path != self._best(round_number):
                path.unlink(missing_ok=True)

    def best(self, round_number: int, names: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what `keep_best` has kept: the layers of these names, and the backbone.

        Raises `ModelError` if that cannot be read.
        """
        kept = TensorFile(self._best(round_number))
        layers = {name: kept[name] for name in names}
        return layers, {name: kept[name] for name in kept if name not in layers}

    def _best(self, round_number: int) -> Path:
        return self._run_dir / _BEST_FILES.replace("*", f"{round_number:05d}")
