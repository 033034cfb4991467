"""When a step may begin and when it is applied, for each `server_mode`: pure state, time comes in as a number.

One rule holds for all four: weights never move under a live graph. What a gate returns is put on the worker's queue in
that order, and the worker does one thing at a time. A gate knows clients and steps, and never sees a message.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from server_backbone.deciding.patience import Patience

_MISSED = "missed too many steps (federation.max_missed_steps), and sits out until it begins one again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """Run forward what this client has sent of its step, in the order in which it came."""

    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """Commit one optimizer step from these clients' gradients, in this order."""

    client_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseStep:
    """Go on without this client's open step: drop its graphs and gradients, and tell it."""

    client_id: str
    next_step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SitOut:
    """Go on without this client until it shows work."""

    client_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeBack:
    """Wait for this client again: it shows work."""

    client_id: str


Action: TypeAlias = Begin | Apply | CloseStep | SitOut | TakeBack


class Gate(Protocol):
    """What a `server_mode` decides. Every method returns what is to be done, in order."""

    def round_opened(self, trainers: Iterable[str], first_step: int) -> None:
        """Expect these clients to train."""
        ...

    def round_closed(self) -> None:
        """Forget all that waits: a client still at work learns from the merge that its step is applied nowhere."""
        ...

    def forward(self, client_id: str, step: int, now_s: float) -> list[Action]:
        """Take note of a training micro-batch of this step."""
        ...

    def commit(self, client_id: str, now_s: float) -> list[Action]:
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

    def sits_out(self, client_id: str) -> bool:
        """Tell whether nobody waits for a client's steps, since it has missed too many."""
        ...

    def waiting_for(self) -> Sequence[str]:
        """Name the clients that others wait for."""
        ...


class SharedGate:
    """One optimizer step from all clients' gradients of a step (FL-GLM's client-batch).

    SplitFed-V2 too has one backbone for all, but that steps for one client after the other, as with `SequentialGate`.
    """

    def __init__(self, step_timeout: float, max_missed_steps: int = 3) -> None:
        self._step_timeout = step_timeout
        self._patience = Patience(max_missed_steps, step_timeout)
        self._expected: set[str] = set()
        self._guests: set[str] = set()
        """Clients that sit out and have begun this step all the same: it does not wait for them."""
        self._asked: set[str] = set()
        self._deadline_s = float("inf")
        self._step = 0
        self._is_open = False

    def round_opened(self, trainers: Iterable[str], first_step: int) -> None:
        self._is_open = True
        self._expected = {each for each in trainers if not self.sits_out(each)}
        self._guests = set()
        self._step = first_step

    def round_closed(self) -> None:
        self._is_open = False
        self._expected = set()
        self._guests = set()
        self._asked = set()
        self._deadline_s = float("inf")

    def sits_out(self, client_id: str) -> bool:
        return self._patience.is_out(client_id)

    def forward(self, client_id: str, step: int, now_s: float) -> list[Action]:
        # A member's next forward cannot come before its commit is acknowledged, so no graph outlives a commit.
        if not self.sits_out(client_id) or not self._is_open:
            return [Begin(client_id=client_id)]
        back: list[Action] = []
        if self._patience.may_return(client_id, now_s):
            self._expected.add(client_id)
            back = [TakeBack(client_id=client_id)]
        if step != self._step:
            return [*back, self._elsewhere(client_id)]
        if not back:
            self._guests.add(client_id)
        return [*back, Begin(client_id=client_id)]

    def commit(self, client_id: str, now_s: float) -> list[Action]:
        self._patience.begin(now_s)
        if client_id not in self._expected | self._guests:
            return []  # the round closed before it came
        if not self._asked:
            self._deadline_s = now_s + self._step_timeout
        self._asked.add(client_id)
        return self._apply_if_complete(now_s)

    def finished(self, client_id: str, now_s: float) -> list[Action]:
        self._expected.discard(client_id)
        self._guests.discard(client_id)
        self._asked.discard(client_id)
        return self._apply_if_complete(now_s)

    def lost(self, client_id: str, now_s: float) -> list[Action]:
        self._asked.discard(client_id)  # its gradients go with its connection; the step still waits for it
        self._guests.discard(client_id)
        return []

    def returned(self, client_id: str) -> int:
        if self._is_open and not self.sits_out(client_id):
            self._expected.add(client_id)
        return self._step

    def ticked(self, now_s: float) -> list[Action]:
        if not self._asked or now_s < self._deadline_s:
            return []
        reason = f"the step went on after {self._step_timeout:g} s without this client"
        late = sorted(self._expected - self._asked)
        actions: list[Action] = []
        for client_id in late:
            actions.append(CloseStep(client_id=client_id, next_step=self._step + 1, reason=reason))
            if self._patience.missed(client_id, now_s):
                self._expected.discard(client_id)
                actions.append(SitOut(client_id=client_id, reason=_MISSED))
        return actions + self._apply(now_s)

    def waiting_for(self) -> Sequence[str]:
        return sorted(self._expected - self._asked) if self._asked else []

    def _elsewhere(self, client_id: str) -> CloseStep:
        return CloseStep(client_id=client_id, next_step=self._step, reason=f"the others are at step {self._step}")

    def _apply_if_complete(self, now_s: float) -> list[Action]:
        return self._apply(now_s) if self._asked and self._expected <= self._asked else []

    def _apply(self, now_s: float) -> list[Action]:
        client_ids = tuple(sorted(self._asked))
        too_late = sorted(self._guests - self._asked)
        self._asked, self._guests = set(), set()
        self._deadline_s = float("inf")
        self._step += 1
        back = [client_id for client_id in client_ids if self._patience.made(client_id, now_s)]
        self._expected |= set(back)
        return [
            *(self._elsewhere(client_id) for client_id in too_late),
            Apply(client_ids=client_ids),
            *(TakeBack(client_id=client_id) for client_id in back),
        ]


class SequentialGate:
    """One client's step at a time, each computed and applied before the next begins (split learning's plain order)."""

    def __init__(self, step_timeout: float, max_missed_steps: int = 3) -> None:
        self._step_timeout = step_timeout
        self._patience = Patience(max_missed_steps, step_timeout)
        self._owner: str | None = None
        self._owner_step = 0
        self._is_open = False
        self._deadline_s = float("inf")
        self._held: dict[str, int] = {}
        """The step of each client that waits for the turn, in the order in which they came."""

    def round_opened(self, trainers: Iterable[str], first_step: int) -> None:
        self._is_open = True

    def round_closed(self) -> None:
        self._is_open = False
        self._owner = None
        self._held.clear()

    def sits_out(self, client_id: str) -> bool:
        return self._patience.is_out(client_id)

    def forward(self, client_id: str, step: int, now_s: float) -> list[Action]:
        self._patience.begin(now_s)
        if not self._is_open:
            return []  # the round closed before it came
        actions: list[Action] = []
        if self._owner != client_id and self.sits_out(client_id) and self._patience.may_return(client_id, now_s):
            actions.append(TakeBack(client_id=client_id))
        if self._owner not in (None, client_id):
            self._held.setdefault(client_id, step)
            return [*actions, *self._sent_away(client_id, now_s)]
        if self._owner is None:
            self._take_turn(client_id, step, now_s)
        return [*actions, Begin(client_id=client_id)]

    def _sent_away(self, client_id: str, now_s: float) -> list[Action]:
        """End the turn of an owner that sits out and had it only because nobody else wanted it."""
        if self._owner is None or not self.sits_out(self._owner) or self.sits_out(client_id):
            return []
        return [self._closed("others wait for the turn, which it had while nobody did"), *self._next_turn(now_s)]

    def _closed(self, reason: str) -> CloseStep:
        return CloseStep(client_id=self._owner or "", next_step=self._owner_step + 1, reason=reason)

    def commit(self, client_id: str, now_s: float) -> list[Action]:
        if client_id != self._owner:
            return []  # the round closed before it came
        back = [TakeBack(client_id=client_id)] if self._patience.made(client_id, now_s) else []
        return [Apply(client_ids=(client_id,)), *back, *self._next_turn(now_s)]

    def finished(self, client_id: str, now_s: float) -> list[Action]:
        self._held.pop(client_id, None)
        return self._next_turn(now_s) if self._owner == client_id else []

    def lost(self, client_id: str, now_s: float) -> list[Action]:
        return self.finished(client_id, now_s)

    def returned(self, client_id: str) -> int:
        return 0

    def ticked(self, now_s: float) -> list[Action]:
        if self._owner is None or now_s < self._deadline_s:
            return []
        owner, is_waited_for = self._owner, bool(self._held)
        closed = self._closed(f"its turn ended after {self._step_timeout:g} s without a commit")
        sits_out: list[Action] = []
        if is_waited_for and self._patience.missed(owner, now_s):
            sits_out = [SitOut(client_id=owner, reason=_MISSED)]
        return [closed, *sits_out, *self._next_turn(now_s)]

    def waiting_for(self) -> Sequence[str]:
        return [self._owner] if self._owner and self._held else []

    def _take_turn(self, client_id: str, step: int, now_s: float) -> None:
        self._owner = client_id
        self._owner_step = step
        self._deadline_s = now_s + self._step_timeout

    def _next_turn(self, now_s: float) -> list[Action]:
        self._owner = None
        if not self._held:
            return []
        # one that sits out comes when nobody else does
        client_id = next((held for held in self._held if not self.sits_out(held)), next(iter(self._held)))
        self._take_turn(client_id, self._held.pop(client_id), now_s)
        return [Begin(client_id=client_id)]


class PatientGate(SequentialGate):
    """Ends a turn only when somebody else waits for it."""

    def ticked(self, now_s: float) -> list[Action]:
        return super().ticked(now_s) if self._held else []


class FrozenGate:
    """No weight of the server moves, so nobody waits for anybody."""

    def __init__(self) -> None:
        self._is_open = False

    def round_opened(self, trainers: Iterable[str], first_step: int) -> None:
        self._is_open = True

    def round_closed(self) -> None:
        self._is_open = False

    def forward(self, client_id: str, step: int, now_s: float) -> list[Action]:
        return [Begin(client_id=client_id)]

    def commit(self, client_id: str, now_s: float) -> list[Action]:
        return [Apply(client_ids=(client_id,))] if self._is_open else []  # the round closed before it came

    def finished(self, client_id: str, now_s: float) -> list[Action]:
        return []

    def lost(self, client_id: str, now_s: float) -> list[Action]:
        return []

    def returned(self, client_id: str) -> int:
        return 0

    def ticked(self, now_s: float) -> list[Action]:
        return []

    def sits_out(self, client_id: str) -> bool:
        return False

    def waiting_for(self) -> Sequence[str]:
        return []


class PerClientGate(FrozenGate):
    """Each client moves weights of its own, so nobody waits for anybody (SplitFed-V1).

    A step that comes after its round was computed with weights that the merge has replaced, and is dropped as well.
    """


def gate_for(
    server_mode: str,
    step_timeout: float,
    max_missed_steps: int = 3,
    *,
    in_turn: type[SequentialGate] = SequentialGate,
) -> Gate:
    """Return the gate of a `server_mode`; `in_turn` is that of "sequential"."""
    match server_mode:
        case "shared":
            return SharedGate(step_timeout, max_missed_steps)
        case "sequential":
            return in_turn(step_timeout, max_missed_steps)
        case "per_client":
            return PerClientGate()
        case _:
            return FrozenGate()
