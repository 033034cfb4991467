"""Rounds that close: uploads, last calls, merges, and what members are told of them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from server_backbone.compute.mishaps import Mishap
from server_backbone.deciding.blame import Stage
from server_backbone.deciding.gates import CloseStep, Gate
from server_backbone.deciding.rounds import LastCall, Merge, Release, Rounds
from server_backbone.desks.desk import NOTHING, Desk, Effect, Effects, GivesUp, ShowsWork, WorkQueue, refused
from server_backbone.desks.services.snapshots import Snapshots
from server_backbone.desks.training.endings import Endings
from server_backbone.desks.training.excuses import Excuses
from server_backbone.desks.training.layers import CommonLayers
from server_backbone.door.mail import Mail
from server_backbone.door.members import Connection, Member, Members
from server_backbone.engine import work
from server_backbone.engine.merges import MergedLayers
from server_backbone.engine.work import Work
from server_backbone.merging.merging import Spooled
from splitfl.config.trees import RunConfig
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Merged, Message, Upload
from splitfl.session.server_session import Phase
from splitfl.telemetry.metrics import MetricsLog


@dataclass(kw_only=True, eq=False)
class Merges(Desk):
    """From the first upload of a round to the merge, as `server_backbone.deciding.rounds` decides."""

    run: RunConfig
    members: Members
    gate: Gate
    rounds: Rounds
    excuses: Excuses
    queue: WorkQueue
    mail: Mail
    metrics: MetricsLog
    snapshots: Snapshots
    common: CommonLayers
    endings: Endings
    num_tensors: int
    """In everyone's layers."""

    takes: ClassVar[tuple[type[Message], ...]] = (Upload,)
    finishes: ClassVar[tuple[type[Work], ...]] = (work.FindFinished, work.Spool, work.MakeMerge)
    carries: ClassVar[tuple[type[Effect], ...]] = (LastCall, Merge, Release, GivesUp)

    def receive(self, connection: Connection, message: Message, now_s: float) -> Effects:
        """Take a client's layers."""
        if not isinstance(message, Upload):
            return NOTHING
        self.queue.put(work.Spool(ticket=connection.member.ticket(), upload=message))
        return [ShowsWork(client_id=connection.member.client_id)]

    def carry_out(self, effect: Effect, now_s: float) -> Effects:
        """Close a round, or go on without one client's layers."""
        match effect:
            case LastCall():
                self.gate.round_closed()  # decided steps are acknowledged before anybody is called
                self.queue.put(work.FindFinished(call=effect))
            case Merge():
                if effect.closes:
                    self.gate.round_closed()
                self.queue.put(work.MakeMerge(merge=effect))
            case Release():
                self._release(effect.client_id, "")
            case GivesUp():
                return self.rounds.gave_up(effect.client_id)
        return NOTHING

    def done(self, done: Work, result: object, now_s: float) -> Effects:
        """Go on with what was written down."""
        match done, result:
            case work.FindFinished(), set():
                return self._call_for_layers(done.call, result)
            case work.Spool(), Spooled():
                return self._spooled(done, result)
            case work.MakeMerge(), MergedLayers():
                return self._merged(done.merge, result, now_s)
        return NOTHING

    def failed(self, failed: Work, error: Exception, now_s: float) -> Effects | None:
        """Take an upload back that could not be taken: the client may send another."""
        if not isinstance(failed, work.Spool):
            return None
        member = self.members[failed.ticket.client_id]
        if isinstance(error, RemoteProtocolError | Mishap) and member.session.phase is Phase.MERGING:
            member.session.phase = Phase.TRAINING
        return refused(member, failed.ticket, error)

    def _call_for_layers(self, call: LastCall, able: set[str]) -> Effects:
        """End the round's steps for those still at work; who has finished none has nothing to upload."""
        self.metrics.emit("last_call", round=call.round_number, clients=sorted(able.intersection(call.clients)))
        reason = f"the round closes after {self.run.federation.round_timeout:g} s (federation.round_timeout)"
        effects: list[Effect] = []
        for client_id in call.clients:
            session = self.members[client_id].session
            if client_id not in able:
                effects.append(GivesUp(client_id=client_id))
            elif not session.has_done_its_steps:
                effects.append(CloseStep(client_id=client_id, next_step=session.last_step + 1, reason=reason))
        return effects

    def _spooled(self, done: work.Spool, spooled: Spooled) -> Effects:
        client_id = done.ticket.client_id
        self.members[client_id].tickets.discard(done.ticket)
        if spooled.objection:
            self.metrics.emit("upload_dropped", client_id=client_id, reason=spooled.objection)
            self._release(client_id, spooled.objection)
            return NOTHING
        self.excuses.went_on(client_id, Stage.TRAINING)
        settled = self.excuses.settle()  # before the round closes
        return [*settled, *self.rounds.uploaded(client_id, spooled.name)]

    def _merged(self, merge: Merge, merged: MergedLayers, now_s: float) -> Effects:
        self.common.become(merge.round_number, merged.layers)
        if not merged.reason:
            self.excuses.blame.merged()
        message = Merged(
            round_number=merge.round_number,
            accepted=not merged.reason,
            reason=merged.reason,
            is_last=self.rounds.is_last,
            counted=False,
            layers=self.common.layers,
        )
        self.metrics.emit(
            "merged",
            round=merge.round_number,
            accepted=message.accepted,
            reason=merged.reason,
            clients=merged.weights,
            capped=merged.capped,
            moved=merged.moved,
            absent=merge.absent,
            num_tensors=self.num_tensors,
            digest=merged.digest,
            **({} if merged.uploads is None else {"uploads": merged.uploads}),
        )
        self.snapshots.say_failed(merged.note)
        if merge.closes:
            self._close_round(message, merged.weights)
        return self.rounds.merged(now_s, merged.reason)

    def _close_round(self, message: Merged, weights: Mapping[str, float]) -> None:
        """Tell everybody of the merge that ends their round."""
        self.endings.have_ended = message.is_last
        for member in self.members:
            if member.session.phase in (Phase.TRAINING, Phase.COMMITTING, Phase.MERGING):
                self._end_round(member, replace(message, counted=member.client_id in weights))
            elif message.is_last and member.session.phase is Phase.READY:
                self.endings.say(member)  # it came for a round that there will not be

    def _end_round(self, member: Member, message: Merged) -> None:
        member.session.merged(message)
        member.idle_s = 0.0
        self.members.mishaps.pop(member.client_id, None)
        member.drop(unwanted_only=True)
        self.excuses.forget(member.client_id)
        self.queue.put(work.Discard(client_id=member.client_id))
        self.mail.tell(member, message)

    def _release(self, client_id: str, objection: str) -> None:
        """Give a client that has uploaded the newest layers; it goes on with a round of its own."""
        member = self.members[client_id]
        if member.session.phase is not Phase.MERGING:
            return  # the last merge came first
        message = Merged(
            round_number=self.common.held_round,
            accepted=not objection,
            reason=objection,
            is_last=False,
            counted=False,
            layers=self.common.layers,
        )
        self._end_round(member, message)
