"""A desk is a part that decides. It tells members, and puts work on the queue; all else it gives back as effects.

Effects are data from a closed set. The server's work-list hands each to the desk that carries it out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from server_backbone.compute.mishaps import Mishap
from server_backbone.compute.queue import Queue
from server_backbone.deciding.gates import Action
from server_backbone.deciding.rounds import Decision
from server_backbone.door.members import Connection, Member
from server_backbone.engine.work import Ticket, Work
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Message, Resume


@dataclass(frozen=True, slots=True, kw_only=True)
class Lose:
    """Forget a connection and what was under way on it; the member is waited for, or the run goes on without it."""

    connection: Connection
    reason: str
    waits: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """Go on without a client, by the rules of the config, until it comes back."""

    client_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GoesOn:
    """A client goes on with a session: it is this member from now on."""

    connection: Connection
    claim: Resume


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A member's connection is gone: every desk hears of it."""

    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HasLeft:
    """The run goes on without a member: every desk hears of it."""

    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """A client broke a rule: its session ends, and the third time it is kept out."""

    connection: Connection
    rule: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CouldNot:
    """Something could not be done for a client: its session ends, and nobody else's."""

    connection: Connection
    mishap: Mishap


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowsWork:
    """A client has finished something."""

    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluates:
    """A client works between two rounds, or after the last."""

    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedSteps:
    """No step of a client is to be expected in this round."""

    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GivesUp:
    """A client uploads nothing in this round."""

    client_id: str


Effect: TypeAlias = (
    Action
    | Decision
    | Lose
    | Leave
    | GoesOn
    | Lost
    | HasLeft
    | Strike
    | CouldNot
    | ShowsWork
    | Evaluates
    | FinishedSteps
    | GivesUp
)
Effects: TypeAlias = Sequence[Effect]
WorkQueue: TypeAlias = Queue[Work]

NOTHING: Effects = ()


class Desk:
    """A desk that takes nothing; each of ours says what it takes."""

    takes: ClassVar[tuple[type[Message], ...]] = ()
    """Messages of a client's connection."""
    finishes: ClassVar[tuple[type[Work], ...]] = ()
    """Work whose result it waits for."""
    carries: ClassVar[tuple[type[Effect], ...]] = ()
    """Effects that it carries out."""

    def receive(self, connection: Connection, message: Message, now_s: float) -> Effects:
        """Take a legal message; raise `RemoteProtocolError`, and change nothing, if it breaks a rule all the same."""
        raise NotImplementedError

    def done(self, work: Work, result: object, now_s: float) -> Effects:
        """Go on with the result of work."""
        raise NotImplementedError

    def failed(self, work: Work, error: Exception, now_s: float) -> Effects | None:
        """Go on after work that ended with an error; None where that is nobody's fault, and ends the run."""
        return None

    def carry_out(self, effect: Effect, now_s: float) -> Effects:
        """Do what was decided."""
        raise NotImplementedError

    def lost(self, member: Member, now_s: float) -> Effects:
        """Go on after a member's connection is gone."""
        return NOTHING

    def left(self, member: Member, now_s: float) -> Effects:
        """Go on without a member."""
        return NOTHING

    def ticked(self, now_s: float) -> Effects:
        """Look at deadlines; this is asked four times a second."""
        return NOTHING


def refused(member: Member, ticket: Ticket, error: Exception) -> Effects | None:
    """Return what follows for a client whose tensors could not be taken, None for an error that is not about them."""
    if not isinstance(error, Mishap | RemoteProtocolError):
        return None
    member.tickets.discard(ticket)
    connection = member.connection
    if ticket.is_void or connection is None:
        return NOTHING
    if isinstance(error, Mishap):
        return [CouldNot(connection=connection, mishap=error)]
    return [Strike(connection=connection, rule=str(error))]
