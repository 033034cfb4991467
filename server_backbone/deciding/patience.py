"""For whom a step still waits: who misses too many in a row, or costs the others too much time, sits out. Pure."""

from dataclasses import dataclass

# Others lose at most this share of their time, beyond the first misses that everybody is granted.
_SHARE_LOST = 0.2


@dataclass(slots=True)
class _Record:
    in_a_row: int = 0
    lost_s: float = 0.0
    """What others have waited for it in vain."""


class Patience:
    """What each client's misses have cost; one that sits out is waited for again when it begins a step.

    It is waited for at once the first time. After that only as long as all its misses are no more than a fifth of the
    time that has passed. So a client that begins steps and never ends them, or ends every other one, cannot hold the
    others up. What it does in time counts all the while.
    """

    def __init__(self, max_missed_steps: int, step_timeout: float) -> None:
        self._most = max_missed_steps
        self._step_timeout = step_timeout
        self._begun_s: float | None = None
        self._records: dict[str, _Record] = {}
        self._out: set[str] = set()

    def begin(self, now_s: float) -> None:
        """Take note that there is something to wait for, from now on."""
        if self._begun_s is None:
            self._begun_s = now_s

    def is_out(self, client_id: str) -> bool:
        """Tell whether a client sits out."""
        return client_id in self._out

    def missed(self, client_id: str, now_s: float) -> bool:
        """Take note that a step went on without a client; return whether it sits out from now on."""
        record = self._records.setdefault(client_id, _Record())
        record.in_a_row += 1
        record.lost_s += self._step_timeout
        if record.in_a_row >= self._most or not self._can_be_borne(record, now_s):
            self._out.add(client_id)
        return client_id in self._out

    def made(self, client_id: str, now_s: float) -> bool:
        """Take note that a client was in time; return whether it had sat out, and is waited for again from now on."""
        record = self._records.get(client_id)
        if record is None:
            return False
        record.in_a_row = 0
        if client_id not in self._out or not self._can_be_borne(record, now_s):
            return False
        self._out.discard(client_id)
        return True

    def may_return(self, client_id: str, now_s: float) -> bool:
        """Tell whether a client that sits out is waited for again; then one more miss is enough."""
        record = self._records.get(client_id)
        if record is None or not self._can_be_borne(record, now_s):
            return False
        record.in_a_row = self._most - 1
        self._out.discard(client_id)
        return True

    def _can_be_borne(self, record: _Record, now_s: float) -> bool:
        passed_s = now_s - (now_s if self._begun_s is None else self._begun_s)
        return record.lost_s <= self._most * self._step_timeout + _SHARE_LOST * passed_s
