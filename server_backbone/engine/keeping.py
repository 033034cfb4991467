"""Snapshots: of the run, of a moment that a client's checkpoint names, and of all that is trained for exporting."""

from torch import Tensor

from server_backbone.backbones import BackboneParts
from server_backbone.compute.blocks_worker import COMMON, BlocksWorker
from server_backbone.compute.copies import weights_in
from server_backbone.compute.queue import Doers
from server_backbone.engine import work
from server_backbone.engine.work import Work
from server_backbone.merging.layers import Layers
from server_backbone.merging.trained_files import TrainedFiles
from server_backbone.records.kept import KeptSnapshots
from server_backbone.records.ledger import Ledger
from splitfl.durability.record import Damaged
from splitfl.errors import StorageError
from splitfl.protocol.messages import Declined, Kept, WentBack
from splitfl.telemetry.history import History


class Keeping:
    """What is written of a whole moment."""

    def __init__(
        self,
        backbones: BackboneParts,
        worker: BlocksWorker,
        layers: Layers,
        files: TrainedFiles,
        ledger: Ledger,
        kept: KeptSnapshots,
        history: History,
    ) -> None:
        self._backbones = backbones
        self._worker = worker
        self._layers = layers
        self._files = files
        self._ledger = ledger
        self._kept = kept
        self._history = history

    def doers(self) -> Doers[Work]:
        """Return who does the work of snapshots."""
        return {
            work.TakeSnapshot: lambda _: self.snapshot(),
            work.KeepSnapshot: lambda asked: self.keep(asked.client_id),
            work.GoBack: lambda asked: self.go_back(asked.client_id, asked.commit_number),
        }

    def snapshot(self) -> str:
        """Take a snapshot; a full disk is survived with the log alone, and said."""
        try:
            self._ledger.snapshot()
        except StorageError as error:
            if not self._ledger.keeps_records:
                raise
            return str(error)
        self._history.note("snapshot", commit_number=self._ledger.state.commit_number)
        return ""

    def save_merged(self) -> None:
        """Write everyone's layers, and what all have of the backbone, where exporting finds them."""
        self._files.save(self._layers.held, self._trained(COMMON))

    def save_trained(self) -> None:
        """Write what the backbone has learned, in a run without merges, where exporting finds it."""
        for client_id in self._backbones.trained_by(self._worker.state()):
            self._files.save(self._layers.held, self._trained(client_id), client_id)

    def _trained(self, client_id: str) -> dict[str, Tensor]:
        return weights_in(self._worker.state(client_id))

    def keep(self, client_id: str) -> Kept | Declined:
        """Keep a snapshot of the backbone that a client's checkpoint can name."""
        try:
            return Kept(commit_number=self._kept.keep(client_id))
        except StorageError as error:
            return Declined(request_id=0, reason=f"the server could not keep a snapshot: {error}")

    def go_back(self, client_id: str, commit_number: int) -> WentBack | Declined:
        """Bring the backbone back to a kept snapshot, for a client that nobody else has trained beside since."""
        if not self._kept.is_where(client_id, commit_number):
            try:
                reason = self._kept.objection_to_going_back(client_id, commit_number)
            except Damaged as error:
                reason = str(error)
            if reason:
                return Declined(request_id=0, reason=reason)
            self._kept.go_back(client_id, commit_number)
            self._history.note("went_back", client_id=client_id, commit_number=commit_number)
            if self._ledger.is_due:
                self.snapshot()
        return WentBack(commit_number=commit_number, step=self._ledger.state.members[client_id].step)
