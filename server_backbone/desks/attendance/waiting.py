"""Who is waited for: clients that sit out until they show work, and the sentence that says what the run waits for."""

from dataclasses import dataclass
from typing import ClassVar

from server_backbone.deciding.gates import Gate, SitOut, TakeBack
from server_backbone.deciding.rounds import Rounds
from server_backbone.desks.desk import NOTHING, Desk, Effect, Effects, Evaluates, ShowsWork
from server_backbone.door.mail import Mail
from server_backbone.door.members import Connection, Member, Members
from splitfl.config.trees import RunConfig
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Message, Ping, Pong
from splitfl.session.limits import Limits
from splitfl.telemetry.metrics import MetricsLog

# A wait is worth a line when it has lasted a while, and again from time to time.
_WAITING_AFTER_S = 1.0
_WAITING_EVERY_S = 10.0
_MAX_PINGS = 64
# Characters of a list of names in a Pong.
_MAX_WAITING = 1000
# A clock that stood still, with this process or its machine, is nobody's idleness.
_MAX_PASSED_S = 1.0
_MAX_SAT_OUT = 2


@dataclass(kw_only=True, eq=False)
class Waiting(Desk):
    """Nobody waits for ever for a client that is there and shows nothing."""

    run: RunConfig
    limits: Limits
    members: Members
    gate: Gate
    rounds: Rounds
    mail: Mail
    metrics: MetricsLog
    now_s: float

    takes: ClassVar[tuple[type[Message], ...]] = (Ping,)
    carries: ClassVar[tuple[type[Effect], ...]] = (SitOut, TakeBack, ShowsWork, Evaluates)

    def __post_init__(self) -> None:
        self._ticked_s = self.now_s
        self._said = ("", 0.0)

    def receive(self, connection: Connection, message: Message, now_s: float) -> Effects:
        """Answer a heartbeat with what is waited for, on the way that it came."""
        if isinstance(message, Ping):
            self._check_rate_of_pings(connection, now_s)
            pong = Pong(
                number=message.number,
                waiting_for=self.waiting_for()[:_MAX_WAITING],
                bytes_sent=connection.data_sent,
                bytes_received=connection.data_received,
            )
            self.mail.send(connection, pong, connection.heard_at)
        return NOTHING

    def carry_out(self, effect: Effect, now_s: float) -> Effects:
        """Wait for a client no longer, or again."""
        match effect:
            case SitOut():
                return self._sit_out(self.members[effect.client_id], effect.reason)
            case TakeBack():
                self._wait_again(self.members[effect.client_id])
            case ShowsWork():
                self._shows_work(self.members[effect.client_id])
            case Evaluates():
                self._evaluates(self.members[effect.client_id])
        return NOTHING

    def ticked(self, now_s: float) -> Effects:
        """Find who is there, owes the others something, and has shown nothing for too long."""
        passed_s, self._ticked_s = min(_MAX_PASSED_S, now_s - self._ticked_s), now_s
        federation, link = self.run.federation, self.run.link
        patience_s = federation.max_missed_steps * federation.step_timeout
        patience_s += self.limits.message_bytes / link.slowest_link_bytes_per_second  # it may be sending
        effects: list[Effect] = []
        for member in self.members:
            if member.connection is None or not member.session.is_its_turn:
                continue
            member.idle_s += passed_s
            if member.idle_s > patience_s and not member.sits_out and self.rounds.waits_for(member.client_id):
                reason = f"has shown nothing for {patience_s:.0f} s, and sits out until it does"
                effects.append(SitOut(client_id=member.client_id, reason=reason))
        return effects

    def say(self, now_s: float) -> None:
        """Say what is waited for, once that has lasted a while."""
        text, (last, due_s) = self.waiting_for(), self._said
        if text != last:
            self._said = (text, now_s + _WAITING_AFTER_S)
        elif text and now_s >= due_s:
            self.metrics.emit("waiting", text=text)
            self._said = (text, now_s + _WAITING_EVERY_S)

    def waiting_for(self) -> str:
        """Name what the run waits for, "" for nothing."""
        absent = [member.client_id for member in self.members if member.absent_since_s is not None]
        slow = self.gate.waiting_for()
        text = f"the step of {', '.join(slow)}" if slow else self.rounds.waiting_for()
        return f"{text} (absent: {', '.join(absent)})" if text and absent else text

    def _check_rate_of_pings(self, connection: Connection, now_s: float) -> None:
        """Raise for more pings than an honest client has had time for, however long they were on their way."""
        connection.num_pings += 1
        beats = (now_s - connection.begun_s) / self.run.link.heartbeat_interval
        if connection.num_pings > _MAX_PINGS + 4 * beats:
            raise RemoteProtocolError(
                f"{connection.num_pings} pings in {now_s - connection.begun_s:.0f} s, where one every"
                f" link.heartbeat_interval = {self.run.link.heartbeat_interval:g} s is asked for"
            )

    def _sit_out(self, member: Member, reason: str) -> Effects:
        if member.sits_out:
            return NOTHING
        member.sits_out = True
        member.num_sat_out += 1
        self.metrics.emit("sits_out", client_id=member.client_id, reason=reason)
        return self.rounds.sits_out(member.client_id)

    def _shows_work(self, member: Member) -> None:
        """Take note of something finished; one that sat out twice in a round is not waited for before the next."""
        member.idle_s = 0.0
        if member.sits_out and member.num_sat_out < _MAX_SAT_OUT and not self.gate.sits_out(member.client_id):
            self._wait_again(member)

    def _evaluates(self, member: Member) -> None:
        """Take note of work for which the run's end waits."""
        member.idle_s = 0.0
        if self.rounds.is_parting:
            self.rounds.comes_back(member.client_id)  # it may have been late for a round
            self._wait_again(member)

    def _wait_again(self, member: Member) -> None:
        member.idle_s = 0.0
        if not member.sits_out:
            return
        member.sits_out = False
        self.metrics.emit("taken_back", client_id=member.client_id)
        self.rounds.comes_back(member.client_id)
