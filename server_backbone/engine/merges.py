"""Rounds and merges: opened, spooled, merged, judged and ended, each written down before anybody hears of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from server_backbone.compute.blocks_worker import BlocksWorker
from server_backbone.compute.mishaps import done_for, done_for_all
from server_backbone.compute.queue import Doers
from server_backbone.deciding.rounds import Merge, Open
from server_backbone.deciding.standing import Standing, value_of
from server_backbone.deciding.uploads import by_client
from server_backbone.engine import work
from server_backbone.engine.keeping import Keeping
from server_backbone.engine.work import Work
from server_backbone.kinds import ServerParts
from server_backbone.merging.merging import Merging, Spooled
from server_backbone.merging.trained_files import TrainedFiles
from server_backbone.records import entries as log
from server_backbone.records.ledger import Ledger
from splitfl.config.trees import RunConfig
from splitfl.durability.crash import crash_point
from splitfl.errors import ModelError
from splitfl.protocol.messages import TensorFrames, Upload
from splitfl.protocol.roles import Role
from splitfl.protocol.tensors import Tensors, digest_of
from splitfl.telemetry.history import History


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedLayers:
    """Everyone's layers after a merge."""

    layers: tuple[TensorFrames, ...]
    reason: str
    """Why they are the old ones, "" if they are not."""
    digest: str
    weights: Mapping[str, float]
    """What each client's layers counted."""
    capped: Mapping[str, float]
    """What those would have counted who were held to `strategy.max_client_weight`."""
    moved: Mapping[str, float]
    """How far each client's layers had gone of what `strategy.max_update` allows, from 0 to 1."""
    uploads: Sequence[Mapping[str, Any]] | None
    """The uploads of a merge that nobody waited for: name, client_id, weight, staleness."""
    note: str
    """Why no snapshot could be taken, "" if one was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How good a merge was, beside those before."""

    standing: Standing
    reason: str
    """Why no further round is worth its while, "" if one is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRounds:
    """Everyone's layers once there is no further round."""

    layers: tuple[TensorFrames, ...]
    note: str
    """Why they are not the best round's where those were asked for, else ""."""


class Merges:
    """The run's rounds, whose layers are merged as its kind says."""

    def __init__(
        self,
        run: RunConfig,
        kind: ServerParts,
        worker: BlocksWorker,
        merging: Merging,
        files: TrainedFiles,
        ledger: Ledger,
        keeping: Keeping,
        history: History,
        tensors: Tensors,
    ) -> None:
        self._run = run
        self._kind = kind
        self._worker = worker
        self._merging = merging
        self._files = files
        self._ledger = ledger
        self._keeping = keeping
        self._history = history
        self._tensors = tensors

    def doers(self) -> Doers[Work]:
        """Return who does the work of rounds."""
        return {
            work.OpenRound: lambda asked: self.opened(asked.round),
            work.FindFinished: lambda _: self.finished(),
            work.MakeMerge: lambda asked: self.merge(asked.merge),
            work.JudgeMerge: lambda asked: self.judge(asked.round_number),
            work.EndRounds: lambda asked: self.end(asked.reason),
            work.Spool: lambda asked: self.spool(asked.asked_by, asked.upload),
            work.Announce: lambda asked: self.announced(asked.client_id, asked.num_examples),
            work.NoteMeasured: lambda asked: self.measured(asked.client_id, asked.round_number, asked.measured),
            work.FindSnapshotBefore: lambda _: self.generation_before(),
        }

    def restore(self) -> list[str]:
        """Go on with what the ledger has; return the names of uploads that cannot be read any more.

        A process may have ended between an entry and what follows from it, so that is made up for.
        """
        ledger = self._ledger
        lost = self._merging.restore(ledger.merged_layers, ledger.strategy_state, ledger.state)
        for name in lost:
            ledger.write(log.UploadLost(client_id=name))
        if ledger.state.has_ended:
            self._files.forget_other_bests(0)
        if ledger.state.round is None and ledger.state.num_merged:
            self._keeping.save_merged()
        return lost

    def opened(self, round_: Open) -> None:
        """Write that a round opens."""
        num_steps = self._run.federation.local_steps
        entry = self._kind.begins(
            number=round_.round_number,
            first_step=round_.first_step,
            num_steps=num_steps,
            clients=list(round_.clients),
            trainers=list(round_.trainers),
        )
        self._ledger.write(entry)
        self._worker.begin_round(round_.clients)
        self._history.note(
            "round_opened",
            round=round_.round_number,
            trainers=round_.trainers,
            first_step=round_.first_step,
            num_steps=num_steps,
        )

    def finished(self) -> set[str]:
        """Return whose steps of the open round have come to something, once all that are decided are written."""
        round_ = self._ledger.state.round
        return set(round_.finished) if round_ is not None else set()

    def announced(self, client_id: str, num_examples: int) -> int:
        """Return the number of examples that a client weighs by: the first that it has announced in this run."""
        known = self._ledger.state.members[client_id]
        if not known.num_examples:
            self._ledger.write(log.Announced(client_id=client_id, num_examples=num_examples))
        return known.num_examples or num_examples

    def spool(self, client_id: str, upload: Upload) -> Spooled:
        """Keep a client's layers for a merge, and write what became of them."""
        spool = partial(self._merging.spool, client_id, upload, self._ledger.state)
        spooled = done_for(spool, f"the server could not take the layers of {client_id}")
        if spooled.entry is not None:
            self._ledger.write(spooled.entry)
        if not spooled.objection:
            crash_point("upload-after-record")
        return spooled

    def merge(self, merge: Merge) -> MergedLayers:
        """Fold the uploads (or keep the old layers) and save everything that is trained."""
        self._merging.retire(merge, self._ledger.state)
        fold = partial(self._merging.merge, merge, self._ledger.state)
        made = done_for_all(fold, f"the merge of round {merge.round_number} could not be made")
        entry, layers = made.entry, self._merging.layers
        crash_point("merge-before-record")
        self._ledger.merged(entry, layers.held, layers.state, made.backbone)
        crash_point("merge-after-record")
        self._worker.merged(made.backbone)
        self._keeping.save_merged()
        note = self._keeping.snapshot()
        self._merging.forget(merge, self._ledger.state)
        digest = digest_of(layers.held.values())
        self._history.note(
            "merged",
            round=entry.round,
            accepted=entry.accepted,
            clients=list(merge.uploaded),
            digest=digest,
        )
        return MergedLayers(
            layers=self.describe_layers(),
            reason=entry.reason,
            digest=digest,
            weights=by_client(entry.weights),
            capped=made.lowered,
            moved=entry.moved,
            uploads=self._ledger.state.last_merge.get("uploads"),
            note=note,
        )

    def generation_before(self) -> int | None:
        """Return the newest snapshot from before the merge whose layers are everyone's, None if none is kept."""
        return self._ledger.generation_before(self._ledger.state.folded_round)

    def measured(self, client_id: str, round_number: int, measured: Mapping[str, float]) -> None:
        """Write what a client measured of a merge's layers."""
        self._ledger.write(log.Evaluated(client_id=client_id, round=round_number, measured=dict(measured)))

    def judge(self, round_number: int) -> Verdict:
        """Return what the last merge is beside those before; asked again, the answer is the recorded one."""
        if self._ledger.state.standing.judged_round != round_number:
            self._compare(round_number)
        standing = self._ledger.state.standing
        return Verdict(standing=standing, reason=standing.reason_to_stop(self._run.federation))

    def _compare(self, round_number: int) -> None:
        """Compare the last merge with those before, and keep it aside first if it is the best so far."""
        federation = self._run.federation
        value = value_of(self._ledger.state.measured, federation)
        standing = self._ledger.state.standing.after(round_number, value, federation)
        keeps = federation.load_best_model_at_end and standing.best_round == round_number
        if keeps:
            self._files.keep_best(round_number)
        crash_point("judge-before-record")
        self._ledger.write(log.Judged(standing=standing))
        crash_point("judge-after-record")
        if keeps:
            self._files.forget_other_bests(round_number)

    def end(self, reason: str) -> EndedRounds:
        """Write that there is no further round, and go back to the best one if that is asked for."""
        best_round, best, note = self._best()
        self._ledger.ended(reason, best_round, best)
        crash_point("end-after-record")
        if best is not None:
            self._merging.layers.hold(best[0])
            self._worker.merged(best[1])
            self._keeping.save_merged()
        self._files.forget_other_bests(0)
        return EndedRounds(layers=self.describe_layers(), note=note)

    def _best(self) -> tuple[int, tuple[dict[str, Tensor], dict[str, Tensor]] | None, str]:
        """Return the round that the run is to end with, its tensors if it is not the last, and why not a better."""
        state = self._ledger.state
        best_round = state.standing.best_round if self._run.federation.load_best_model_at_end else 0
        if best_round in (0, state.num_merged):
            return best_round, None, ""
        try:
            return best_round, self._files.best(best_round, list(self._merging.layers.first)), ""
        except ModelError as error:
            return 0, None, f"the best round cannot be gone back to, so the run ends with its last: {error}"

    def describe_layers(self) -> tuple[TensorFrames, ...]:
        """Describe everyone's layers, the last merge's or the first ones, and their controls."""
        layers = self._merging.layers
        held = [self._tensors.pack(Role.LAYER, layer) for layer in layers.held.values()]
        return (*held, *(self._tensors.pack(Role.CONTROL, control) for control in layers.controls()))
