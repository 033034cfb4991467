"""Who is let in: by key, by name, by room, and nobody who has broken the rules too often."""

import re
from dataclasses import dataclass

from server_backbone.door.members import Members
from splitfl.config.patterns import NAME_PATTERN
from splitfl.protocol.messages import WIRE_VERSION, Hello, Why
from splitfl.session.limits import Limits
from splitfl.telemetry.units import counted, printable
from splitfl.transport.keys import AllowList

# A client whose connections were cut off this often within this time waits this long.
_CUTS_BEFORE_WAIT = 3
_CUTS_WITHIN_S = 600.0
_WAIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Why a peer is sent away, and the sentence for it."""

    code: Why
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike(Refused):
    """A violation, counted; after the last one the client is kept out."""

    count: int

    @property
    def is_last(self) -> bool:
        """Whether this is the one after which the client is quarantined."""
        return self.code is Why.QUARANTINED


# Sessions that a client may begin at once, and how many more a second: who begins more comes in vain for a while.
_MAX_SESSIONS = 60.0
_SESSIONS_PER_S = 1.0
# Names that may ever join, as a multiple of the clients that may be connected at once: each costs memory for good.
_NAMES_PER_CLIENT = 16


class Admission:
    """The door of one run; without an allow-list every key and every name is taken."""

    def __init__(self, allow_list: AllowList | None, limits: Limits) -> None:
        self._allow_list = allow_list
        self._limits = limits
        self._strikes: dict[str, int] = {}
        self._cuts: dict[str, list[float]] = {}
        self._sessions: dict[str, tuple[float, float]] = {}
        """Sessions that each client may still begin, and when that was so."""

    def is_let_in(self, user_id: str) -> bool:
        """Tell whether the server lets a key in."""
        return self._allow_list is None or self._allow_list.client_of(user_id) is not None

    def name_of(self, user_id: str) -> str | None:
        """Return the client that a key belongs to; None without keys, which prove nobody's name."""
        return None if self._allow_list is None or not user_id else self._allow_list.client_of(user_id)

    def belongs(self, user_id: str, client_id: str) -> bool:
        """Tell whether a key is this client's."""
        return self._allow_list is None or self._allow_list.client_of(user_id) == client_id

    def objection(
        self,
        hello: Hello,
        user_id: str,
        members: Members,
        *,
        finished: str = "",
        keeps_copies: bool = False,
        now_s: float = 0.0,
    ) -> Refused | None:
        """Return why a client that says hello is sent away, None if it is welcome.

        `finished` is the sentence for a newcomer to a run without further rounds. Where the server `keeps_copies` of
        the backbone for good, clients count that have gone.
        """
        name = hello.client_id
        if hello.wire_version != WIRE_VERSION:
            return Refused(
                code=Why.VERSION_MISMATCH,
                reason=f"this server speaks wire version {WIRE_VERSION} and this client {hello.wire_version}"
                f" ({printable(hello.software, 40)}): install the same splitfl on both",
            )
        if not re.fullmatch(NAME_PATTERN, name):
            return Refused(code=Why.OVER, reason="client_id must be 1 to 64 letters, digits, '.', '_' or '-'")
        if not self.belongs(user_id, name):
            return Refused(
                code=Why.KEY_MISMATCH,
                reason=f"this key belongs to client {self.name_of(user_id)} and not to {name}: set client.client_id to"
                " the name in the enrolment file",
            )
        if self._is_quarantined(name):
            return Refused(code=Why.QUARANTINED, reason=self._quarantine_text(name))
        known = members.get(name)
        if finished and known is None:
            return Refused(code=Why.FINISHED, reason=finished)
        most = self._limits.clients
        if members.num_connected >= most and (known is None or known.connection is None):
            return Refused(
                code=Why.FULL,
                reason=f"{counted(most, 'client is', 'clients are')} connected, which is server.max_clients: try"
                " again later",
            )
        if keeps_copies and known is None and len(members) >= most:
            return Refused(
                code=Why.FULL,
                reason=f"this server keeps a copy of the backbone for each of {counted(most, 'client')}, which is"
                " server.max_clients, and theirs wait for them: ask its operator to raise that",
            )
        if known is None and len(members) >= _NAMES_PER_CLIENT * most:
            return Refused(
                code=Why.FULL,
                reason=f"{len(members)} clients have taken part, {_NAMES_PER_CLIENT} times server.max_clients = {most}:"
                " ask its operator to raise that",
            )
        if not self._may_begin(name, now_s):
            return Refused(
                code=Why.FULL,
                reason=f"{name} has begun {_MAX_SESSIONS:g} sessions in short order: one a second is taken, try again",
            )
        return None

    def _may_begin(self, client_id: str, now_s: float) -> bool:
        """Count a session of a client, unless there were too many."""
        left, then_s = self._sessions.get(client_id, (_MAX_SESSIONS, now_s))
        left = min(_MAX_SESSIONS, left + (now_s - then_s) * _SESSIONS_PER_S)
        if left < 1:
            return False
        self._sessions[client_id] = (left - 1, now_s)
        if len(self._sessions) > _NAMES_PER_CLIENT * self._limits.clients:  # without keys anybody has any name
            del self._sessions[next(iter(self._sessions))]
        return True

    def strike(self, client_id: str, rule: str) -> Strike:
        """Count a violation of a rule."""
        count = min(self._strikes.get(client_id, 0) + 1, self._limits.strikes + 1)
        self._strikes[client_id] = count
        text = f"{client_id} sent {rule}; violation {count} of {self._limits.strikes}"
        if not self._is_quarantined(client_id):
            return Strike(code=Why.VIOLATION, reason=text, count=count)
        return Strike(code=Why.QUARANTINED, reason=f"{text}. {self._quarantine_text(client_id)}", count=count)

    def cut_off(self, client_id: str, now_s: float) -> None:
        """Take note that a connection of a client had to be cut off; repeated, it has to wait a while."""
        recent = [at_s for at_s in self._cuts.get(client_id, ()) if now_s - at_s < _CUTS_WITHIN_S]
        self._cuts[client_id] = [*recent, now_s][-_CUTS_BEFORE_WAIT:]

    def too_soon(self, user_id: str, now_s: float) -> Refused | None:
        """Return why a client has to wait whose connections were cut off again and again, None if it has not."""
        name = self.name_of(user_id)
        cuts = self._cuts.get(name or "", [])
        if len(cuts) < _CUTS_BEFORE_WAIT or now_s >= (until_s := cuts[-1] + _WAIT_S):
            return None
        return Refused(
            code=Why.FULL,
            reason=f"{len(cuts)} connections of {name} were cut off for a message without end: it may come back in"
            f" {until_s - now_s:.0f} s",
        )

    def refresh(self) -> bool:
        """Read the keys again if they have changed, and tell whether they have; who was taken out begins anew."""
        if self._allow_list is None or not self._allow_list.refresh():
            return False
        self._strikes = {name: count for name, count in self._strikes.items() if self._allow_list.key_of(name)}
        return True

    def _is_quarantined(self, client_id: str) -> bool:
        return self._strikes.get(client_id, 0) >= self._limits.strikes

    def _quarantine_text(self, client_id: str) -> str:
        return (
            f"{client_id} is quarantined after {self._limits.strikes} violations: the operator lets it in again with"
            " `splitfl revoke` and `splitfl authorize`, or by starting the server again"
        )
