"""Decides from the histories of a run's processes whether a step was lost or counted twice.

`python -m benchmarks.history RUN_DIR CLIENT_DIR ...` reads the `history.jsonl` of a server and of its clients
(`server.history = true`, `client.history = true`).

Five rules must hold. Commit numbers rise by one. Each commit's step is its members' next one. Every step that was
acknowledged to a client is in the server's order and was applied by the client, once. A step that is applied again
after a crash gives the same weights as before it. All sides agree on merges. Where a side goes back (`rewound`,
`rolled_back`), what came later counts as not having been.

With `storage.durability = "snapshot"` a side that starts again goes back as well, to its last snapshot and no further.
Undone steps are counted (`steps_undone`), and the steps after them must go on from there.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from splitfl.config.trees import ServerConfig
from splitfl.telemetry.history import HISTORY_FILE
from splitfl.telemetry.metrics import Event, read_events


@dataclass(slots=True)
class Verdict:
    """What the histories say."""

    steps_acknowledged: int = 0
    """Different (client, step) that a client was told of."""
    steps_lost: int = 0
    steps_twice: int = 0
    steps_reordered: int = 0
    steps_undone: int = 0
    """Acknowledged steps that came after the snapshot that a side went back to, where only snapshots are durable."""
    digests_differ: int = 0
    commits: int = 0
    restarts: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether nothing was found."""
        return not self.problems


@dataclass(slots=True)
class _Server:
    """The server's order: what each commit holds, and the weights after it."""

    members: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    acknowledged: dict[tuple[str, int], int] = field(default_factory=dict)
    merges: dict[int, str] = field(default_factory=dict)
    last: int = 0
    durable: int = 0
    """The commit of the last snapshot."""
    undone: set[tuple[str, int, int]] = field(default_factory=set)
    """Client, step and commit of what was acknowledged and is not any more."""


def check(server_history: Path, client_histories: Mapping[str, Path], *, keeps_records: bool = True) -> Verdict:
    """Compare a server's history with its clients'; `keeps_records` is `durability = "redo"`."""
    verdict = Verdict()
    server = _read_server(read_events(server_history), verdict, keeps_records=keeps_records)
    applied_of = {
        name: _read_client(name, read_events(path), server, verdict, keeps_records=keeps_records)
        for name, path in client_histories.items()
    }
    _compare(server, applied_of, verdict)
    verdict.steps_undone = len(server.undone)
    verdict.commits = server.last
    return verdict


def _read_server(events: Iterable[Event], verdict: Verdict, *, keeps_records: bool) -> _Server:
    server = _Server()
    for event in events:
        match event["event"]:
            case "started":
                verdict.restarts += bool(event["resumed"])
                if not keeps_records and event["commit_number"] < server.last:
                    _start_behind(server, event["commit_number"], verdict)
                # commits that were recorded and not applied before it died are applied, or snapshot, by now
                server.last = max(server.last, event["commit_number"])
            case "applied":
                _server_applied(server, event, verdict)
            case "redone":
                _same_weights(server, event, verdict)
                server.last = max(server.last, event["commit_number"])
            case "acknowledged":
                key, number = (event["client_id"], event["step"]), event["commit_number"]
                if server.acknowledged.setdefault(key, number) != number:
                    verdict.steps_twice += 1
                    verdict.problems.append(f"step {key} acknowledged as commits {server.acknowledged[key]}, {number}")
            case "snapshot":
                server.durable = event["commit_number"]
            case "merged":
                server.merges[event["round"]] = event["digest"]
            case "rolled_back":
                _go_back(server, event["commit_number"])
    return server


def _server_applied(server: _Server, event: Event, verdict: Verdict) -> None:
    number = event["commit_number"]
    if number != server.last + 1:
        twice = number <= server.last
        verdict.steps_twice += twice
        verdict.steps_lost += not twice
        verdict.problems.append(f"server: commit {number} applied where {server.last + 1} is next")
    server.last = max(server.last, number)
    server.members[number] = [(member["client_id"], member["step"]) for member in event["members"]]
    _same_weights(server, event, verdict)


def _same_weights(server: _Server, event: Event, verdict: Verdict) -> None:
    number, digest = event["commit_number"], event["digest"]
    if server.digests.setdefault(number, digest) != digest:
        verdict.digests_differ += 1
        verdict.problems.append(f"server: commit {number} gave other weights when it was applied again")


def _start_behind(server: _Server, number: int, verdict: Verdict) -> None:
    if number < server.durable:
        verdict.steps_lost += server.durable - number
        verdict.problems.append(f"server: started at commit {number}, with a snapshot of commit {server.durable}")
    server.undone |= {(*key, at) for key, at in server.acknowledged.items() if at > number}
    _go_back(server, number)


def _go_back(server: _Server, number: int) -> None:
    server.last = number
    server.members = {key: value for key, value in server.members.items() if key <= number}
    server.digests = {key: value for key, value in server.digests.items() if key <= number}
    server.acknowledged = {key: value for key, value in server.acknowledged.items() if value <= number}


@dataclass(slots=True)
class _Client:
    applied: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Commit number and digest by step."""
    acknowledged: dict[int, int] = field(default_factory=dict)
    begun_anew_at: int = -1
    """The step up to which it has no records: its disk was lost, or they were of an older moment."""
    last: int = 0


def _read_client(
    name: str, events: Iterable[Event], server: _Server, verdict: Verdict, *, keeps_records: bool
) -> _Client:
    client = _Client()
    for event in events:
        match event["event"]:
            case "started":
                verdict.restarts += bool(event["resumed"])
                if not keeps_records:
                    told = client.acknowledged.items()
                    server.undone |= {(name, step, number) for step, number in told if step > event["step"]}
                    _client_goes_back(client, event["step"])
                client.last = event["step"]
            case "acknowledged":
                client.acknowledged[event["step"]] = event["commit_number"]
            case "applied":
                _client_applied(name, client, event, verdict)
            case "redone":
                step, found = event["step"], (event["commit_number"], event["digest"])
                if client.applied.setdefault(step, found) != found:
                    verdict.digests_differ += 1
                    verdict.problems.append(f"{name}: step {step} gave other weights when it was applied again")
                client.last = max(client.last, step)
            case "rewound":
                _client_goes_back(client, event["step"])
            case "rejoined":
                client.begun_anew_at = client.last = event["step"]
            case "loaded" if server.merges.get(event["round"], event["digest"]) != event["digest"]:
                verdict.digests_differ += 1
                verdict.problems.append(f"{name}: holds other layers after round {event['round']} than were merged")
    return client


def _client_goes_back(client: _Client, step: int) -> None:
    client.last = step
    client.applied = {key: value for key, value in client.applied.items() if key <= step}
    client.acknowledged = {key: value for key, value in client.acknowledged.items() if key <= step}


def _client_applied(name: str, client: _Client, event: Event, verdict: Verdict) -> None:
    step = event["step"]
    if step <= client.last:
        kind = "twice" if step in client.applied else "out of order"
        verdict.steps_twice += kind == "twice"
        verdict.steps_reordered += kind != "twice"
        verdict.problems.append(f"{name}: step {step} applied {kind}, after step {client.last}")
    client.last = max(client.last, step)
    client.applied[step] = (event["commit_number"], event["digest"])


def _compare(server: _Server, clients: Mapping[str, _Client], verdict: Verdict) -> None:
    committed: dict[tuple[str, int], list[int]] = {}
    for number, members in sorted(server.members.items()):
        for key in members:
            committed.setdefault(key, []).append(number)
    for key, numbers in committed.items():
        if len(numbers) > 1:
            verdict.steps_twice += 1
            verdict.problems.append(f"server: step {key} is in commits {numbers}")
    told = {**server.acknowledged}
    for name, client in clients.items():
        told |= {(name, step): number for step, number in client.acknowledged.items()}
    verdict.steps_acknowledged = len(told)
    for (name, step), number in told.items():
        _check_step(name, step, number, committed, server, clients.get(name), verdict)
    for name in clients:
        steps = [step for client_id, step in committed if client_id == name]
        if steps != sorted(steps):
            verdict.steps_reordered += 1
            verdict.problems.append(f"server: steps of {name} are not in order")


def _check_step(
    name: str,
    step: int,
    number: int,
    committed: Mapping[tuple[str, int], list[int]],
    server: _Server,
    client: _Client | None,
    verdict: Verdict,
) -> None:
    where = committed.get((name, step))
    # a commit that was recorded by a process that died before it could say so has no members here, but a number
    is_hidden = where is None and number <= server.last and number not in server.members
    if not is_hidden and where != [number]:
        verdict.steps_lost += where is None
        verdict.problems.append(f"step {step} of {name}: acknowledged as commit {number}, applied as {where}")
    if client is None or step <= client.begun_anew_at:
        return
    mine = client.applied.get(step)
    if mine is None:
        verdict.steps_lost += 1
        verdict.problems.append(f"{name}: step {step} acknowledged as commit {number} and not applied")
    elif mine[0] != number:
        verdict.problems.append(f"{name}: step {step} applied as commit {mine[0]}, acknowledged as {number}")


def last_digests(history: Path, counter: str) -> dict[int, set[str]]:
    """Return the digests of the weights after each commit or step, as `counter` says, without what was undone."""
    found: dict[int, set[str]] = {}
    for event in read_events(history):
        match event["event"]:
            case "applied" | "redone":
                found.setdefault(event[counter], set()).add(event["digest"])
            case "started" | "rewound":
                found = {number: digests for number, digests in found.items() if number <= event[counter]}
    return found


def begun_anew(history: Path) -> dict[int, int]:
    """Return the steps at which a client has begun anew, and the step of the records that it then had."""
    found: dict[int, int] = {}
    at = 0
    for event in read_events(history):
        match event["event"]:
            case "applied" | "redone":
                at = event["step"]
            case "rejoined":
                found[event["step"]], at = at, event["step"]
            case "started" | "rewound":
                at = event["step"]
                found = {step: before for step, before in found.items() if step <= at}
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the verdict; 0 when nothing was found."""
    parser = argparse.ArgumentParser(prog="benchmarks.history", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("client_dirs", type=Path, nargs="+")
    arguments = parser.parse_args(argv)
    clients = {folder.name: folder / HISTORY_FILE for folder in arguments.client_dirs}
    keeps_records = ServerConfig.load(arguments.run_dir / "config.toml").storage.durability == "redo"
    verdict = check(arguments.run_dir / HISTORY_FILE, clients, keeps_records=keeps_records)
    summary: dict[str, Any] = asdict(verdict)
    print(json.dumps(summary, indent=2))
    return 0 if verdict.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
