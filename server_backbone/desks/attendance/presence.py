"""Clients that fall silent, break rules, part, or are kept out."""

import logging
from dataclasses import dataclass, field
from typing import ClassVar

from server_backbone.desks.desk import (
    NOTHING,
    CouldNot,
    Desk,
    Effect,
    Effects,
    HasLeft,
    Leave,
    Lose,
    Lost,
    Strike,
    WorkQueue,
)
from server_backbone.door.admission import Admission
from server_backbone.door.mail import Mail
from server_backbone.door.members import Connection, Member, Members
from server_backbone.engine import work
from server_backbone.records.entries import Finished, Left
from splitfl.config.trees import RunConfig
from splitfl.durability.crash import crash_point
from splitfl.protocol import messages
from splitfl.protocol.messages import Farewell, Goodbye, Message, Why
from splitfl.session.limits import Limits
from splitfl.telemetry.measures import totals_of
from splitfl.telemetry.metrics import MetricsLog
from splitfl.telemetry.units import printable
from splitfl.transport.zeromq import Arrived

log = logging.getLogger(__name__)

# What a client says of itself in words is shown up to here.
_MAX_REASON = 200
_CROWDED_EVERY_S = 60.0
# The time that something cannot be done for a client at which it is told what to change.
_LAST_MISHAP = 3


@dataclass(kw_only=True, eq=False)
class Presence(Desk):
    """Who is there, and who is not any more."""

    run: RunConfig
    limits: Limits
    admission: Admission
    members: Members
    queue: WorkQueue
    mail: Mail
    metrics: MetricsLog

    _crowded_due_s: float = field(default=0.0, init=False)

    takes: ClassVar[tuple[type[Message], ...]] = (messages.Leave, Goodbye)
    carries: ClassVar[tuple[type[Effect], ...]] = (Lose, Leave, Strike, CouldNot)

    def receive(self, connection: Connection, message: Message, now_s: float) -> Effects:
        """Let a client go."""
        match message:
            case messages.Leave():
                reason = printable(message.reason, _MAX_REASON)
                return [Lose(connection=connection, reason=reason, waits=message.comes_back)]
            case Goodbye():
                return self._part(connection.member, message)
        return NOTHING

    def carry_out(self, effect: Effect, now_s: float) -> Effects:
        """Go on without a connection, or a member."""
        match effect:
            case Lose():
                return self._lose(effect, now_s)
            case Leave():
                return self._leave(self.members[effect.client_id], effect.reason)
            case Strike():
                connection = effect.connection
                return self.punish(connection.peer, connection.user_id, connection, effect.rule)
            case CouldNot():
                return self._could_not(effect)
        return NOTHING

    def ticked(self, now_s: float) -> Effects:
        """Find who was kept out, cut off, silent, or away for too long."""
        effects: list[Effect] = [*self._check_keys(), *self._check_endless(now_s)]
        for connection in self.members.connections():
            silent_s = now_s - connection.last_heard_s
            if silent_s > self.run.link.heartbeat_timeout:
                effects.append(Lose(connection=connection, reason=f"fell silent for {silent_s:.0f} s"))
        patience_s = self.run.federation.step_timeout
        for member in self.members:
            if member.absent_since_s is not None and now_s - member.absent_since_s > patience_s:
                reason = f"was away for more than step_timeout = {patience_s:g} s"
                effects.append(Leave(client_id=member.client_id, reason=reason))
        return effects

    def punish(self, peer: bytes, user_id: str, connection: Connection | None, rule: str) -> Effects:
        """Tell a peer which rule it broke and end its session; the third time it is kept out."""
        name = connection.member.client_id if connection is not None else self.admission.name_of(user_id)
        rule = printable(rule)
        if name is None:
            log.info("a stranger broke a rule: %s", rule)
            self.mail.refuse(peer, Why.VIOLATION, f"protocol error: {rule}")
            return NOTHING
        strike = self.admission.strike(name, rule)
        if strike.count <= self.limits.strikes:  # a client that is kept out fills no disk
            log.warning("%s broke a rule: %s", name, rule)
            self.metrics.emit("violation", client_id=name, rule=rule[:200], strikes=strike.count)
        self.mail.refuse(peer, strike.code, strike.reason)
        if connection is None:
            return NOTHING
        return [Lose(connection=connection, reason=f"broke a rule: {rule}", waits=not strike.is_last)]

    def lock_out(self, peer: bytes, connection: Connection | None) -> Effects:
        """Send away who has no key that is let in."""
        self.mail.refuse(
            peer,
            Why.REVOKED,
            "the server does not let this client's key in, or no longer: ask the server's operator to run"
            " `splitfl authorize`",
        )
        return [] if connection is None else [Lose(connection=connection, reason="its key was revoked", waits=False)]

    def damaged(self, arrived: Arrived, connection: Connection | None) -> Effects:
        """Have a client whose message arrived damaged come again."""
        self.mail.refuse(arrived.peer, Why.NO_SESSION, "a message arrived damaged: connect anew and resume")
        return NOTHING if connection is None else self.lose(connection, "sent a message that was damaged on its way")

    def lose(self, connection: Connection, reason: str) -> Effects:
        """Go on after a connection that is gone."""
        return [Lose(connection=connection, reason=reason)]

    def _part(self, member: Member, message: Goodbye) -> Effects:
        """Note that a client is done, as often as it says so: the answer may be lost, or the server have ended."""
        if not member.has_parted:
            member.has_parted = True
            self.metrics.emit("client_done", client_id=member.client_id, **totals_of(message.metrics))
            self.queue.put(work.Write(entry=Finished(client_id=member.client_id)))
        crash_point("goodbye-before-farewell")
        self.mail.tell(member, Farewell())
        if member.connection is not None:
            self.members.disconnect(member.connection)
        return [Leave(client_id=member.client_id, reason="done")]

    def _lose(self, effect: Lose, now_s: float) -> Effects:
        member = effect.connection.member
        if not self.members.disconnect(effect.connection):
            return NOTHING
        member.session.disconnected()
        member.drop()
        self.queue.put(work.Discard(client_id=member.client_id))
        lost = Lost(client_id=member.client_id)
        if not effect.waits:
            return [lost, Leave(client_id=member.client_id, reason=effect.reason)]
        member.absent_since_s = now_s
        self.metrics.emit("client_lost", client_id=member.client_id, reason=effect.reason)
        return [lost]

    def _leave(self, member: Member, reason: str) -> Effects:
        if member.is_out:
            return NOTHING
        member.absent_since_s, member.is_out = None, True
        self.metrics.emit("client_left", client_id=member.client_id, reason=reason)
        self.queue.put(work.Write(entry=Left(client_id=member.client_id)))
        return [HasLeft(client_id=member.client_id)]

    def _could_not(self, effect: CouldNot) -> Effects:
        """Tell a client that something could not be done for it; the third time, what to change."""
        member, mishap = effect.connection.member, effect.mishap
        self.members.mishaps[member.client_id] += 1
        count = self.members.mishaps[member.client_id]
        code, then = Why.FAILED, f"time {count}: it is tried again"
        if count >= _LAST_MISHAP and mishap.is_memory:
            code, then = Why.TOO_LARGE, "set client.micro_batch_rows so that a step goes in smaller pieces"
        elif count >= _LAST_MISHAP:
            code, then = Why.OVER, f"{count} times in a row: tell the server's operator"
        log.error("%s: %s", member.client_id, mishap)
        if count <= _LAST_MISHAP:
            self.metrics.emit("failed", client_id=member.client_id, reason=str(mishap), count=count)
        self.mail.refuse(effect.connection.peer, code, f"{mishap}; {then}")
        return [Lose(connection=effect.connection, reason=f"had something that could not be done for it: {mishap}")]

    def _check_keys(self) -> Effects:
        """Act on what `splitfl authorize` and `splitfl revoke` have changed."""
        if not self.admission.refresh():
            return NOTHING
        revoked = [
            connection
            for connection in self.members.connections()
            if not self.admission.belongs(connection.user_id, connection.member.client_id)
        ]
        if revoked:
            self.queue.put(work.TakeSnapshot())  # what they did so far stays, whatever comes
        return [effect for connection in revoked for effect in self.lock_out(connection.peer, connection)]

    def _check_endless(self, now_s: float) -> Effects:
        """Take a connection that was cut off for lost; a client that this happens to again and again has to wait."""
        effects: list[Effect] = []
        for cut in self.mail.cut_off():
            name = self.admission.name_of(cut.user_id)
            if cut.num_connections:
                self._say_crowded(name or "a stranger", cut.num_connections, now_s)
                continue
            reason = f"a message without end: {cut.num_bytes} bytes, more than message_bytes"
            log.warning("cut off %s at %s: %s", name or "a stranger", cut.address, reason)
            self.metrics.emit("cut_off", address=cut.address, client_id=name or "", num_bytes=cut.num_bytes)
            member = self.members.get(name) if name is not None else None
            if name is not None:
                self.admission.cut_off(name, now_s)
            if member is not None and member.connection is not None:
                effects.append(Lose(connection=member.connection, reason=reason))
        return effects

    def _say_crowded(self, name: str, num_connections: int, now_s: float) -> None:
        """Say of a key with too many connections what became of them; one that makes more and more fills no disk."""
        if now_s < self._crowded_due_s:
            return
        self._crowded_due_s = now_s + _CROWDED_EVERY_S
        text = f"{name} has {num_connections} connections open, more than any client needs: the oldest are ended"
        log.warning("%s", text)
        self.metrics.emit("note", text=text)
