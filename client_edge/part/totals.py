"""What a client's part in a run has taken, over all the processes it was done by."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from splitfl.telemetry.metrics import Event, read_events


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Bytes, memory and time."""

    bytes_sent: int = 0
    bytes_received: int = 0
    bytes_of_files: int = 0
    peak_rss_bytes: int = 0
    wall_seconds: float = 0.0
    compute_seconds: float = 0.0

    def and_then(self, later: "Totals") -> "Totals":
        """Add a later process's; of memory the most counts."""
        mine, theirs = asdict(self), asdict(later)
        added = {name: mine[name] + theirs[name] for name in mine}
        return Totals(**{**added, "peak_rss_bytes": max(self.peak_rss_bytes, later.peak_rss_bytes)})

    def as_fields(self) -> dict[str, Any]:
        """Return them by name."""
        return asdict(self)


def totals_before(path: Path) -> Totals:
    """Add up what this client's own metrics tell of its earlier processes; of a killed one, up to its last step."""
    total, life = Totals(), Totals()
    for event in read_events(path) if path.exists() else ():
        if event["event"] == "run_started":
            total, life = total.and_then(life), Totals()
        elif event["event"] in ("step", "client_stopped"):
            life = _read(event)
        elif event["event"] == "client_done":  # of all processes up to it
            total, life = Totals(), _read(event)
    return total.and_then(life)


def goodbye_before(path: Path) -> int:
    """Return the merge after which an earlier process has said goodbye, -1 if none has; who has may be killed then."""
    events = read_events(path) if path.exists() else ()
    return max((int(event["round"]) for event in events if event["event"] == "says_goodbye"), default=-1)


def _read(event: Event) -> Totals:
    known: Mapping[str, Any] = {name: event[name] for name in asdict(Totals()) if event.get(name) is not None}
    return Totals(**{"wall_seconds": event["elapsed_s"], **known})
