"""What the compute thread does: each piece of work goes to the part that does it, and all are written down first.

One thread calls everything here, in the order of its queue; nothing here knows a socket.
"""

from dataclasses import dataclass
from typing import Any

from server_backbone.backbones import BackboneParts
from server_backbone.compute.blocks_worker import BlocksWorker, Used
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
from splitfl.protocol.messages import Backward, Declined, Forward, TensorFrames
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
        self.view = self._look()
        """Any thread may read it; it is of the moment after the last piece of work."""

    def do(self, asked: Work) -> Any:
        """Do a piece of work and return what its desk waits for; None where nobody waits."""
        try:
            return self._do(asked)
        finally:
            self.view = self._look()

    def _do(self, asked: Work) -> Any:
        micro_batches, steps, merges, keeping = self._micro_batches, self._steps, self._merges, self._keeping
        match asked:
            case work.Run(ticket=ticket) | work.Generate(ticket=ticket) if ticket.is_void:
                return None
            case work.Run(message=Backward() as message):
                return micro_batches.backward(asked.asked_by, message)
            case work.Run(message=Forward() as message) if asked.is_evaluation:
                return micro_batches.evaluate(asked.asked_by, message)
            case work.Run(message=Forward() as message):
                return micro_batches.forward(asked.asked_by, message)
            case work.Generate(message=message, objection=""):
                return micro_batches.decode(asked.asked_by, message)
            case work.Generate(message=message, objection=objection):
                return Declined(request_id=message.request_id, reason=objection)
            case work.FreeCache():
                return self.worker.generations.end(asked.client_id, asked.cache_id)
            case work.FreeCaches():
                return self.worker.generations.end(asked.client_id)
            case work.Discard():
                return self.worker.discard(asked.client_id)
            case work.GiveUpStep():
                return steps.given_up(asked.client_id, asked.step)
            case work.Decide():
                return steps.decide(asked.contributions)
            case work.ApplyStep():
                return steps.apply(asked.contributions)
            case work.CloseStep():
                return steps.closed(asked.client_id, asked.step, asked.next_step)
            case work.OpenRound():
                return merges.opened(asked.round)
            case work.FindFinished():
                return merges.finished()
            case work.MakeMerge():
                return merges.merge(asked.merge)
            case work.JudgeMerge():
                return merges.judge(asked.round_number)
            case work.EndRounds():
                return merges.end(asked.reason)
            case work.Spool():
                return merges.spool(asked.asked_by, asked.upload)
            case work.Announce():
                return merges.announced(asked.client_id, asked.num_examples)
            case work.NoteMeasured():
                return merges.measured(asked.client_id, asked.round_number, asked.measured)
            case work.KeepSnapshot():
                return keeping.keep(asked.client_id)
            case work.GoBack():
                return keeping.go_back(asked.client_id, asked.commit_number)
            case work.TakeSnapshot():
                return keeping.snapshot()
            case work.FindSnapshotBefore():
                return merges.generation_before()
            case work.Write():
                return self.ledger.write(asked.entry)
            case work.Settle():
                return None

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
