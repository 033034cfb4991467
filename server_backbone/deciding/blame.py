"""Whose fault it is that a client cannot go on from merged layers: its own, or the merge's. Pure.

What a client sends before its first step from everyone's layers follows from those and from its text. If it is beyond
all bounds, either the layers are of no use, and then for others too, or the client makes it up. So clients that began
with the same layers are compared, and the majority is believed; nobody is punished before that is known.
"""

from collections.abc import Collection
from enum import Enum, auto


class Fault(Enum):
    """What is known about a client that cannot go on."""

    OPEN = auto()
    """Too few others are through with these layers yet."""
    ITS_OWN = auto()
    """Half of the clients or more went on from the same layers."""
    THE_MERGES = auto()
    """Most of the clients cannot go on from them."""


class Stage(Enum):
    """A client's work, and the event that says it is through with it."""

    EVALUATION = auto()
    """Its activations were sound."""
    TRAINING = auto()
    """It has gone through its round and uploaded what it has learned: some texts fail sooner than others."""


class Blame:
    """What the clients' first work has shown of the layers that are everyone's now."""

    def __init__(self) -> None:
        self._sound: dict[Stage, set[str]] = {stage: set() for stage in Stage}
        self._stuck: set[str] = set()

    def merged(self) -> None:
        """Take note that everyone's layers are new: all that was known is of the old ones."""
        self._stuck.clear()
        for clients in self._sound.values():
            clients.clear()

    def went_on(self, client_id: str, stage: Stage) -> None:
        """Take note that a client's work with these layers was sound."""
        self._sound[stage].add(client_id)
        self._stuck.discard(client_id)

    def stuck(self, client_id: str, stage: Stage) -> None:
        """Take note that a client cannot go on from these layers."""
        self._stuck.add(client_id)
        self._sound[stage].discard(client_id)

    def is_stuck(self, client_id: str) -> bool:
        """Tell whether a client could not go on from these layers, the last time that it tried."""
        return client_id in self._stuck

    def fault(self, client_id: str, stage: Stage, clients: Collection[str]) -> Fault:
        """Say whose fault it is that a client is stuck; `clients` are those at work."""
        compared = {client_id, *clients}
        if 2 * len(self._sound[stage] & compared - self._stuck) >= len(compared):
            return Fault.ITS_OWN
        if 2 * len(self._stuck & compared) > len(compared):
            return Fault.THE_MERGES
        return Fault.OPEN
