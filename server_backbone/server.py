"""The server's loop: one thread that takes what comes, asks the desks what follows, and carries it out.

A training step, as seen here: `Forward` -> gate -> queue -> `ForwardDone`; `Backward` -> queue -> `BackwardDone`;
`Commit` -> gate -> (all members in) -> gradients reduced and recorded -> `Committed` to every member, and the worker's
optimizer step while the members take theirs.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from server_backbone.compute.queue import Done, Queue
from server_backbone.desks.desk import NOTHING, Effect, Effects, HasLeft, Lost
from server_backbone.desks.roster import roster
from server_backbone.door.admission import Admission
from server_backbone.door.mail import Damaged, Illegal, Letter, LockedOut, Mail, Received
from server_backbone.door.members import Connection, Members
from server_backbone.engine.engine import Engine
from server_backbone.engine.work import Work
from server_backbone.kinds import ServerParts
from server_backbone.provisions import Provisions
from splitfl.config.trees import RunConfig
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Fetch, Leave, Message, Ping, Probe, Resume, Shutdown, Why
from splitfl.session.limits import Limits
from splitfl.session.server_session import Reply
from splitfl.session.terms import Terms
from splitfl.stopping import StopRequest
from splitfl.telemetry.history import History
from splitfl.telemetry.metrics import MetricsLog
from splitfl.transport.zeromq import Listener

# How often the loop looks at its deadlines.
_TICK_S = 0.25
# If the loop took longer than this, that was no silence of the clients.
_STALL_S = 1.0
# Bounds on a client's questions ahead of the answers; more is a violation. docs/limits.md has them.
_MAX_JOBS = 64
_ON_EITHER_CONNECTION = (Ping, Leave)
_BEFORE_RESUMED = (Resume, Fetch, Probe)


@dataclass(kw_only=True)
class Server:
    """One run on one socket."""

    run: RunConfig
    kind: ServerParts
    run_id: str
    terms: Terms
    limits: Limits
    listener: Listener
    admission: Admission
    engine: Engine
    provisions: Provisions
    metrics: MetricsLog
    history: History
    stop: StopRequest
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        now_s = self.clock()
        self._members = members = Members()
        self._mail = mail = Mail(self.listener, self.limits, members, self.admission, self.clock)
        self._queue: Queue[Work] = Queue(self.engine.doers, self.engine.publish, mail.wake)
        self._desks = roster(
            run=self.run,
            run_id=self.run_id,
            kind=self.kind,
            terms=self.terms,
            limits=self.limits,
            admission=self.admission,
            engine=self.engine,
            provisions=self.provisions,
            members=members,
            queue=self._queue,
            mail=mail,
            metrics=self.metrics,
            history=self.history,
            now_s=now_s,
        )
        self._takes = {message: desk for desk in self._desks for message in desk.takes}
        self._finishes = {work: desk for desk in self._desks for work in desk.finishes}
        self._carries = {effect: desk for desk in self._desks for effect in desk.carries}
        self._most_jobs = _MAX_JOBS + 8 * self.limits.micro_batches_in_flight
        self._tick_due_s = now_s

    @property
    def reason(self) -> str:
        """Why the run ended before its last round, "" once it has gone through it."""
        return self._desks.endings.reason

    def serve(self) -> None:
        """Run until the last client has said goodbye, or the run is given up (see `reason`).

        Raises `Stopped` when that was asked for, after the work that the compute thread was at.
        """
        try:
            before_s = self.clock()
            while not self._desks.endings.is_over and not self.stop.is_asked:
                received = self._mail.receive(_TICK_S)
                now_s = self.clock()
                self._forgive(now_s - before_s, now_s)
                before_s = now_s
                if received is not None:
                    self._take_in(received, now_s)
                self._go_on(now_s)
                if now_s >= self._tick_due_s:
                    self._tick_due_s = now_s + _TICK_S
                    self._tick(now_s)
        finally:
            self._queue.close(drops=self.stop.is_asked)
        if not self._desks.endings.is_over:
            self._go_on(self.clock())  # clients that wait for the decision hear of it
        if not self._desks.endings.is_over:
            self.stop.check()

    def recover(self) -> None:
        """Go on where the log ends: every client is expected back."""
        now_s = self.clock()
        self._carry_out(self._desks.recover(now_s), now_s)

    def dismiss(self, reason: str) -> None:
        """Tell every client that the run is over."""
        for connection in self._members.connections():
            self._mail.refuse(connection.peer, Why.OVER if self.reason else Why.FINISHED, reason)

    def suspend(self) -> None:
        """Save this moment after an interruption, and tell every client where to resume."""
        try:
            if self._queue.is_quiet:  # else the compute thread may be in the middle of a step
                self._desks.snapshots.say_failed(self.engine.save())
        finally:
            self.say_shutdown()

    def say_shutdown(self) -> None:
        """Tell every client at which step it resumes."""
        members = self.engine.view.state.members
        for connection in self._members.connections():
            known = members.get(connection.member.client_id)
            self._mail.say_last(connection.peer, Shutdown(resume_at=known.step + 1 if known is not None else 1))

    def _forgive(self, stalled_s: float, now_s: float) -> None:
        """After a stall of this loop nobody has been silent: what they have said waits to be read."""
        if stalled_s > _STALL_S:
            for connection in self._members.connections():
                connection.last_heard_s = min(now_s, connection.last_heard_s + stalled_s)

    def _take_in(self, received: Received, now_s: float) -> None:
        self._carry_out(self._hear(received, now_s), now_s)

    def _hear(self, received: Received, now_s: float) -> Effects:
        arrived, connection = received.arrived, received.connection
        match received:
            case Damaged():
                return self._desks.presence.damaged(arrived, connection)
            case LockedOut():
                return self._desks.presence.lock_out(arrived.peer, connection)
            case Illegal(rule=rule):
                return self._desks.presence.punish(arrived.peer, arrived.user_id, connection, rule)
            case Letter(message=message):
                try:
                    if connection is None:
                        return self._desks.arrivals.hear_stranger(arrived, message, now_s)
                    return self._take(connection, message, now_s)
                except RemoteProtocolError as error:
                    return self._desks.presence.punish(arrived.peer, arrived.user_id, connection, str(error))

    def _take(self, connection: Connection, message: Message, now_s: float) -> Effects:
        """Hand a message to its desk if it is legal now."""
        member = connection.member
        if not isinstance(message, _ON_EITHER_CONNECTION):
            if connection.heard_at != connection.peer:
                raise RemoteProtocolError(f"{type(message).__name__} on the control connection")
            if not isinstance(message, _BEFORE_RESUMED):
                if not connection.is_resumed:
                    raise RemoteProtocolError(f"{type(message).__name__} before Resume")
                if self._queue.num_asked_by(member.client_id) >= self._most_jobs:
                    raise RemoteProtocolError(f"more than {self._most_jobs} messages that nothing was waited for after")
                accepted = member.session.receive(message)
                if isinstance(accepted, Reply):
                    self._mail.tell(member, accepted.message)
                if accepted is None or isinstance(accepted, Reply):
                    return NOTHING
                message = accepted
        return self._takes[type(message)].receive(connection, message, now_s)

    def _go_on(self, now_s: float) -> None:
        """Hand over what the compute thread has done, and take note of who was found gone."""
        for done in self._queue.done():
            self._carry_out(self._follow_up(done, now_s), now_s)
        self._meet_gone(now_s)

    def _meet_gone(self, now_s: float) -> None:
        while self._mail.gone:
            connection, reason = self._mail.gone.popleft()
            self._carry_out(self._desks.presence.lose(connection, reason), now_s)

    def _follow_up(self, done: Done[Work], now_s: float) -> Effects:
        desk = self._finishes.get(type(done.work))
        if done.error is None:
            return desk.done(done.work, done.result, now_s) if desk is not None else NOTHING
        effects = desk.failed(done.work, done.error, now_s) if desk is not None else None
        if effects is None:
            raise done.error
        return effects

    def _tick(self, now_s: float) -> None:
        for desk in self._desks:
            self._carry_out(desk.ticked(now_s), now_s)
        self._desks.waiting.say(now_s)

    def _carry_out(self, effects: Iterable[Effect], now_s: float) -> None:
        """Work a list of effects off; what follows from one comes before the next."""
        pending = deque(effects)
        while pending:
            pending.extendleft(reversed(self._follow(pending.popleft(), now_s)))

    def _follow(self, effect: Effect, now_s: float) -> Effects:
        match effect:
            case Lost(client_id=client_id):
                member = self._members[client_id]
                return [each for desk in self._desks for each in desk.lost(member, now_s)]
            case HasLeft(client_id=client_id):
                member = self._members[client_id]
                return [each for desk in self._desks for each in desk.left(member, now_s)]
            case _:
                return self._carries[type(effect)].carry_out(effect, now_s)
