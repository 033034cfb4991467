"""What follows from whether clients share the backbone or train a copy each: merging, keeping and saving it."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from server_backbone.compute.blocks_worker import COMMON, BlocksWorker
from server_backbone.compute.copies import owners_in
from server_backbone.merging.merging import Backbones, OwnCopies, Shared
from server_backbone.records.kept import KeptOfAll, KeptOfEach, KeptSnapshots
from splitfl.config.kind import BackboneKind
from splitfl.config.trees import RunConfig


class BackboneParts(Protocol):
    """What the server asks of a kind of backbone."""

    kept: type[KeptSnapshots]

    def merged_from(self, worker: BlocksWorker) -> Backbones:
        """Return what of the backbone a merge takes from each client."""
        ...

    def trained_by(self, state: Mapping[str, Tensor]) -> Sequence[str]:
        """Name those whose trained backbone is saved, by a state of everything, in a run without merges."""
        ...


class OneForAll:
    """All clients train the same."""

    kept: type[KeptSnapshots] = KeptOfAll

    def merged_from(self, worker: BlocksWorker) -> Backbones:
        return Shared()

    def trained_by(self, state: Mapping[str, Tensor]) -> Sequence[str]:
        return (COMMON,)


class CopyForEach:
    """Each client trains a copy."""

    kept: type[KeptSnapshots] = KeptOfEach

    def merged_from(self, worker: BlocksWorker) -> Backbones:
        return OwnCopies(worker)

    def trained_by(self, state: Mapping[str, Tensor]) -> Sequence[str]:
        return owners_in(state)


_PARTS: Mapping[BackboneKind, BackboneParts] = {
    BackboneKind.ONE: OneForAll(),
    BackboneKind.COPIES: CopyForEach(),
}


def backbone_parts(run: RunConfig) -> BackboneParts:
    """Return what a run's kind of backbone is made of here; asked once, when the server is put together."""
    return _PARTS[run.backbone_kind]
