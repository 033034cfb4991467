"""Generations: new positions after a cache, and caches that end."""

from dataclasses import dataclass
from typing import ClassVar

from server_backbone.deciding.caches import CacheBook
from server_backbone.desks.desk import NOTHING, Desk, Effects, WorkQueue, refused
from server_backbone.door.mail import Mail
from server_backbone.door.members import Connection, Member, Members
from server_backbone.engine import work
from server_backbone.engine.work import Work
from splitfl.protocol.messages import Declined, Decode, EndCache, ForwardDone, Message


@dataclass(kw_only=True, eq=False)
class Generations(Desk):
    """Which clients generate with which caches."""

    members: Members
    queue: WorkQueue
    mail: Mail
    caches: CacheBook

    takes: ClassVar[tuple[type[Message], ...]] = (Decode, EndCache)
    finishes: ClassVar[tuple[type[Work], ...]] = (work.Generate,)

    def receive(self, connection: Connection, message: Message, now_s: float) -> Effects:
        """Have new positions computed, or decline; either way it is no violation."""
        member = connection.member
        match message:
            case Decode():
                objection = self.caches.admit(member.client_id, message, now_s)
                self.queue.put(work.Generate(ticket=member.ticket(), message=message, objection=objection))
            case EndCache(cache_id=cache_id) if self.caches.has(member.client_id, cache_id):
                self._end(member.client_id, cache_id)
        return NOTHING

    def done(self, done: Work, result: object, now_s: float) -> Effects:
        """Send the new positions back, or why there are none."""
        if not isinstance(done, work.Generate) or not isinstance(result, ForwardDone | Declined):
            return NOTHING
        member = self.members[done.ticket.client_id]
        if done.ticket.is_void or member.connection is None:
            return NOTHING
        member.tickets.discard(done.ticket)
        if isinstance(result, Declined) and not done.objection:  # by the worker, which has freed the cache
            self.caches.ended(member.client_id, done.message.cache_id)
        member.session.decoded()
        self.mail.send(member.connection, result)
        return NOTHING

    def failed(self, failed: Work, error: Exception, now_s: float) -> Effects | None:
        """End the session of a client whose positions could not be taken."""
        if not isinstance(failed, work.Generate):
            return None
        return refused(self.members[failed.ticket.client_id], failed.ticket, error)

    def lost(self, member: Member, now_s: float) -> Effects:
        """Free a client's caches."""
        return self.left(member, now_s)

    def left(self, member: Member, now_s: float) -> Effects:
        """Free a client's caches."""
        self.caches.forget(member.client_id)
        self.queue.put(work.FreeCaches(client_id=member.client_id))
        return NOTHING

    def ticked(self, now_s: float) -> Effects:
        """Free caches that nothing was asked of for too long."""
        for client_id, cache_id in self.caches.expired(now_s):
            self._end(client_id, cache_id)
        return NOTHING

    def _end(self, client_id: str, cache_id: int) -> None:
        self.caches.ended(client_id, cache_id)
        self.queue.put(work.FreeCache(client_id=client_id, cache_id=cache_id))
