"""What the compute thread does: each piece of work goes to the part that does it, and all are written down first.

One thread calls everything here, in the order of its queue; nothing here knows a socket.
"""

from dataclasses import dataclass

from server_backbone.backbones import BackboneParts
from server_backbone.compute.blocks_worker import BlocksWorker, Used
from server_backbone.compute.queue import Doers
from server_backbone.engine import work
from server_backbone.engine.keeping import Keeping
from server_backbone.engine.merges import Merges
from server_backbone.engine.micro_batches import MicroBatches
from server_backbone.engine.steps import Steps
from server_backbone.engine.work import Work
from server_backbone.kinds import ServerParts
from server_backbone.merging.merging import Merging
from server_backbone.merging.trained_files import TrainedFiles
from server_backbone.records.kept import KeptSnapshots
from server_backbone.records.ledger import Ledger
from server_backbone.records.state import RunState
from splitfl.config.trees import RunConfig
from splitfl.protocol.messages import TensorFrames
from splitfl.protocol.tensors import Tensors
from splitfl.telemetry.history import History


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What other threads may know of the compute thread's work."""

    state: RunState
    used: Used


class Engine:
    """The backbone, its records and its merges."""

    def __init__(
        self,
        run: RunConfig,
        kind: ServerParts,
        backbones: BackboneParts,
        worker: BlocksWorker,
        merging: Merging,
        files: TrainedFiles,
        ledger: Ledger,
        kept: KeptSnapshots,
        history: History,
        tensors: Tensors,
    ) -> None:
        self._kind = kind
        self.worker = worker
        self.ledger = ledger
        self.layers = merging.layers
        self._keeping = Keeping(backbones, worker, merging.layers, files, ledger, kept, history)
        self._micro_batches = MicroBatches(run, kind, worker, tensors)
        self._steps = Steps(worker, ledger, self._keeping, history)
        self._merges = Merges(run, kind, worker, merging, files, ledger, self._keeping, history, tensors)
        self.doers: Doers[Work] = {
            **self._micro_batches.doers(),
            **self._steps.doers(),
            **self._merges.doers(),
            **self._keeping.doers(),
            work.Write: lambda asked: ledger.write(asked.entry),
            work.Settle: lambda _: None,
        }
        self.view = self._look()
        """Any thread may read it; it is of the moment after the last piece of work."""

    def publish(self) -> None:
        """Show other threads where the work is."""
        self.view = self._look()

    # before there is a compute thread, and when it has ended

    def restore(self) -> list[str]:
        """Go on with what the ledger has; return the names of uploads that cannot be read any more."""
        lost = self._merges.restore()
        self.view = self._look()
        return lost

    def describe_layers(self) -> tuple[TensorFrames, ...]:
        """Describe everyone's layers and their controls, as clients get them."""
        return self._merges.describe_layers()

    def save(self) -> str:
        """Save this moment; return why no snapshot could be taken, else ""."""
        note = self._keeping.snapshot()
        if not self._kind.has_merges:
            self._keeping.save_trained()
        return note

    def _look(self) -> View:
        return View(state=self.ledger.state, used=self.worker.used)
