"""When a round opens, closes and is merged: pure state, time comes in as a number.

A round gathers clients, opens for the ones that the strategy chooses, and closes when all of them have uploaded or
left, or at its deadline. Then it has the clients that are done, or the others' part too after a last call
(`federation.partial_work`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from splitfl.config.sections import FederationSection
from splitfl.telemetry.units import counted

Choose: TypeAlias = Callable[[int, Sequence[str]], Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """A round begins for all these clients; the trainers do `local_steps` steps from `first_step` on."""

    round_number: int
    clients: tuple[str, ...]
    trainers: tuple[str, ...]
    first_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LastCall:
    """A round is about to close: these clients are still at work in it, and are asked for what they have."""

    round_number: int
    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """A round closes; an empty `reason` means that these uploads become everyone's layers."""

    round_number: int
    uploaded: tuple[str, ...]
    absent: tuple[str, ...]
    reason: str
    closes: bool = True
    """Whether all clients end their round with it; else they hear of it when they have uploaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A client's layers are in: it gets the newest ones and goes on, whatever the others do."""

    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """All who take part have evaluated this merge's layers: compare it with the rounds before, then call `judged`."""

    round_number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """There is no further round; an empty `reason` means that all were done. Clients evaluate and say goodbye."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The run is over; an empty `reason` means it went through to its last round."""

    reason: str


Decision: TypeAlias = Open | LastCall | Merge | Release | Judge | Stop | End


class Stage(Enum):
    ENDLESS = auto()
    """There are no rounds: all are own-loop clients."""
    GATHERING = auto()
    OPEN = auto()
    LAST_CALL = auto()
    """Open no longer than `step_timeout`: no step begins, and clients upload what they have."""
    MERGING = auto()
    JUDGING = auto()
    PARTING = auto()
    """All rounds are merged; clients evaluate and say goodbye."""
    OVER = auto()


class Rounds:
    """The run's rounds, one after the other."""

    def __init__(self, federation: FederationSection, choose: Choose, now_s: float) -> None:
        self._federation = federation
        self._choose = choose
        self._stage = Stage.GATHERING
        self._deadline_s = now_s + federation.wait_timeout
        self._connected: set[str] = set()
        self._ready: set[str] = set()
        self._trainers: set[str] = set()
        self._chosen: set[str] = set()
        self._uploaded: set[str] = set()
        self._idle: set[str] = set()
        """Clients that are there and that nobody waits for, until they have something to show."""
        self.round_number = 0
        self.num_merged = 0
        self._num_judged = 0

    @property
    def first_step(self) -> int:
        """Number of the open round's first step, counted over the run from 1."""
        return (self.round_number - 1) * self._federation.local_steps + 1

    @property
    def is_last(self) -> bool:
        """Whether the open round's merge is the end of all rounds; where rounds are compared, the verdict on it is."""
        return self.round_number == self._federation.num_rounds and not self._federation.compares_rounds

    @property
    def is_parting(self) -> bool:
        """Whether all rounds are done."""
        return self._stage in (Stage.PARTING, Stage.OVER)

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
        """Set where a run stands that was interrupted; `resumed` then says what follows.

        `next_steps` are where each client's next round of its own would begin (see `turns`). The last merge is judged,
        or judged again: the part that is asked for the verdict remembers it.
        """
        self.num_merged = self.round_number = num_merged
        if open_round is not None:
            self.round_number = open_round.round_number
            self._stage = Stage.OPEN
            self._chosen = set(open_round.trainers)
            self._uploaded = set(uploaded)
            self._trainers = self._chosen - (set(out) - self._uploaded)
        elif has_stopped or (self._are_all_merged and not self._federation.compares_rounds):
            self._stage = Stage.PARTING

    def resumed(self, clients: Iterable[str], now_s: float) -> list[Decision]:
        """Begin again with these clients expected back."""
        self._connected = set(clients)
        waits = self._stage is Stage.GATHERING
        self._deadline_s = now_s + (self._federation.wait_timeout if waits else self._federation.round_timeout)
        if self._stage is Stage.PARTING and not self._connected:
            return self._end("")
        return self._close_if_complete()

    def joined(self, client_id: str, *, takes_part: bool = False) -> None:
        """Take note of a client, new or back; from the next round on, or in the open one if it `takes_part` in that."""
        self._connected.add(client_id)
        if takes_part and self._stage is Stage.OPEN and client_id in self._chosen - self._idle:
            self._trainers.add(client_id)

    def lost(self, client_id: str) -> None:
        """Take note that a client's connection is gone; it is waited for until `left` says otherwise."""
        self._ready.discard(client_id)

    def gave_up(self, client_id: str) -> list[Decision]:
        """Take note that a connected client takes no further part in the open round."""
        self._trainers.discard(client_id)
        return self._close_if_complete()

    def waits_for(self, client_id: str) -> bool:
        """Tell whether others, or the run's end, wait for something of this client."""
        match self._stage:
            case Stage.GATHERING:
                return bool(self._ready) and client_id in self._connected - self._ready - self._idle
            case Stage.OPEN:
                return bool(self._uploaded) and client_id in self._trainers - self._uploaded
            case Stage.PARTING:
                return client_id in self._connected - self._idle
        return False

    def sits_out(self, client_id: str) -> list[Decision]:
        """Wait no longer for a client that is there and shows nothing."""
        self._idle.add(client_id)
        self._trainers.discard(client_id)
        return self._go_on_without()

    def comes_back(self, client_id: str) -> None:
        """Wait again for a client that has shown work, in the open round as well."""
        self._idle.discard(client_id)
        if self._stage is Stage.OPEN and client_id in self._chosen:
            self._trainers.add(client_id)

    def ready(self, client_id: str) -> list[Decision]:
        """Take note that a client waits for the next round."""
        self._idle.discard(client_id)
        self._ready.add(client_id)
        return self._open_if_complete()

    def uploaded(self, client_id: str, upload: str = "") -> list[Decision]:
        """Take note of a trainer's layers; they come too late when the round has closed without them.

        `upload` is their name where a client may upload more than once before a merge (see `turns`).
        """
        if not self._is_open or client_id not in self._chosen:
            return []
        self._uploaded.add(client_id)
        return self._close_if_complete()

    def left(self, client_id: str) -> list[Decision]:
        """Take note that a client is gone, in order or not."""
        self._connected.discard(client_id)
        self._ready.discard(client_id)
        self._trainers.discard(client_id)
        self._idle.discard(client_id)
        return self._go_on_without()

    def merged(self, now_s: float, reason: str = "") -> list[Decision]:
        """Take note that the clients have been told of the merge; a `reason` means that there was none."""
        self.num_merged += 1
        is_last = self.is_last
        self._stage = Stage.PARTING if is_last else Stage.GATHERING
        self._deadline_s = now_s + (self._federation.round_timeout if is_last else self._federation.wait_timeout)
        if is_last and not self._connected:
            return self._end(f"everybody has left, and the last round was not merged: {reason}" if reason else "")
        return self._open_if_complete()  # the others may have left while the ready ones waited

    def ticked(self, now_s: float) -> list[Decision]:
        """Look at the deadline of whatever is waited for."""
        if self._stage is Stage.PARTING and self._connected <= self._idle:
            return self._end("")
        if now_s < self._deadline_s:
            return []
        match self._stage:
            case Stage.GATHERING if len(self._ready) >= self._fewest:
                self._idle |= self._connected - self._ready  # the next time nobody waits so long for them
                return self._go_on()
            case Stage.GATHERING:
                waited = f"waited {self._federation.wait_timeout:g} s (federation.wait_timeout) for"
                return self._end(f"{waited} {self._wanted()}; ready: {', '.join(sorted(self._ready)) or 'none'}")
            case Stage.OPEN if self._federation.partial_work == "accept":
                return self._call(now_s)
            case Stage.OPEN | Stage.LAST_CALL:
                return self._close()
            case Stage.PARTING:
                return self._end("")
        return []

    def judged(self, reason: str, now_s: float) -> list[Decision]:
        """Take note of the verdict on the last merge; a `reason` means that no further round is worth its while."""
        self._num_judged = self.num_merged
        if reason or self._are_all_merged:
            self._stage = Stage.PARTING
            return [Stop(reason=reason)]
        self._stage = Stage.GATHERING
        self._deadline_s = now_s + self._federation.wait_timeout
        return self._open() if len(self._ready) >= self._fewest else []  # some may have left meanwhile

    def stopped(self, now_s: float) -> list[Decision]:
        """Start the clock of the clients' last evaluations, who have been told that they are the last."""
        self._deadline_s = now_s + self._federation.round_timeout
        return [] if self._connected else self._end("")

    def opened(self, now_s: float) -> None:
        """Start the clock of the round that was just announced."""
        self._deadline_s = now_s + self._federation.round_timeout

    def waiting_for(self) -> str:
        """Say in words what the run waits for, "" when clients are at work."""
        match self._stage:
            case Stage.GATHERING:
                missing = sorted(self._connected - self._ready)
                busy = f", {', '.join(missing)} still at work" if missing else ""
                what = "the evaluation of" if self._are_all_merged else f"{self._wanted()} to begin"
                number = self.round_number + (not self._are_all_merged)
                return f"{what} round {number} ({len(self._ready)} ready{busy})"
            case Stage.OPEN | Stage.LAST_CALL if self._uploaded or self._stage is Stage.LAST_CALL:
                return f"layers of {', '.join(sorted(self._trainers - self._uploaded))}"
            case Stage.PARTING:
                return f"last evaluations of {', '.join(sorted(self._connected))}"
        return ""

    def _wanted(self) -> str:
        wanted = self._federation.min_available_clients
        return f"{wanted} client" + ("s" if wanted > 1 else "")

    @property
    def _are_all_merged(self) -> bool:
        return self.num_merged == self._federation.num_rounds

    @property
    def _fewest(self) -> int:
        """Clients that must be ready; for the verdict on the last merge, all that are still there."""
        return min(1, len(self._connected)) if self._are_all_merged else self._federation.min_available_clients

    def _go_on_without(self) -> list[Decision]:
        """Return what follows from a client that is not waited for any more."""
        match self._stage:
            case Stage.GATHERING:
                return self._open_if_complete()
            case Stage.OPEN | Stage.LAST_CALL:
                return self._close_if_complete()
            case Stage.PARTING if self._connected <= self._idle:
                return self._end("")
        return []

    def _open_if_complete(self) -> list[Decision]:
        enough = len(self._ready) >= self._fewest
        if self._stage is not Stage.GATHERING or not enough or self._connected - self._ready - self._idle:
            return []
        return self._go_on()

    def _go_on(self) -> list[Decision]:
        """Open the next round; where rounds are compared, not before the verdict on the last one."""
        if self._federation.compares_rounds and self._num_judged < self.num_merged:
            self._stage = Stage.JUDGING
            self._deadline_s = float("inf")
            return [Judge(round_number=self.num_merged)]
        return self._open()

    def _open(self) -> list[Decision]:
        self.round_number += 1
        clients = tuple(sorted(self._ready))
        trainers = tuple(self._choose(self.round_number, clients))
        self._chosen = set(trainers)
        self._trainers = set(trainers)
        self._uploaded = set()
        self._ready = set()
        self._stage = Stage.OPEN
        self._deadline_s = float("inf")
        return [Open(round_number=self.round_number, clients=clients, trainers=trainers, first_step=self.first_step)]

    @property
    def _is_open(self) -> bool:
        return self._stage in (Stage.OPEN, Stage.LAST_CALL)

    def _call(self, now_s: float) -> list[Decision]:
        self._stage = Stage.LAST_CALL
        self._deadline_s = now_s + self._federation.step_timeout
        clients = tuple(sorted(self._trainers - self._uploaded))
        return [LastCall(round_number=self.round_number, clients=clients)]

    def _close_if_complete(self) -> list[Decision]:
        return self._close() if self._is_open and self._trainers <= self._uploaded else []

    def _close(self) -> list[Decision]:
        self._stage = Stage.MERGING
        self._deadline_s = float("inf")
        done = tuple(sorted(self._uploaded))
        fewest = self._federation.min_train_clients
        reason = "" if len(done) >= fewest else f"{counted(len(done), 'client')} finished, min_train_clients = {fewest}"
        return [
            Merge(
                round_number=self.round_number,
                uploaded=done,
                absent=tuple(sorted(self._chosen - self._uploaded)),
                reason=reason,
            )
        ]

    def _end(self, reason: str) -> list[Decision]:
        self._stage = Stage.OVER
        self._deadline_s = float("inf")
        return [End(reason=reason)]


class Endless(Rounds):
    """No rounds: own-loop clients come and go, and nothing ever follows from it."""

    def __init__(self, federation: FederationSection, choose: Choose, now_s: float) -> None:
        super().__init__(federation, choose, now_s)
        self._stage = Stage.ENDLESS

    @property
    def _are_all_merged(self) -> bool:
        return False
