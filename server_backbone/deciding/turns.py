"""Rounds of each client's own, and merges as uploads come in (FedBuff): pure state, time comes in as a number.

A client's turn is a round for it alone: `Open`, its local steps, its upload, `Release`. It is numbered by the merge
that follows the one whose layers it begins with, as a round is. Its steps are counted for it alone. Every `buffer_size`
uploads, from whomever, are a merge. Nobody waits for another client but at the beginning of the run.
"""

from collections.abc import Iterable, Mapping

from server_backbone.deciding.rounds import Decision, Merge, Open, Release, Rounds, Stage
from splitfl.config.sections import FederationSection


class Turns(Rounds):
    """The run's merges, and the turns between them."""

    def __init__(self, federation: FederationSection, buffer_size: int, now_s: float) -> None:
        super().__init__(federation, lambda _, clients: clients, now_s)
        self._buffer_size = buffer_size
        self._buffer: list[str] = []
        """Names of the uploads that wait for a merge, in the order in which they came in."""
        self._awaiting_merge: list[str] = []
        """Clients whose upload is in, and who go on with the layers of the merge that is under way."""
        self._next_steps: dict[str, int] = {}
        self._deserted_s: float | None = None
        """Since when nobody has been here."""

    def restore(
        self,
        open_round: Open | None,
        uploaded: Iterable[str],
        out: Iterable[str],
        *,
        num_merged: int,
        next_steps: Mapping[str, int],
        has_stopped: bool = False,
    ) -> None:
        """Set where a run stands that was interrupted; `uploaded` is the buffer, and there is no one open round."""
        super().restore(None, (), out, num_merged=num_merged, next_steps=next_steps)
        self._buffer = list(uploaded)
        self._next_steps = dict(next_steps)
        has_begun = num_merged > 0 or any(step > 1 for step in next_steps.values())
        if self._stage is Stage.GATHERING and has_begun:
            self._stage = Stage.OPEN

    def uploaded(self, client_id: str, upload: str = "") -> list[Decision]:
        """Take note of a client's layers: it goes on at once, or with the merge that they bring about."""
        if self._stage not in (Stage.OPEN, Stage.MERGING):
            return []  # the last merge is made, and it has been told
        self._buffer.append(upload)
        merge = self._close_if_complete()
        if self._stage is not Stage.MERGING:
            return [Release(client_id=client_id)]
        self._awaiting_merge.append(client_id)
        return merge

    def merged(self, now_s: float, reason: str = "") -> list[Decision]:
        """Take note that a merge is done: the clients that waited for it go on."""
        if self.is_last:
            return super().merged(now_s, reason)
        self.num_merged += 1
        self._stage = Stage.OPEN
        self._deadline_s = now_s + self._federation.round_timeout
        released, self._awaiting_merge = self._awaiting_merge, []
        return [
            *(Release(client_id=client_id) for client_id in released),
            *self._open_if_complete(),
            *self._close_if_complete(),
        ]

    def ticked(self, now_s: float) -> list[Decision]:
        """Look at the deadlines: of the next merge, and of somebody's coming back when all have left."""
        if self._stage is not Stage.OPEN or self._connected:
            self._deserted_s = None
            return super().ticked(now_s)
        if self._deserted_s is None:
            self._deserted_s = now_s
        if now_s - self._deserted_s < self._federation.wait_timeout:
            return []
        waited = f"waited {self._federation.wait_timeout:g} s (federation.wait_timeout)"
        return self._end(f"{waited} for a client to come back")

    def opened(self, now_s: float) -> None:
        """Start the clock of the first merge with the first turn; later ones run from merge to merge."""
        if self._deadline_s == float("inf"):
            super().opened(now_s)

    def waiting_for(self) -> str:
        """Say in words what the run waits for, "" when clients are at work."""
        if self._stage is Stage.OPEN:
            return "" if self._connected else "a client to come back"
        return super().waiting_for()

    def _open_if_complete(self) -> list[Decision]:
        """Open a turn for everybody who is ready; none while a merge is under way, whose layers they would miss."""
        begins = self._stage is Stage.GATHERING and len(self._ready) >= self._federation.min_available_clients
        return self._open() if begins or self._stage is Stage.OPEN else []

    def _open(self) -> list[Decision]:
        if self._stage is Stage.GATHERING:
            self._stage = Stage.OPEN
            self._deadline_s = float("inf")
        ready, self._ready = sorted(self._ready), set()
        return [self._turn(client_id) for client_id in ready]

    def _turn(self, client_id: str) -> Open:
        first_step = max(1, self._next_steps.get(client_id, 1))
        self._next_steps[client_id] = first_step + self._federation.local_steps
        alone = (client_id,)
        return Open(round_number=self.num_merged + 1, clients=alone, trainers=alone, first_step=first_step)

    def _close_if_complete(self) -> list[Decision]:
        is_full = self._stage is Stage.OPEN and len(self._buffer) >= self._buffer_size
        return self._close() if is_full else []

    def _close(self) -> list[Decision]:
        """Merge what is in the buffer, at most `buffer_size` uploads; at the deadline also fewer."""
        self._stage = Stage.MERGING
        self._deadline_s = float("inf")
        self.round_number = self.num_merged + 1
        taken, self._buffer = self._buffer[: self._buffer_size], self._buffer[self._buffer_size :]
        timeout_s = self._federation.round_timeout
        reason = "" if taken else f"no layers came in for {timeout_s:g} s (federation.round_timeout)"
        return [
            Merge(
                round_number=self.round_number,
                uploaded=tuple(sorted(taken)),
                absent=(),
                reason=reason,
                closes=self.is_last,
            )
        ]
