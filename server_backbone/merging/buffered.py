"""Merges of uploads that began with different layers (FedBuff): earlier ones are kept while clients train from them."""

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from server_backbone.merging.merger import Merger
from splitfl.errors import ModelError
from splitfl.federation.strategies.fed_buff import Rebased
from splitfl.models import checkpoint
from splitfl.models.checkpoint import TensorFile


class BufferedMerger(Merger):
    """Keeps the layers of earlier merges on disk too: at most as many as clients are at work."""

    _newest = 0
    """The merge whose layers are everyone's."""
    _begun: Mapping[str, int] = {}
    """The merge that each upload's client began with."""

    def stand(self, newest: int, begun: Mapping[str, int]) -> None:
        """Take note of where the run stands; `begun` is the merge that each waiting upload's client began with."""
        self._newest = newest
        self._begun = dict(begun)

    def retire(self, needed: Collection[int]) -> None:
        """Put everyone's layers aside, if they are `needed` after the next merge, and forget the ones that are not."""
        self._versions_dir.mkdir(exist_ok=True)
        if self._newest in needed and self._newest > 0:
            checkpoint.save_tensors(self._version(self._newest), self._layers)
        kept = {self._version(number) for number in needed}
        for path in self._versions_dir.iterdir():
            if path not in kept:
                path.unlink()

    def has(self, number: int) -> bool:
        """Tell whether the layers of a merge are still there."""
        try:
            return list(self._layers_of(number)) == self._names
        except ModelError:
            return False

    def staleness_of(self, upload: str) -> int:
        """Return how many merges there were since this upload's client began."""
        return self._newest - self._begun[upload]

    def begins(self, upload: str, begun: int) -> None:
        """Take note of the merge whose layers a client began with, whose upload has come."""
        self._begun = {**self._begun, upload: begun}

    def _owner(self, upload: str) -> str:
        return upload.partition("@")[0]

    def _begun_with(self, upload: str) -> Mapping[str, Tensor]:
        return self._layers_of(self._begun[upload])

    def _update_of(self, upload: str) -> Mapping[str, Tensor]:
        return Rebased(super()._update_of(upload), self._begun_with(upload), self._layers, self.staleness_of(upload))

    def _is_readable(self, upload: str) -> bool:
        return super()._is_readable(upload) and self.has(self._begun[upload])

    def _layers_of(self, number: int) -> Mapping[str, Tensor]:
        if number == self._newest:
            return self._layers
        return self._first_layers if number == 0 else TensorFile(self._version(number))

    @property
    def _versions_dir(self) -> Path:
        return self._run_dir / "versions"

    def _version(self, number: int) -> Path:
        return self._versions_dir / f"{number}.safetensors"
