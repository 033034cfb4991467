"""Snapshots that the checkpoints of own-loop clients name, and the warning when one cannot be taken."""

import logging
from dataclasses import dataclass
from typing import ClassVar

from server_backbone.desks.desk import NOTHING, Desk, Effects, WorkQueue
from server_backbone.door.mail import Mail
from server_backbone.door.members import Connection, Member, Members
from server_backbone.engine import work
from server_backbone.engine.engine import Engine
from server_backbone.engine.work import Work
from splitfl.protocol.messages import Declined, GoBack, Keep, Kept, Message, WentBack
from splitfl.telemetry.metrics import MetricsLog
from splitfl.training.backbones import Backbone

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Snapshots(Desk):
    """`Keep` and `GoBack`."""

    backbone: Backbone
    members: Members
    engine: Engine
    queue: WorkQueue
    mail: Mail
    metrics: MetricsLog

    takes: ClassVar[tuple[type[Message], ...]] = (Keep, GoBack)
    finishes: ClassVar[tuple[type[Work], ...]] = (
        work.KeepSnapshot,
        work.GoBack,
        work.ApplyStep,
        work.TakeSnapshot,
    )

    def receive(self, connection: Connection, message: Message, now_s: float) -> Effects:
        """Keep a snapshot, or go back to one, unless that would take something from another client."""
        member = connection.member
        match message:
            case Keep():
                self.queue.put(work.KeepSnapshot(client_id=member.client_id))
            case GoBack():
                others = [other for other in self.members if other is not member and other.session.is_in_step]
                if others and self.backbone.is_shared:
                    names = ", ".join(other.client_id for other in others)
                    reason = f"{names} is in the middle of a step: try again when it has ended"
                    self._answer(member, Declined(request_id=0, reason=reason))
                else:
                    self.queue.put(work.GoBack(client_id=member.client_id, commit_number=message.commit_number))
        return NOTHING

    def done(self, done: Work, result: object, now_s: float) -> Effects:
        """Answer, or say that a snapshot could not be taken."""
        match done, result:
            case work.KeepSnapshot() | work.GoBack(), Kept() | WentBack() | Declined():
                member = self.members[done.client_id]
                if isinstance(result, WentBack):
                    self._went_back(member, result)
                self._answer(member, result)
            case work.ApplyStep() | work.TakeSnapshot(), str():
                self.say_failed(result)
        return NOTHING

    def say_failed(self, note: str) -> None:
        """Say why no snapshot could be taken, if `note` has a reason."""
        if note:
            log.error("no snapshot could be taken: %s", note)
            self.metrics.emit("snapshot_failed", reason=note)

    def _went_back(self, member: Member, result: WentBack) -> None:
        known = self.engine.view.state.members[member.client_id]
        member.session.restore(applied=known.applied, round_=None, next_step=known.next_step, awaits_merge=False)
        member.num_rewinds = 0
        self.metrics.emit("went_back", client_id=member.client_id, commit_number=result.commit_number)

    def _answer(self, member: Member, reply: Kept | WentBack | Declined) -> None:
        member.session.snapshot_answered()
        self.mail.tell(member, reply)
