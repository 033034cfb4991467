"""A run from its first event to its last: where it stands (`RunView`), and all its steps, merges and measurements."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitfl.reporting.view import RunView, Told
from splitfl.telemetry.measures import federated, measured_in
from splitfl.telemetry.metrics import Event

_PHASES = ("before", "round", "after")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of one client, as it was told last."""

    loss: float | None
    num_label_tokens: int
    num_tokens: int
    num_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeView:
    """One merge, and the digests that its clients computed after they had loaded it."""

    round: int
    accepted: bool
    reason: str
    clients: Mapping[str, float]
    absent: Sequence[str]
    digest: str
    capped: Mapping[str, float]
    moved: Mapping[str, float]
    client_digests: Mapping[str, str]
    equal: bool
    """Whether every client that should hold the merged layers has shown that it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeRun:
    """A run from its first event to its last; what was told twice, after a restart, counts once."""

    now: RunView
    client_ids: tuple[str, ...]
    """Sorted."""
    steps: Mapping[str, Mapping[int, Step]]
    """Of each client, in the order of their numbers."""
    num_commits: int
    """In `shared` one commit holds a step of each client; elsewhere each step is a commit of its own."""
    evaluations: tuple[Told, ...]
    merges: tuple[MergeView, ...]
    changes: tuple[Told, ...]
    """Settings that were others at an earlier start."""

    def evaluation(self, client_id: str, phase: str) -> Told:
        """Return the client's last evaluation of a phase, empty where there is none."""
        mine = (found for found in reversed(self.evaluations) if found["client_id"] == client_id)
        return next((found for found in mine if found["phase"] == phase), {})

    def together(self) -> list[dict[str, Any]]:
        """Put together what the clients measured before, after each round and after the run, in that order."""
        groups: dict[tuple[int, int], dict[str, dict[str, float]]] = defaultdict(dict)
        for found in self.evaluations:
            groups[_PHASES.index(found["phase"]), found["round"]][found["client_id"]] = measured_in(found)
        return [
            {"phase": _PHASES[phase], "round": round_, "num_clients": len(clients), "measures": federated(clients)}
            for (phase, round_), clients in sorted(groups.items())
        ]

    def held_out(self, client_id: str) -> list[tuple[int, float]]:
        """Lay a client's losses over rounds: before is 0; after is the last round, and replaces that round's own."""
        last = max([1, sum(merge.accepted for merge in self.merges), *(e["round"] or 0 for e in self.evaluations)])
        mine = [found for found in self.evaluations if found["client_id"] == client_id]
        points: dict[int, float | None] = {}
        ends = {"before": 0, "after": last}
        for phase in _PHASES:
            for found in (found for found in mine if found["phase"] == phase):
                points[found["round"] if phase == "round" else ends[phase]] = found["eval_loss"]
        return [(x, loss) for x, loss in sorted(points.items()) if loss is not None]


def whole_run(events: Iterable[Event]) -> WholeRun:
    """Fold all events of a run."""
    now, told = RunView(), defaultdict[str, list[Event]](list)
    client_ids: set[str] = set()
    for event in events:
        now = now.after(event)
        told[event["event"]].append(event)
        client_ids.add(event.get("client_id") or "")
    steps = _steps(told["step"])
    return WholeRun(
        now=now,
        client_ids=tuple(sorted(client_ids - {""})),
        steps=steps,
        num_commits=len({event["commit_number"] for event in told["step"]})
        if now.started.get("server_mode") == "shared"
        else sum(map(len, steps.values())),
        evaluations=tuple(told["evaluated"]),
        merges=tuple(_merges(told["merged"], told["loaded"], now)),
        changes=tuple(
            {"time": event["time"], **change} for event in told["settings_changed"] for change in event["changes"]
        ),
    )


def _steps(events: Iterable[Event]) -> dict[str, dict[int, Step]]:
    found: dict[str, dict[int, Step]] = defaultdict(dict)
    for event in events:
        found[event["client_id"]][event["step"]] = Step(
            loss=event["loss"],
            num_label_tokens=event["num_label_tokens"],
            num_tokens=event.get("num_tokens", 0),
            num_positions=event.get("num_positions", 0),
        )
    return {client_id: dict(sorted(steps.items())) for client_id, steps in found.items()}


def _merges(merged: Iterable[Event], loaded: Iterable[Event], now: RunView) -> Iterable[MergeView]:
    digests: dict[int, dict[str, str]] = defaultdict(dict)
    for event in loaded:
        digests[event["round"]][event["client_id"]] = event["digest"]
    gone = {client.client_id for client in now.clients.values() if client.left is not None and not client.done}
    for round_, event in sorted({event["round"]: event for event in merged}.items()):
        yield _merge(event, digests[round_], gone)


def _merge(event: Event, digests: Mapping[str, str], gone: set[str]) -> MergeView:
    """Join a merge with its clients' digests.

    `equal` asks for the server's digest from every client in the merge that did not leave early, and from any other
    that loaded it. Where merges are made as uploads come in, a client may get a later one instead.
    """
    expected = set(digests) if "uploads" in event else (set(event["clients"]) - gone) | set(digests)
    equal = bool(digests) and all(digests.get(client_id) == event["digest"] for client_id in expected)
    fields = {name: event[name] for name in ("round", "accepted", "reason", "clients", "absent", "digest")}
    also = {name: event.get(name, {}) for name in ("capped", "moved")}
    return MergeView(**fields, **also, client_digests=digests, equal=event["accepted"] and equal)
