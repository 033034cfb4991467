"""The report of a run, derived from its events alone: `report.json`, `report.html` and the table a run ends with."""

import json
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from splitfl.reporting.figures import measure_rows
from splitfl.reporting.page import render_page
from splitfl.telemetry.measures import federated, measured_in
from splitfl.telemetry.metrics import Event, jsonable
from splitfl.telemetry.units import format_bytes, format_change, format_loss, printable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

Report: TypeAlias = dict[str, Any]

_STARTED_FIELDS = ("run_id", "model", "server_mode", "local_steps", "fingerprint", "device", "num_threads", "machine")
_SERVER_FIELDS = ("peak_rss_bytes", "bytes_sent", "bytes_received", "compute_seconds")
_DONE_FIELDS = ("num_examples", "num_truncated", "peak_rss_bytes", "wall_seconds", "compute_seconds")


def build_report(events: Sequence[Event]) -> Report:
    """Derive the report; what the events do not tell is None, and a run without its end is not `complete`.

    `eval_loss_before` and `eval_loss_after` are plain means over the same clients: those evaluated both times, or all
    that were evaluated before while none was after.
    """
    started = _last(events, "run_started")
    lives = _lives(events)
    finished = _last(lives[-1] if lives else (), "run_finished")  # a run may end, and be prolonged
    clients = [_client(client_id, events) for client_id in _client_ids(events)]
    merges = [_merge(event, events) for event in _latest(events, "merged", "round")]
    before, after = _mean_losses(clients)
    return {name: started.get(name) for name in _STARTED_FIELDS} | {
        "complete": bool(finished.get("complete", False)),
        "date": _date(events),
        "reason": finished.get("reason") or None,
        "stopped": None if finished else _last(lives[-1] if lives else (), "run_stopped").get("reason"),
        "wall_seconds": _wall_seconds(lives),
        "num_rounds": sum(merge["accepted"] for merge in merges),
        "num_rounds_planned": started.get("num_rounds"),
        "steps": _num_commits(events, started.get("server_mode")),
        "stopped_early": _last(events, "rounds_ended").get("reason") or None,
        "best_round": _last(events, "rounds_ended").get("best_round") or None,
        "eval_loss_before": before,
        "eval_loss_after": after,
        "federated": _federated(events),
        "clients": clients,
        "server": _server(lives),
        "copies": _copies(started, _end_of(lives[-1]) if lives else {}),
        "merges": merges,
        "curves": {client["client_id"]: _curve(client["client_id"], events) for client in clients},
        "evaluations": [_without_envelope(event) for event in _named(events, "evaluated")],
        "model_dir": finished.get("model_dir"),
        "pids": {"server": finished.get("pid", started.get("pid"))},
        "versions": started.get("versions", {}),
        "settings": started.get("settings", {}),
        "settings_changed": [
            {"time": event.get("time"), **change}
            for event in _named(events, "settings_changed")
            for change in event["changes"]
        ],
    }


def write_report(run_dir: Path, report: Report) -> Path:
    """Write `report.json` and `report.html`, each whole or not at all, and return the page's path.

    Beside what `build_report` gives, the page shows `samples` (list of title, prompt, before, after, reference) and
    `alone` (each client trained alone: `clients`, `mean_own`, `mean_all`, `federation_mean`) where the caller added
    them.
    """
    plain = jsonable(report)
    run_dir.mkdir(parents=True, exist_ok=True)
    _replace(run_dir / "report.json", json.dumps(plain, indent=2, allow_nan=False) + "\n")
    page = run_dir / "report.html"
    _replace(page, render_page(plain))
    return page


def summary_table(report: Report) -> "Table":
    """Draw the clients, their mean and the server as a table for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("client")
    for name in ("examples", "held-out before", "held-out after", "change", "sent", "received", "peak RSS", "seconds"):
        table.add_column(name, justify="right")
    for client in report["clients"]:
        table.add_row(*_cells(client["client_id"], client))
    table.add_section()
    means = {name: report[name] for name in ("eval_loss_before", "eval_loss_after")}
    table.add_row(*_cells("mean", means, unknown=""), style="bold")
    table.add_row(*_cells("server", report["server"] | {"wall_seconds": report["wall_seconds"]}, unknown=""))
    return table


def measures_table(report: Report) -> "Table | None":
    """Draw what was measured of the held-out text of all clients together; None where nothing was."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    rows = measure_rows(report)
    if not rows:
        return None
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("held-out")
    for name in ("before", "after", "mean of clients", "worst client"):
        table.add_column(name, justify="right")
    for row in rows:
        worst = "-" if row["worst"] is None else f"{row['worst']} ({printable(row['worst_client'])})"
        cells = [row["title"], row["before"] or "-", row["after"] or "-", row["mean"] or "-", worst]
        table.add_row(*map(Text, cells))
    return table


def _cells(name: str, row: dict[str, Any], *, unknown: str = "-") -> list["Text"]:
    """Write a row; `Text`, because a name may look like markup."""
    from rich.text import Text

    before, after, seconds = (row.get(key) for key in ("eval_loss_before", "eval_loss_after", "wall_seconds"))
    cells = [str(row["num_examples"]) if row.get("num_examples") is not None else "-"]
    cells += [format_loss(before), format_loss(after), format_change(before, after)]
    cells += [format_bytes(row.get(key)) for key in ("bytes_sent", "bytes_received", "peak_rss_bytes")]
    cells += ["-" if seconds is None else f"{seconds:.1f}"]
    return [Text(printable(name)), *(Text(unknown if cell == "-" else cell) for cell in cells)]


def _client(client_id: str, events: Sequence[Event]) -> dict[str, Any]:
    own = [event for event in events if event.get("client_id") == client_id]
    done, steps = _last(own, "client_done"), _latest(own, "step", "step")
    before, after = _evaluation(own, "before"), _evaluation(own, "after")
    return (
        {"client_id": client_id}
        | {name: done.get(name) for name in _DONE_FIELDS}
        | {
            "eval_loss_before": before.get("eval_loss"),
            "eval_loss_after": after.get("eval_loss"),
            "num_eval_examples": (after or before).get("num_eval_examples"),
            "measures_before": measured_in(before),
            "measures_after": measured_in(after),
            "also": after.get("also") or {},
            "also_before": before.get("also") or {},
            "bytes_sent": done.get("bytes_sent", _counted_in_steps(own, "bytes_sent")),
            "bytes_received": done.get("bytes_received", _counted_in_steps(own, "bytes_received")),
            "steps": len(steps),
            "num_tokens": sum(step.get("num_tokens", 0) for step in steps),
            "num_label_tokens": sum(step["num_label_tokens"] for step in steps),
            "padding_share": _padding_share(steps),
            "left": None if done else _last(own, "client_left").get("reason"),
        }
    )


def _lives(events: Sequence[Event]) -> list[list[Event]]:
    """Return the events of each process that served the run: what they count begins anew with each."""
    lives: list[list[Event]] = []
    for event in events:
        if event["event"] == "run_started" or not lives:
            lives.append([])
        lives[-1].append(event)
    return lives


def _end_of(life: Sequence[Event]) -> Event:
    """Return what a process has said of itself at its end, nothing if it was killed."""
    return _last(life, "run_finished") or _last(life, "run_stopped")


def _wall_seconds(lives: Sequence[Sequence[Event]]) -> float | None:
    """Return how long the run was served; of a process that was killed, the span of its events is all that is known."""
    seconds = [_end_of(life).get("wall_seconds", _seconds_seen(life)) for life in lives]
    return sum(each for each in seconds if each is not None) if seconds else None


def _server(lives: Sequence[Sequence[Event]]) -> dict[str, Any]:
    """Add up what the run has taken on the server; of a process that was killed, only its steps tell something."""
    ends = [_end_of(life) for life in lives]
    if not any(ends):
        return dict.fromkeys(_SERVER_FIELDS)
    peaks = [end["peak_rss_bytes"] for end in ends if end.get("peak_rss_bytes") is not None]
    steps = [_named(life, "step") for life in lives]
    computed = [
        end.get("compute_seconds", each[-1].get("compute_seconds") if each else None)
        for end, each in zip(ends, steps, strict=True)
    ]
    return {
        "peak_rss_bytes": max(peaks, default=None),
        # what the server has sent, its clients have received
        "bytes_sent": _sum_of_known(_total(life, "bytes_sent", "bytes_received") for life in lives),
        "bytes_received": _sum_of_known(_total(life, "bytes_received", "bytes_sent") for life in lives),
        "compute_seconds": _sum_of_known(computed),
    }


def _total(life: Sequence[Event], name: str, of_clients: str) -> int | None:
    known: int | None = _end_of(life).get(name)
    if known is not None:
        return known
    clients = [[event for event in life if event.get("client_id") == each] for each in _client_ids(life)]
    return _sum_of_known(_counted_in_steps(own, of_clients) for own in clients)


def _counted_in_steps(own: Sequence[Event], name: str) -> int | None:
    """Add up what a client's steps say it has sent or received, which counts anew with each process of the server."""
    total, last = None, 0
    for step in _named(own, "step"):
        value = step.get(name) or 0
        total = (total or 0) + (value - last if value >= last else value)
        last = value
    return total


def _sum_of_known(values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _padding_share(steps: Sequence[Event]) -> float | None:
    """Return which part of the positions that were sent in training is padding; None where nobody has counted."""
    positions = sum(step.get("num_positions", 0) for step in steps)
    return 1 - sum(step.get("num_tokens", 0) for step in steps) / positions if positions else None


def _federated(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Put together what the clients measured before, after each round and after the run, in that order."""
    groups: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    for event in _named(events, "evaluated"):
        groups.setdefault((event["phase"], event["round"]), {})[event["client_id"]] = measured_in(event)
    order = ("before", "round", "after")
    return [
        {"phase": phase, "round": round_, "num_clients": len(clients), "measures": federated(clients)}
        for (phase, round_), clients in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    ]


def _copies(started: Event, finished: Event) -> dict[str, int] | None:
    """Return what the server held for each client by itself, None where all share one backbone."""
    if not started.get("bytes_per_copy"):
        return None
    return {"bytes_each": started["bytes_per_copy"], "most_at_once": finished.get("most_copies")}


def _merge(event: Event, events: Sequence[Event]) -> dict[str, Any]:
    """Join a merge with the digests its clients computed after loading it.

    `equal` asks for the server's digest from every client in the merge that did not leave early, and from any other
    that loaded it; where merges are made as uploads come in, a client may get a later one instead.
    """
    loaded = [other for other in _named(events, "loaded") if other["round"] == event["round"]]
    digests = {other["client_id"]: other["digest"] for other in loaded}
    gone = {other["client_id"] for other in _named(events, "client_left")}
    gone -= {other["client_id"] for other in _named(events, "client_done")}
    expected = set(digests) if "uploads" in event else (set(event["clients"]) - gone) | set(digests)
    equal = bool(digests) and all(digests.get(client_id) == event["digest"] for client_id in expected)
    fields = ("round", "accepted", "reason", "clients", "absent", "digest")
    also = {name: event.get(name, {}) for name in ("capped", "moved")}
    told = {"client_digests": digests, "equal": event["accepted"] and equal}
    return {name: event[name] for name in fields} | also | told


def _num_commits(events: Sequence[Event], server_mode: str | None) -> int:
    """Count commits: in `shared` one commit holds a step of each client, elsewhere each step is a commit of its own."""
    steps = _named(events, "step")
    if server_mode == "shared":
        return len({step["commit_number"] for step in steps})
    return len({(step["client_id"], step["step"]) for step in steps})


def _curve(client_id: str, events: Sequence[Event]) -> list[list[Any]]:
    own = [event for event in events if event.get("client_id") == client_id]
    return [[step["step"], step["loss"]] for step in _latest(own, "step", "step") if step["loss"] is not None]


def _mean_losses(clients: Iterable[dict[str, Any]]) -> tuple[float | None, float | None]:
    pairs = [(client["eval_loss_before"], client["eval_loss_after"]) for client in clients]
    both = [pair for pair in pairs if None not in pair]
    if both:
        return _mean([before for before, _ in both]), _mean([after for _, after in both])
    return _mean([before for before, _ in pairs if before is not None]), None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _date(events: Sequence[Event]) -> str | None:
    """Return when the run began, in UTC as ISO 8601."""
    return datetime.fromtimestamp(events[0]["time"], tz=UTC).isoformat(timespec="seconds") if events else None


def _seconds_seen(events: Sequence[Event]) -> float | None:
    """Return the span of the events: all that is known of a run that was killed."""
    return max(0.0, events[-1]["time"] - events[0]["time"]) if events else None


def _client_ids(events: Iterable[Event]) -> list[str]:
    return sorted({event["client_id"] for event in events if "client_id" in event})


def _evaluation(events: Sequence[Event], phase: str) -> Event:
    return next((event for event in reversed(_named(events, "evaluated")) if event["phase"] == phase), {})


def _named(events: Iterable[Event], name: str) -> list[Event]:
    return [event for event in events if event["event"] == name]


def _last(events: Iterable[Event], name: str) -> Event:
    """Return the last event of that name, empty where there is none."""
    named = _named(events, name)
    return named[-1] if named else {}


def _latest(events: Iterable[Event], name: str, key: str) -> list[Event]:
    """Return the last event for each value of `key`, in order of it: a resumed run says some things twice."""
    return [event for _, event in sorted({event[key]: event for event in _named(events, name)}.items())]


def _without_envelope(event: Event) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in {"event", "time", "elapsed_s"}}


def _replace(path: Path, text: str) -> None:
    """Write beside the file and move over it, so that a reader sees the old or the new one."""
    half_written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half_written.write_text(text, encoding="utf-8")
        half_written.replace(path)
    finally:
        half_written.unlink(missing_ok=True)
