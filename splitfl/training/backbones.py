"""For whom the backbone trains: one for all clients, or a copy for each; and what that takes, by formula."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Protocol

from splitfl.config.kind import BackboneKind
from splitfl.config.trees import RunConfig
from splitfl.telemetry.findings import Finding
from splitfl.telemetry.units import format_bytes
from splitfl.training.forecast import Part, memory_of


class Backbone(Protocol):
    """What is asked of the backbone's weights in a run of several clients."""

    is_shared: bool
    """Whether a client that goes back to a snapshot takes the others with it."""

    def num_held(self, clients: int) -> int:
        """Return how many sets of what trains are held for so many clients."""
        ...

    def copy_bytes(self, part: Part) -> int:
        """Return the bytes of a client's own copy of the server's `part`, 0 where there is none."""
        ...

    def memory_of(self, part: Part, run: RunConfig, *, clients: int) -> Iterator[Finding]:
        """Say what the server's part takes; `clients` is how many the server lets in at once."""
        ...

    def notes(self, part: Part, run: RunConfig, *, clients: int) -> list[str]:
        """Say what an operator should know at a start."""
        ...


class OneForAll:
    """All clients train one set of weights, or none is trained."""

    is_shared = True

    def num_held(self, clients: int) -> int:
        return 1

    def copy_bytes(self, part: Part) -> int:
        return 0

    def memory_of(self, part: Part, run: RunConfig, *, clients: int) -> Iterator[Finding]:
        yield memory_of(part, "The backbone has", topic="memory")

    def notes(self, part: Part, run: RunConfig, *, clients: int) -> list[str]:
        return []


class CopyForEach:
    """Each client trains a copy of its own."""

    is_shared = False

    def num_held(self, clients: int) -> int:
        return clients

    def copy_bytes(self, part: Part) -> int:
        return part.copy_bytes

    def memory_of(self, part: Part, run: RunConfig, *, clients: int) -> Iterator[Finding]:
        yield memory_of(replace(part, training_bytes=0), "The backbone has", topic="memory")
        yield self._copies(part, run, clients)

    def notes(self, part: Part, run: RunConfig, *, clients: int) -> list[str]:
        return [text.rstrip(".") for text in self._copies(part, run, clients).sentences]

    def _copies(self, part: Part, run: RunConfig, clients: int) -> Finding:
        each, ready = part.copy_bytes, run.federation.min_available_clients
        kind = "adapters" if run.train.backbone == "lora" else "weights"
        return Finding(
            topic="copies",
            sentences=(
                f"Each client trains a copy of the backbone's {kind} of its own, {format_bytes(each)} here with"
                f" gradients and optimizer state: {format_bytes(ready * each)} for min_available_clients = {ready}, at"
                f" most {format_bytes(clients * each)} for server.max_clients = {clients}.",
            ),
            numbers={"bytes_per_copy": each, "most_copies": clients},
        )


_KINDS: Mapping[BackboneKind, Backbone] = {BackboneKind.ONE: OneForAll(), BackboneKind.COPIES: CopyForEach()}


def backbone_of(run: RunConfig) -> Backbone:
    """Return what both roles know of a run's kind of backbone."""
    return _KINDS[run.backbone_kind]
