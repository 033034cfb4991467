"""What the compute thread does: micro-batches, steps, uploads and merges, each written down before anybody hears of it.

One thread calls everything here, in the order of its queue (`Jobs`); nothing here knows a socket.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from server_backbone.ledger import Ledger
from server_backbone.merger import Merger
from server_backbone.rounds import Merge, Open
from server_backbone.worker import Contribution, Worker
from splitfl.config import RunConfig
from splitfl.durability.crash import crash_point
from splitfl.durability.record import Damaged
from splitfl.errors import ModelError, RemoteProtocolError, StorageError
from splitfl.models.layout import Layout
from splitfl.protocol.messages import (
    Backward,
    BackwardDone,
    Declined,
    Decode,
    Forward,
    ForwardDone,
    Kept,
    TensorFrames,
    Upload,
    WentBack,
)
from splitfl.protocol.tensors import describe, digest_of, realise
from splitfl.telemetry.history import History


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedLayers:
    """Everyone's layers after a merge."""

    layers: tuple[TensorFrames, ...]
    reason: str
    """Why they are the old ones, "" if they are not."""
    digest: str
    weights: dict[str, float]
    note: str
    """Why no snapshot could be taken, "" if one was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """A step that is written down and will be applied."""

    commit_number: int
    clip_coefficient: float
    durable_step: int


class Engine:
    """The backbone, its records and its merges."""

    def __init__(self, run: RunConfig, worker: Worker, merger: Merger, ledger: Ledger, history: History) -> None:
        self._run = run
        self._history = history
        self._realise = partial(realise, max_rms=run.link.max_rms)
        self.worker = worker
        self.merger = merger
        self.ledger = ledger

    # micro-batches

    def evaluate(self, message: Forward) -> ForwardDone:
        """Run a micro-batch of an evaluation."""
        self._check_adapters(message)
        hidden_BSD = self.worker.evaluate(
            self._realise(message.hidden_BSD),
            _layout(message),
            adapters_off=message.adapters_off,
        )
        return ForwardDone(request_id=message.request_id, hidden_BSD=self._describe(hidden_BSD))

    def decode(self, client_id: str, message: Decode) -> ForwardDone | Declined:
        """Run new positions of a generation."""
        self._check_adapters(message)
        try:
            got = self.worker.decode(
                client_id,
                message.cache_id,
                self._realise(message.hidden_BSD),
                message.lengths_B,
                message.beams_B,
                adapters_off=message.adapters_off,
            )
        except ModelError as error:
            got = str(error)
        if isinstance(got, str):
            return Declined(request_id=message.request_id, reason=got)
        return ForwardDone(request_id=message.request_id, hidden_BSD=self._describe(got))

    def forward(self, client_id: str, message: Forward) -> ForwardDone:
        """Run a micro-batch forward and keep its graph."""
        self._check_adapters(message)
        hidden_BSD = self.worker.forward(
            client_id,
            message.request_id,
            self._realise(message.hidden_BSD),
            _layout(message),
            step=message.step,
            micro_batch=message.micro_batch,
            adapters_off=message.adapters_off,
        )
        return ForwardDone(request_id=message.request_id, hidden_BSD=self._describe(hidden_BSD))

    def _check_adapters(self, message: Forward | Decode) -> None:
        if message.adapters_off and self._run.backbone_trains and self._run.train.backbone == "full":
            raise RemoteProtocolError("adapters_off where the backbone trains in full: it has no adapters to turn off")

    def backward(self, client_id: str, message: Backward) -> BackwardDone:
        """Run a micro-batch backward and free its graph."""
        gradient_BSD = self.worker.backward(client_id, message.request_id, self._realise(message.gradient_BSD))
        return BackwardDone(
            request_id=message.request_id,
            gradient_BSD=None if gradient_BSD is None else self._describe(gradient_BSD),
            norms_Q=self._describe(self.worker.norms(client_id)) if self._run.has_own_loops else None,
        )

    # steps

    def decide(self, contributions: Sequence[Contribution]) -> Decided:
        """Reduce a step's gradients and write its record: from here on the step counts, whatever dies."""
        clip_coefficient, gradients = self.worker.reduce(contributions)
        crash_point("commit-before-record")
        try:
            number = self.ledger.commit(contributions, clip_coefficient, gradients)
        except StorageError:
            self.worker.withdraw()
            raise
        crash_point("commit-after-record")
        is_redo = self._run.storage.durability == "redo"
        durable_step = contributions[0].step if is_redo else self.ledger.state.durable_step
        return Decided(commit_number=number, clip_coefficient=clip_coefficient, durable_step=durable_step)

    def apply(self, contributions: Sequence[Contribution]) -> str:
        """Apply what was decided; return why no snapshot could be taken if one was due, else ""."""
        if not self.worker.apply():
            return ""
        crash_point("commit-after-apply")
        state = self.ledger.state
        if self._history.is_on:
            self._history.note(
                "applied",
                commit_number=state.commit_number,
                round=state.round.number if state.round else 0,
                members=[
                    {"client_id": c.slot, "step": c.step, "num_label_tokens": c.num_label_tokens} for c in contributions
                ],
                digest=self.worker.digest(),
            )
        return self.snapshot() if self.ledger.is_due else ""

    def snapshot(self) -> str:
        """Take a snapshot; a full disk is survived with the log alone, and said."""
        try:
            self.ledger.snapshot(self.worker)
        except StorageError as error:
            if self._run.storage.durability == "snapshot":
                raise
            return str(error)
        self._history.note("snapshot", commit_number=self.ledger.state.commit_number)
        return ""

    # rounds

    def opened(self, round_: Open, num_steps: int) -> None:
        """Write that a round opens."""
        self.ledger.opened(
            number=round_.round_number,
            first_step=round_.first_step,
            num_steps=num_steps,
            clients=list(round_.clients),
            trainers=list(round_.trainers),
        )
        self._history.note(
            "round_opened",
            round=round_.round_number,
            trainers=round_.trainers,
            first_step=round_.first_step,
            num_steps=num_steps,
        )

    def closed(self, client_id: str, step: int, next_step: int) -> None:
        """Free a step that went on without its client, and write that it did."""
        self.worker.discard(client_id)
        self.ledger.note("closed", client_id=client_id, next_step=next_step)
        self._history.note("step_closed", client_id=client_id, step=step, next_step=next_step)

    def spool(self, client_id: str, upload: Upload) -> None:
        """Keep a client's layers for the merge."""
        weight = self.merger.spool(client_id, upload)
        self.ledger.uploaded(client_id, weight)
        crash_point("upload-after-record")

    def merge(self, merge: Merge) -> MergedLayers:
        """Fold the uploads (or keep the old layers) and save everything that is trained."""
        reason = merge.reason or self.merger.objection(merge.uploaded)
        weights = {} if reason else self.merger.merge(merge.uploaded)
        layers = self.merger.layers()
        crash_point("merge-before-record")
        self.ledger.merged(
            layers,
            self.merger.state(),
            round=merge.round_number,
            accepted=not reason,
            reason=reason,
            weights=weights,
        )
        crash_point("merge-after-record")
        self.merger.save(self.worker.trained())
        note = self.snapshot()
        self.merger.forget_uploads()
        digest = digest_of(layers.values())
        self._history.note(
            "merged",
            round=merge.round_number,
            accepted=not reason,
            clients=list(merge.uploaded),
            digest=digest,
        )
        return MergedLayers(layers=self.describe_layers(), reason=reason, digest=digest, weights=weights, note=note)

    def describe_layers(self) -> tuple[TensorFrames, ...]:
        """Describe everyone's layers: those of the last merge, or what every client starts with."""
        return tuple(self._describe(layer) for layer in self.merger.layers().values())

    # loops of clients' own

    def discarded(self, client_id: str, step: int) -> None:
        """Free a step that its client gives up."""
        self.worker.discard(client_id)
        self._history.note("step_discarded", client_id=client_id, step=step)

    def keep(self) -> Kept | Declined:
        """Keep a snapshot of the backbone that a client's checkpoint can name."""
        try:
            return Kept(commit_number=self.ledger.keep(self.worker, self._run.storage.keep_named))
        except StorageError as error:
            return Declined(request_id=0, reason=f"the server could not keep a snapshot: {error}")

    def go_back(self, client_id: str, commit_number: int) -> WentBack | Declined:
        """Bring the backbone back to a kept snapshot, for a client that nobody else has trained beside since."""
        if not self.ledger.is_where(client_id, commit_number):
            try:
                reason = self.ledger.objection_to_going_back(client_id, commit_number)
            except Damaged as error:
                reason = str(error)
            if reason:
                return Declined(request_id=0, reason=reason)
            self.ledger.go_back(client_id, commit_number, self.worker)
            self._history.note("went_back", client_id=client_id, commit_number=commit_number)
        return WentBack(commit_number=commit_number, step=self.ledger.state.members[client_id].step)

    def save_trained(self) -> None:
        """Write what the backbone has learned, in a run without merges, where exporting finds it."""
        self.merger.save(self.worker.trained())

    def _describe(self, tensor: Tensor) -> TensorFrames:
        return describe(tensor, self._run.link.frame_bytes)


def _layout(message: Forward) -> Layout:
    return Layout(lengths_B=message.lengths_B, left_padded=message.left_padded, example_lengths=message.example_lengths)
