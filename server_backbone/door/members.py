"""Who is there: a member is a client of the run, connected or not; a connection is one session's two sockets of it."""

import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from server_backbone.engine.work import Ticket
from splitfl.session.server_session import ServerSession


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """One client of the run; it outlives its connections."""

    client_id: str
    session: ServerSession
    connection: "Connection | None" = None
    sent: int = 0
    received: int = 0
    """Bytes to and from it since this process began, framing included."""
    num_examples: int = 0
    held_round: int = 0
    """Number of the merge whose layers it holds, -1 when it must get them anew."""
    absent_since_s: float | None = None
    """When its connection was lost, while it is waited for."""
    is_out: bool = False
    """Whether the run goes on without it until it comes back."""
    sits_out: bool = False
    """Whether it is there, shows nothing, and nobody waits for it until it does."""
    idle_s: float = 0.0
    """How long what comes next has been its own to do, since it last showed work."""
    num_sat_out: int = 0
    """How often it has sat out in this round."""
    has_parted: bool = False
    """Whether it has said goodbye, and nothing else since."""
    num_rewinds: int = 0
    """How often it was told to go back, which this process has had no reason for but once."""
    num_ends_told: int = 0
    """How often it was told that there is no further round."""
    tickets: set[Ticket] = field(default_factory=set)
    """Of the answers that it waits for."""

    def ticket(self, request_id: int = 0) -> Ticket:
        """Have this client wait for an answer."""
        ticket = Ticket(client_id=self.client_id, request_id=request_id)
        self.tickets.add(ticket)
        return ticket

    def drop(self, *, unwanted_only: bool = False) -> None:
        """Wait for no answer any more, or only for those micro-batches that the session still awaits."""
        dropped = {
            ticket
            for ticket in self.tickets
            if not unwanted_only or (ticket.request_id and not self.session.awaits(ticket.request_id))
        }
        for ticket in dropped:
            ticket.is_void = True
        self.tickets -= dropped


@dataclass(slots=True, kw_only=True, eq=False)
class Connection:
    """One session: a data connection, and a control connection once it is attached."""

    member: Member
    peer: bytes
    user_id: str
    """The key it authenticated with, "" without keys."""
    token: str
    number: int
    """Rises with every welcome: of two sessions of one client the higher wins."""
    last_heard_s: float
    heard_at: bytes = b""
    """The peer, of the two, that its last message came from."""
    control_peer: bytes | None = None
    is_resumed: bool = False
    data_sent: int = 0
    data_received: int = 0
    """Payload bytes of whole messages on the data connection."""
    is_resuming: bool = False
    """Whether a `Resume` waits for its answer."""
    is_gone: bool = False
    """Whether it was found closed when something was sent on it."""
    num_pings: int = 0
    num_fetches: int = 0
    num_probes: int = 0
    begun_s: float = 0.0


class Members:
    """All members and connections, by the names they are looked up by."""

    def __init__(self) -> None:
        self.mishaps: Counter[str] = Counter()
        """How often in a row something could not be done for a client, by name: it may fail before it is a member."""
        self._members: dict[str, Member] = {}
        self._by_peer: dict[bytes, Connection] = {}
        self._by_token: dict[str, Connection] = {}
        self._last_number = 0

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, client_id: str) -> Member:
        return self._members[client_id]

    def get(self, client_id: str) -> Member | None:
        """Return a member, or None for a name that has never joined."""
        return self._members.get(client_id)

    def add(self, member: Member) -> None:
        """Take in a new member."""
        self._members[member.client_id] = member

    def connections(self) -> list[Connection]:
        """Return every connection, also the ones that have not resumed."""
        return list(self._by_token.values())

    def knocking(self, client_id: str) -> list[Connection]:
        """Return a client's connections that have not resumed, the oldest first."""
        mine = [each for each in self._by_token.values() if each.member.client_id == client_id and not each.is_resumed]
        return sorted(mine, key=lambda connection: connection.number)

    @property
    def num_connected(self) -> int:
        """Clients that are connected."""
        return len({connection.member.client_id for connection in self._by_token.values()})

    def connect(self, member: Member, peer: bytes, user_id: str, now_s: float) -> Connection:
        """Begin a session; it is the member's when it resumes."""
        self._last_number += 1
        connection = Connection(
            member=member,
            peer=peer,
            user_id=user_id,
            token=secrets.token_hex(16),
            number=self._last_number,
            last_heard_s=now_s,
            begun_s=now_s,
        )
        self._by_peer[peer] = self._by_token[connection.token] = connection
        return connection

    def at(self, peer: bytes) -> Connection | None:
        """Return the connection that a peer belongs to."""
        return self._by_peer.get(peer)

    def with_token(self, token: str) -> Connection | None:
        """Return the connection that a token was given to."""
        return self._by_token.get(token)

    def attach(self, connection: Connection, control_peer: bytes) -> None:
        """Add the control connection."""
        connection.control_peer = control_peer
        self._by_peer[control_peer] = connection

    def disconnect(self, connection: Connection) -> bool:
        """Forget a connection; return whether it was its member's."""
        self._by_token.pop(connection.token, None)
        self._by_peer = {peer: other for peer, other in self._by_peer.items() if other is not connection}
        if connection.member.connection is not connection:
            return False
        connection.member.connection = None
        return True
