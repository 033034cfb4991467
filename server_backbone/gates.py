"""When a step may begin and when it is applied, for each `server_mode`: pure state, time comes in as a number.

The one rule behind all four: weights never move under a live graph. Whatever a gate returns is put on the worker's
queue in that order, and the worker does one thing at a time.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from splitfl.protocol.messages import Commit, Forward


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compute:
    """Run this micro-batch forward."""

    client_id: str
    message: Forward


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Apply:
    """Commit one optimizer step from these clients' gradients, in this order."""

    members: tuple[tuple[str, Commit], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseStep:
    """Go on without this client's open step: drop its graphs and gradients, and tell it."""

    client_id: str
    next_step: int
    reason: str


Action: TypeAlias = Compute | Apply | CloseStep


class Gate(Protocol):
    """What a `server_mode` decides. Every method returns what is to be done, in order."""

    def round_opened(self, trainers: Iterable[str], first_step: int) -> None:
        """Expect these clients to train."""
        ...

    def round_closed(self) -> None:
        """Forget what waits: whoever is still at work learns from the merge that its step is applied nowhere."""
        ...

    def forward(self, client_id: str, message: Forward, now_s: float) -> list[Action]:
        """Take a training micro-batch."""
        ...

    def commit(self, client_id: str, message: Commit, now_s: float) -> list[Action]:
        """Take the request to apply a step."""
        ...

    def finished(self, client_id: str, now_s: float) -> list[Action]:
        """Take note that a client has no more steps in this round, or has left."""
        ...

    def lost(self, client_id: str, now_s: float) -> list[Action]:
        """Take note that a client's connection is gone, and what it had under way; it may come back."""
        ...

    def returned(self, client_id: str) -> int:
        """Expect a client again; return the step that the others are at, 0 where each has its own."""
        ...

    def ticked(self, now_s: float) -> list[Action]:
        """Look at the deadlines."""
        ...

    def waiting_for(self) -> Sequence[str]:
        """Name the clients that others wait for."""
        ...


class SharedGate:
    """One optimizer step from all clients' gradients of a step (FL-GLM's client-batch).

    SplitFed-V2 too has one backbone for all, but that steps for one client after the other, as with `SequentialGate`.
    """

    def __init__(self, step_timeout: float) -> None:
        self._step_timeout = step_timeout
        self._expected: set[str] = set()
        self._asked: dict[str, Commit] = {}
        self._deadline_s = float("inf")
        self._step = 0
        self._is_open = False

    def round_opened(self, trainers: Iterable[str], first_step: int) -> None:
        self._is_open = True
        self._expected = set(trainers)
        self._step = first_step

    def round_closed(self) -> None:
        self._is_open = False
        self._expected = set()
        self._asked = {}
        self._deadline_s = float("inf")

    def forward(self, client_id: str, message: Forward, now_s: float) -> list[Action]:
        # A member's next forward cannot come before its commit is acknowledged, so no graph outlives a commit.
        return [Compute(client_id=client_id, message=message)]

    def commit(self, client_id: str, message: Commit, now_s: float) -> list[Action]:
        if client_id not in self._expected:
            return []  # the round closed before it came
        if not self._asked:
            self._deadline_s = now_s + self._step_timeout
        self._asked[client_id] = message
        return self._apply_if_complete()

    def finished(self, client_id: str, now_s: float) -> list[Action]:
        self._expected.discard(client_id)
        self._asked.pop(client_id, None)
        return self._apply_if_complete()

    def lost(self, client_id: str, now_s: float) -> list[Action]:
        self._asked.pop(client_id, None)  # its gradients go with its connection; the step still waits for it
        return []

    def returned(self, client_id: str) -> int:
        if self._is_open:
            self._expected.add(client_id)
        return self._step

    def ticked(self, now_s: float) -> list[Action]:
        if not self._asked or now_s < self._deadline_s:
            return []
        reason = f"the step went on after {self._step_timeout:g} s without this client"
        late = sorted(self._expected - set(self._asked))
        closed: list[Action] = [
            CloseStep(client_id=client_id, next_step=self._step + 1, reason=reason) for client_id in late
        ]
        return closed + self._apply()

    def waiting_for(self) -> Sequence[str]:
        return sorted(self._expected - set(self._asked)) if self._asked else []

    def _apply_if_complete(self) -> list[Action]:
        return self._apply() if self._asked and self._expected <= set(self._asked) else []

    def _apply(self) -> list[Action]:
        members = tuple(sorted(self._asked.items()))
        self._asked = {}
        self._deadline_s = float("inf")
        self._step += 1
        return [Apply(members=members)]


class SequentialGate:
    """One client's step at a time, each computed and applied before the next begins (split learning's plain order)."""

    def __init__(self, step_timeout: float, *, is_patient: bool = False) -> None:
        """A patient gate ends a turn only when somebody else waits for it."""
        self._step_timeout = step_timeout
        self._is_patient = is_patient
        self._owner: str | None = None
        self._owner_step = 0
        self._is_open = False
        self._deadline_s = float("inf")
        self._held: deque[tuple[str, Forward]] = deque()

    def round_opened(self, trainers: Iterable[str], first_step: int) -> None:
        self._is_open = True

    def round_closed(self) -> None:
        self._is_open = False
        self._owner = None
        self._held.clear()

    def forward(self, client_id: str, message: Forward, now_s: float) -> list[Action]:
        if not self._is_open:
            return []  # the round closed before it came
        if self._owner not in (None, client_id):
            self._held.append((client_id, message))
            return []
        if self._owner is None:
            self._take_turn(client_id, message, now_s)
        return [Compute(client_id=client_id, message=message)]

    def commit(self, client_id: str, message: Commit, now_s: float) -> list[Action]:
        if client_id != self._owner:
            return []  # the round closed before it came
        return [Apply(members=((client_id, message),)), *self._next_turn(now_s)]

    def finished(self, client_id: str, now_s: float) -> list[Action]:
        self._held = deque(held for held in self._held if held[0] != client_id)
        return self._next_turn(now_s) if self._owner == client_id else []

    def lost(self, client_id: str, now_s: float) -> list[Action]:
        return self.finished(client_id, now_s)

    def returned(self, client_id: str) -> int:
        return 0

    def ticked(self, now_s: float) -> list[Action]:
        if self._owner is None or now_s < self._deadline_s or (self._is_patient and not self._held):
            return []
        reason = f"its turn ended after {self._step_timeout:g} s without a commit"
        closed = CloseStep(client_id=self._owner, next_step=self._owner_step + 1, reason=reason)
        return [closed, *self._next_turn(now_s)]

    def waiting_for(self) -> Sequence[str]:
        return [self._owner] if self._owner and self._held else []

    def _take_turn(self, client_id: str, message: Forward, now_s: float) -> None:
        self._owner = client_id
        self._owner_step = message.step
        self._deadline_s = now_s + self._step_timeout

    def _next_turn(self, now_s: float) -> list[Action]:
        self._owner = None
        if not self._held:
            return []
        client_id, first = self._held[0]
        self._take_turn(client_id, first, now_s)
        mine = [message for holder, message in self._held if holder == client_id]
        self._held = deque(held for held in self._held if held[0] != client_id)
        return [Compute(client_id=client_id, message=message) for message in mine]


class FrozenGate:
    """No weight of the server moves, so nobody waits for anybody."""

    def __init__(self) -> None:
        self._is_open = False

    def round_opened(self, trainers: Iterable[str], first_step: int) -> None:
        self._is_open = True

    def round_closed(self) -> None:
        self._is_open = False

    def forward(self, client_id: str, message: Forward, now_s: float) -> list[Action]:
        return [Compute(client_id=client_id, message=message)]

    def commit(self, client_id: str, message: Commit, now_s: float) -> list[Action]:
        return [Apply(members=((client_id, message),))] if self._is_open else []  # the round closed before it came

    def finished(self, client_id: str, now_s: float) -> list[Action]:
        return []

    def lost(self, client_id: str, now_s: float) -> list[Action]:
        return []

    def returned(self, client_id: str) -> int:
        return 0

    def ticked(self, now_s: float) -> list[Action]:
        return []

    def waiting_for(self) -> Sequence[str]:
        return []


class PerClientGate(FrozenGate):
    """Each client moves weights of its own, so nobody waits for anybody (SplitFed-V1).

    A step that comes behind its round was computed with weights that the merge has replaced, and is dropped as well.
    """


def gate_for(server_mode: str, step_timeout: float, *, is_patient: bool = False) -> Gate:
    """Return the gate of a `server_mode`; see `SequentialGate` for what is patient."""
    match server_mode:
        case "shared":
            return SharedGate(step_timeout)
        case "sequential":
            return SequentialGate(step_timeout, is_patient=is_patient)
        case "per_client":
            return PerClientGate()
        case _:
            return FrozenGate()
