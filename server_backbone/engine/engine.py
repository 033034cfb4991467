"""What the compute thread does: micro-batches, steps, uploads and merges, each written down before anybody hears of it.

One thread calls everything here, in the order of its queue; nothing here knows a socket.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from server_backbone.backbones import backbone_parts
from server_backbone.compute.blocks_worker import (
    COMMON,
    BlocksWorker,
    Contribution,
    MicroBatch,
    Positions,
    ReducedStep,
    Used,
)
from server_backbone.compute.copies import digest_in, weights_in
from server_backbone.compute.mishaps import Mishap, done_for, done_for_all
from server_backbone.deciding.rounds import Merge, Open
from server_backbone.deciding.standing import Standing, value_of
from server_backbone.engine import work
from server_backbone.engine.work import Work
from server_backbone.kinds import ServerParts
from server_backbone.merging.buffered import BufferedMerger
from server_backbone.merging.merger import Merger, Seen, Weighed
from server_backbone.records import entries as log
from server_backbone.records.kept import KeptSnapshots
from server_backbone.records.ledger import Ledger
from server_backbone.records.state import RoundState, RunState
from splitfl.config.trees import RunConfig
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
from splitfl.protocol.roles import Role
from splitfl.protocol.tensors import Tensors, digest_of
from splitfl.telemetry.history import History
from splitfl.telemetry.units import counted

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedLayers:
    """Everyone's layers after a merge."""

    layers: tuple[TensorFrames, ...]
    reason: str
    """Why they are the old ones, "" if they are not."""
    digest: str
    weights: dict[str, float]
    """What each client's layers counted."""
    capped: dict[str, float]
    """What those would have counted who were held to `strategy.max_client_weight`."""
    moved: dict[str, float]
    """How far each client's layers had gone of what `strategy.max_update` allows, from 0 to 1."""
    uploads: list[dict[str, Any]] | None
    """The uploads of a merge that nobody waited for: client_id, weight, staleness."""
    note: str
    """Why no snapshot could be taken, "" if one was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spooled:
    """A client's layers, taken or dropped."""

    name: str
    objection: str = ""
    """Why they are in no merge, "" if they are in the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How good a merge was, beside those before."""

    standing: Standing
    reason: str
    """Why no further round is worth its while, "" if one is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """A step that is written down and will be applied."""

    commit_number: int
    clip_coefficient: float
    durable_step: int
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRounds:
    """Everyone's layers once there is no further round."""

    layers: tuple[TensorFrames, ...]
    note: str
    """Why they are not the best round's where those were asked for, else ""."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The state of the compute thread's work that other threads may read."""

    state: RunState
    used: Used


class Engine:
    """The backbone, its records and its merges."""

    def __init__(
        self,
        run: RunConfig,
        kind: ServerParts,
        worker: BlocksWorker,
        merger: Merger,
        ledger: Ledger,
        kept: KeptSnapshots,
        history: History,
        tensors: Tensors,
    ) -> None:
        self._run = run
        self._kind = kind
        self._history = history
        self._tensors = tensors
        self.worker = worker
        self.merger = merger
        self._parts = backbone_parts(run)
        self._backbones = self._parts.merged_from(worker)
        self._buffer = merger if isinstance(merger, BufferedMerger) else None
        self.ledger = ledger
        self._kept = kept
        self._decided: ReducedStep | None = None
        """Written down, and to be applied next."""
        self.view = self._look()
        """Any thread may read it; it is of the moment after the last piece of work."""

    def do(self, asked: Work) -> Any:
        """Do a piece of work and return what its desk waits for; None where nobody waits."""
        try:
            return self._do(asked)
        finally:
            self.view = self._look()

    def _do(self, asked: Work) -> Any:
        match asked:
            case work.Run(ticket=ticket) | work.Generate(ticket=ticket) if ticket.is_void:
                return None
            case work.Run(message=Backward() as message):
                return self.backward(asked.asked_by, message)
            case work.Run(message=Forward() as message):
                return (self.evaluate if asked.is_evaluation else self.forward)(asked.asked_by, message)
            case work.Generate(message=message, objection=""):
                return self.decode(asked.asked_by, message)
            case work.Generate(message=message, objection=objection):
                return Declined(request_id=message.request_id, reason=objection)
            case work.FreeCache():
                return self.worker.generations.end(asked.client_id, asked.cache_id)
            case work.FreeCaches():
                return self.worker.generations.end(asked.client_id)
            case work.Discard():
                return self.worker.discard(asked.client_id)
            case work.GiveUpStep():
                return self.discarded(asked.client_id, asked.step)
            case work.Decide():
                return self.decide(asked.contributions)
            case work.ApplyStep():
                return self.apply(asked.contributions)
            case work.CloseStep():
                return self.closed(asked.client_id, asked.step, asked.next_step)
            case work.OpenRound():
                return self.opened(asked.round)
            case work.FindFinished():
                return self.last_call()
            case work.MakeMerge():
                return self.merge(asked.merge)
            case work.JudgeMerge():
                return self.judge(asked.round_number)
            case work.EndRounds():
                return self.end_rounds(asked.reason)
            case work.Spool():
                return self.spool(asked.asked_by, asked.upload)
            case work.Announce():
                return self.announced(asked.client_id, asked.num_examples)
            case work.NoteMeasured():
                return self.measured(asked.client_id, asked.round_number, asked.measured)
            case work.KeepSnapshot():
                return self.keep(asked.client_id)
            case work.GoBack():
                return self.go_back(asked.client_id, asked.commit_number)
            case work.TakeSnapshot():
                return self.snapshot()
            case work.FindSnapshotBefore():
                return self.generation_before_the_merge()
            case work.Write():
                return self.ledger.write(asked.entry)
            case work.Settle():
                return None

    def refresh(self) -> None:
        """Show others what was done outside of `do`, before there was a compute thread."""
        self.view = self._look()

    def _look(self) -> View:
        return View(state=self.ledger.state, used=self.worker.used)

    # micro-batches

    def evaluate(self, client_id: str, message: Forward) -> ForwardDone:
        """Run a micro-batch of an evaluation."""
        return self._for(client_id, message.hidden_BSD, partial(self._evaluate, client_id, message))

    def decode(self, client_id: str, message: Decode) -> ForwardDone | Declined:
        """Run new positions of a generation."""
        return self._for(client_id, message.hidden_BSD, partial(self._decode, client_id, message))

    def forward(self, client_id: str, message: Forward) -> ForwardDone:
        """Run a micro-batch forward and keep its graph."""
        return self._for(client_id, message.hidden_BSD, partial(self._forward, client_id, message))

    def backward(self, client_id: str, message: Backward) -> BackwardDone:
        """Run a micro-batch backward and free its graph."""
        return self._for(client_id, message.gradient_BSD, partial(self._backward, client_id, message))

    def _for(self, client_id: str, tensor: TensorFrames, work: Callable[[], T]) -> T:
        """Compute for one client; raise `Mishap`, with all that it had under way freed, where torch could not."""
        rows, length, _ = tensor.shape
        try:
            return done_for(work, f"the server could not compute {rows} x {length} tokens of {client_id}")
        except Mishap:
            self.worker.discard(client_id)
            self.worker.generations.end(client_id)
            raise

    def _evaluate(self, client_id: str, message: Forward) -> ForwardDone:
        hidden_BSD = self.worker.evaluate(client_id, self._micro_batch(message))
        return ForwardDone(request_id=message.request_id, hidden_BSD=self._tensors.pack(Role.HIDDEN, hidden_BSD))

    def _decode(self, client_id: str, message: Decode) -> ForwardDone | Declined:
        self._check_adapters(message)
        positions = Positions(
            hidden_BSD=self._tensors.unpack(Role.NEW_POSITIONS, message.hidden_BSD),
            lengths_B=message.lengths_B,
            beams_B=message.beams_B,
            adapters_off=message.adapters_off,
        )
        try:
            got = self.worker.generations.decode(client_id, message.cache_id, positions)
        except ModelError as error:
            got = str(error)
        if isinstance(got, str):
            return Declined(request_id=message.request_id, reason=got)
        return ForwardDone(request_id=message.request_id, hidden_BSD=self._tensors.pack(Role.NEW_POSITIONS, got))

    def _forward(self, client_id: str, message: Forward) -> ForwardDone:
        crash_point("forward")
        hidden_BSD = self.worker.forward(client_id, self._micro_batch(message))
        return ForwardDone(request_id=message.request_id, hidden_BSD=self._tensors.pack(Role.HIDDEN, hidden_BSD))

    def _micro_batch(self, message: Forward) -> MicroBatch:
        self._check_adapters(message)
        return MicroBatch(
            hidden_BSD=self._tensors.unpack(Role.HIDDEN, message.hidden_BSD),
            layout=_layout(message),
            request_id=message.request_id,
            step=message.step,
            micro_batch=message.micro_batch,
            adapters_off=message.adapters_off,
        )

    def _check_adapters(self, message: Forward | Decode) -> None:
        if message.adapters_off and self._run.backbone_trains and self._run.train.backbone == "full":
            raise RemoteProtocolError("adapters_off where the backbone trains in full: it has no adapters to turn off")

    def _backward(self, client_id: str, message: Backward) -> BackwardDone:
        got = self.worker.backward(
            client_id, message.request_id, self._tensors.unpack(Role.GRADIENT, message.gradient_BSD)
        )
        return BackwardDone(
            request_id=message.request_id,
            gradient_BSD=None if got.gradient_BSD is None else self._tensors.pack(Role.GRADIENT, got.gradient_BSD),
            norms_Q=self._tensors.pack(Role.NORMS, got.norms_Q) if self._kind.tells_norms else None,
        )

    # steps

    def decide(self, contributions: Sequence[Contribution]) -> Decided:
        """Reduce a step's gradients and write its record: from here on the step counts, whatever dies."""
        step = self._reduce(contributions)
        crash_point("commit-before-record")
        number = self.ledger.commit(contributions, step)
        self._decided = step
        crash_point("commit-after-record")
        is_redo = self._run.storage.durability == "redo"
        durable_step = step.step if is_redo else self.ledger.state.durable_step
        return Decided(
            commit_number=number,
            clip_coefficient=step.clip_coefficient,
            durable_step=durable_step,
            learning_rate=step.learning_rate,
        )

    def _reduce(self, contributions: Sequence[Contribution]) -> ReducedStep:
        """Add up a step's gradients; raise `Mishap`, with none of them left, where torch could not."""
        who = ", ".join(each.client_id for each in contributions)
        what = f"the server could not add up the gradients of step {contributions[0].step} of {who}"
        try:
            return done_for(partial(self.worker.reduce, contributions), what)
        except Mishap:
            for each in contributions:
                self.worker.discard(each.client_id)
            raise

    def apply(self, contributions: Sequence[Contribution]) -> str:
        """Apply what was decided; return why no snapshot could be taken if one was due, else ""."""
        step, self._decided = self._decided, None
        if step is None:  # it could not be decided
            return ""
        number = self.ledger.state.commit_number
        done_for_all(partial(self.worker.apply, step), f"the optimizer's step of commit {number} could not be taken")
        crash_point("commit-after-apply")
        state = self.ledger.state
        if self._history.is_on:
            self._history.note(
                "applied",
                commit_number=state.commit_number,
                round=state.round.number if state.round else 0,
                members=[
                    {"client_id": c.client_id, "step": c.step, "num_label_tokens": c.num_label_tokens}
                    for c in contributions
                ],
                digest=self.digest(contributions[0].client_id),
            )
        return self.snapshot() if self.ledger.is_due else ""

    def snapshot(self) -> str:
        """Take a snapshot; a full disk is survived with the log alone, and said."""
        try:
            self.ledger.snapshot()
        except StorageError as error:
            if self._run.storage.durability == "snapshot":
                raise
            return str(error)
        self._history.note("snapshot", commit_number=self.ledger.state.commit_number)
        return ""

    # rounds

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
        self.ledger.write(entry)
        self.worker.begin_round(round_.clients)
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
        self.ledger.write(log.Closed(client_id=client_id, next_step=next_step))
        self._history.note("step_closed", client_id=client_id, step=step, next_step=next_step)

    def last_call(self) -> set[str]:
        """Return whose steps of the open round have come to something, once all that are decided are written."""
        return set(self.ledger.state.round.finished) if self.ledger.state.round is not None else set()

    def restore(self) -> list[str]:
        """Go on with the layers that the ledger has; return whose uploads cannot be read any more."""
        ledger, state = self.ledger, self.ledger.state
        self._stand()
        lost = self.merger.restore(ledger.merged_layers, ledger.strategy_state, state.uploaded)
        for name in lost:
            ledger.write(log.UploadLost(client_id=name))
        return lost

    def spool(self, client_id: str, upload: Upload) -> Spooled:
        """Keep a client's layers for the merge."""
        if self._buffer is not None:
            return self._spool_for(self._buffer, client_id, upload)
        seen = self._seen(client_id, self.ledger.state.round)
        taken = done_for(
            partial(self.merger.spool, client_id, upload, seen), f"the server could not take the layers of {client_id}"
        )
        self.ledger.write(log.Uploaded(client_id=client_id, weight=taken.weight, moved=taken.moved))
        crash_point("upload-after-record")
        return Spooled(name=client_id)

    def announced(self, client_id: str, num_examples: int) -> int:
        """Return the number of examples that a client weighs by: the first that it has announced in this run."""
        known = self.ledger.state.members[client_id]
        if not known.num_examples:
            self.ledger.write(log.Announced(client_id=client_id, num_examples=num_examples))
        return known.num_examples or num_examples

    def _seen(self, client_id: str, round_: RoundState | None) -> Seen:
        """Return what is known of a client's work in a round; where that has closed meanwhile, its upload is late."""
        num_examples = self.ledger.state.members[client_id].num_examples or math.inf
        if round_ is None:
            return Seen(num_examples=num_examples)
        finished = round_.finished.get(client_id, 0)
        return Seen(
            num_examples=num_examples,
            num_tokens=round_.tokens.get(client_id, 0),
            share=finished / round_.num_steps if self._run.federation.partial_work == "accept" else 1.0,
            path=round_.paths.get(client_id, 0.0),
        )

    def _spool_for(self, buffer: BufferedMerger, client_id: str, upload: Upload) -> Spooled:
        """Keep layers with what they began with, or drop them by rule; either way the client's turn is over."""
        turn = self.ledger.state.turns.get(client_id)
        if turn is None:  # they came while the last merge was made
            return Spooled(name="", objection="the run's last merge came first")
        begun, name = turn.number - 1, f"{client_id}@{turn.first_step}"
        objection = self._objection_to(buffer, begun)
        if objection:
            self.ledger.write(log.TurnEnded(client_id=client_id))
        else:
            buffer.begins(name, begun)
            what = f"the server could not take the layers of {client_id}"
            taken = done_for(partial(buffer.spool, name, upload, self._seen(client_id, turn)), what)
            entry = log.Buffered(client_id=client_id, name=name, begun=begun, weight=taken.weight, moved=taken.moved)
            self.ledger.write(entry)
            crash_point("upload-after-record")
        return Spooled(name=name, objection=objection)

    def _objection_to(self, buffer: BufferedMerger, begun: int) -> str:
        staleness, most = self.ledger.state.num_merged - begun, self._run.strategy.max_staleness
        if most and staleness > most:
            return f"begun {counted(staleness, 'merge')} ago, strategy.max_staleness = {most}"
        return "" if buffer.has(begun) else f"the layers of merge {begun}, which it began with, cannot be read any more"

    def _stand(self) -> None:
        if self._buffer is not None:
            state = self.ledger.state
            self._buffer.stand(state.num_merged, {name: upload.begun for name, upload in state.buffer.items()})

    def merge(self, merge: Merge) -> MergedLayers:
        """Fold the uploads (or keep the old layers) and save everything that is trained."""
        uploads = self._retire(self._buffer, merge) if self._buffer is not None else None
        reason = merge.reason or self.merger.objection(merge.uploaded)
        state = self.ledger.state
        weighed = Weighed(used={}, lowered={})
        if not reason:
            rates = state.round.rates if state.round else {}
            fold = partial(
                self.merger.merge, merge.uploaded, self._backbones, rates=rates, num_clients=state.num_clients
            )
            weighed = done_for_all(fold, f"the merge of round {merge.round_number} could not be made")
        weights, moved = weighed.used, self._moved(weighed.used)
        layers, backbone = self.merger.layers(), self.merger.backbone()
        crash_point("merge-before-record")
        entry = log.MergeMade(
            round=merge.round_number,
            accepted=not reason,
            reason=reason,
            weights=weights,
            moved=moved,
            taken=None if uploads is None else list(merge.uploaded),
            closes=uploads is None or merge.closes,
        )
        self.ledger.merged(entry, layers, self.merger.state(), backbone)
        crash_point("merge-after-record")
        self.worker.merged(backbone)
        self._stand()
        self.merger.save(self.trained())
        note = self.snapshot()
        self.merger.forget_uploads(self.ledger.state.buffer)
        if self._buffer is not None and merge.closes:
            self._buffer.retire(())
        digest = digest_of(layers.values())
        self._history.note(
            "merged",
            round=merge.round_number,
            accepted=not reason,
            clients=list(merge.uploaded),
            digest=digest,
        )
        return MergedLayers(
            layers=self.describe_layers(),
            reason=reason,
            digest=digest,
            weights=weights if uploads is None else _summed(uploads, weights),
            capped=weighed.lowered,
            moved=moved,
            uploads=uploads,
            note=note,
        )

    def _moved(self, uploads: Iterable[str]) -> dict[str, float]:
        """Return by client how far the layers of these uploads have gone of what they may."""
        state = self.ledger.state
        moved: dict[str, float] = {}
        for name in uploads:
            buffered = state.buffer.get(name)
            owner = buffered.client_id if buffered is not None else name
            share = buffered.moved if buffered is not None else state.round.moved.get(name, 0.0) if state.round else 0.0
            moved[owner] = max(moved.get(owner, 0.0), share)
        return moved

    def _retire(self, buffer: BufferedMerger, merge: Merge) -> list[dict[str, Any]]:
        """Put aside the layers that this merge replaces, if somebody trains from them; describe its uploads."""
        state, most = self.ledger.state, self._run.strategy.max_staleness
        self._stand()
        begun = set() if merge.closes else {turn.number - 1 for turn in state.turns.values()}
        too_old = state.num_merged + 1 - most if most else 0  # what began before this is going to be dropped
        waiting = {upload.begun for upload in state.buffer.values()}
        buffer.retire(waiting | {number for number in begun if number >= too_old})
        return [
            {
                "name": name,
                "client_id": state.buffer[name].client_id,
                "weight": state.buffer[name].weight,
                "staleness": buffer.staleness_of(name),
            }
            for name in merge.uploaded
        ]

    def generation_before_the_merge(self) -> int | None:
        """Return the newest snapshot from before the merge whose layers are everyone's, None if none is kept."""
        return self.ledger.generation_before(self.ledger.state.folded_round)

    def measured(self, client_id: str, round_number: int, measured: Mapping[str, float]) -> None:
        """Write what a client measured of a merge's layers."""
        self.ledger.write(log.Evaluated(client_id=client_id, round=round_number, measured=dict(measured)))

    def judge(self, round_number: int) -> Verdict:
        """Return what the last merge is beside those before; asked again, the answer is the recorded one."""
        federation = self._run.federation
        if self.ledger.state.standing.judged_round != round_number:
            self._compare(round_number)
        standing = self.ledger.state.standing
        return Verdict(standing=standing, reason=standing.reason_to_stop(federation))

    def _compare(self, round_number: int) -> None:
        """Compare the last merge with those before, and keep it aside first if it is the best so far."""
        federation = self._run.federation
        value = value_of(self.ledger.state.measured, federation)
        standing = self.ledger.state.standing.after(round_number, value, federation)
        keeps = federation.load_best_model_at_end and standing.best_round == round_number
        if keeps:
            self.merger.keep_best(round_number)
        crash_point("judge-before-record")
        self.ledger.write(log.Judged(standing=standing))
        crash_point("judge-after-record")
        if keeps:
            self.merger.forget_other_bests(round_number)

    def end_rounds(self, reason: str) -> EndedRounds:
        """Write that there is no further round, and go back to the best one if that is asked for."""
        state, note = self.ledger.state, ""
        best_round = state.standing.best_round if self._run.federation.load_best_model_at_end else 0
        best = None
        if best_round not in (0, state.num_merged):
            try:
                best = self.merger.best(best_round)
            except ModelError as error:
                best_round, note = 0, f"the best round cannot be gone back to, so the run ends with its last: {error}"
        self.ledger.ended(reason, best_round, best)
        crash_point("end-after-record")
        if best is not None:
            self.merger.end_with(best[0])
            self.worker.merged(best[1])
            self.merger.save(self.trained())
        self.merger.forget_other_bests(0)
        return EndedRounds(layers=self.describe_layers(), note=note)

    def describe_layers(self) -> tuple[TensorFrames, ...]:
        """Describe everyone's layers, the last merge's or the first ones, and their controls."""
        layers = [self._tensors.pack(Role.LAYER, layer) for layer in self.merger.layers().values()]
        return (*layers, *(self._tensors.pack(Role.CONTROL, control) for control in self.merger.controls()))

    def save(self) -> str:
        """Save this moment, when the compute thread has ended; return why no snapshot could be taken, else ""."""
        note = self.snapshot()
        if not self._kind.has_merges:
            self.save_trained()
        return note

    # own-loop clients

    def discarded(self, client_id: str, step: int) -> None:
        """Free a step that its client gives up."""
        self.worker.discard(client_id)
        self._history.note("step_discarded", client_id=client_id, step=step)

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
            if self.ledger.is_due:
                self.snapshot()
        return WentBack(commit_number=commit_number, step=self.ledger.state.members[client_id].step)

    def save_trained(self) -> None:
        """Write what the backbone has learned, in a run without merges, where exporting finds it."""
        for client_id in self._parts.trained_by(self.worker.state()):
            self.merger.save(self.trained(client_id), client_id)

    def trained(self, client_id: str = COMMON) -> dict[str, Tensor]:
        """Return what trains here, by its name in the whole model, the live tensors: of one client, or everybody's."""
        return weights_in(self.worker.state(client_id))

    def digest(self, client_id: str = COMMON) -> str:
        """Return the SHA-256 (hex) over `trained`, in the model's order."""
        return digest_in(self.worker.state(client_id))


def _layout(message: Forward) -> Layout:
    return Layout(lengths_B=message.lengths_B, left_padded=message.left_padded, example_lengths=message.example_lengths)


def _summed(uploads: Sequence[Mapping[str, Any]], weights: Mapping[str, float]) -> dict[str, float]:
    """Add up by client what the uploads of a merge weighed."""
    by_client: dict[str, float] = {}
    for upload in uploads:
        if (weight := weights.get(upload["name"])) is not None:
            by_client[upload["client_id"]] = by_client.get(upload["client_id"], 0) + weight
    return by_client
