"""The report of a run, derived from its events alone: `report.json`, `report.html` and the table a run ends with."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from splitfl.reporting.figures import measure_rows
from splitfl.reporting.page import render_page
from splitfl.reporting.view import Life, RunView, Told
from splitfl.reporting.whole_run import Step, WholeRun, whole_run
from splitfl.telemetry.measures import measured_in
from splitfl.telemetry.metrics import Event, jsonable
from splitfl.telemetry.units import format_bytes, format_change, format_loss, printable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

Report: TypeAlias = dict[str, Any]

_STARTED_FIELDS = ("run_id", "model", "server_mode", "local_steps", "fingerprint", "device", "num_threads", "machine")
_SERVER_FIELDS = ("peak_rss_bytes", "bytes_sent", "bytes_received", "compute_seconds")
_DONE_FIELDS = ("num_examples", "num_truncated", "peak_rss_bytes", "wall_seconds", "compute_seconds")


def build_report(events: Iterable[Event]) -> Report:
    """Derive the report; what the events do not tell is None, and a run without its end is not `complete`.

    `eval_loss_before` and `eval_loss_after` are plain means over the same clients: those evaluated both times, or all
    that were evaluated before while none was after.
    """
    run = whole_run(events)
    view, lives = run.now, run.now.lives
    clients = [_client(run, client_id) for client_id in run.client_ids]
    before, after = _mean_losses(clients)
    return {name: view.started.get(name) for name in _STARTED_FIELDS} | {
        "complete": view.complete,
        "date": _date(lives),
        "reason": view.finished.get("reason") or None,
        "stopped": lives[-1].stopped.get("reason") if lives and not view.finished else None,
        "wall_seconds": _wall_seconds(lives),
        "num_rounds": sum(merge.accepted for merge in run.merges),
        "num_rounds_planned": view.started.get("num_rounds"),
        "steps": run.num_commits,
        "stopped_early": view.rounds_ended.get("reason") or None,
        "best_round": view.rounds_ended.get("best_round") or None,
        "eval_loss_before": before,
        "eval_loss_after": after,
        "federated": run.together(),
        "clients": clients,
        "server": _server(lives),
        "copies": _copies(view),
        "merges": [asdict(merge) for merge in run.merges],
        "curves": {client_id: _curve(run.steps.get(client_id, {})) for client_id in run.client_ids},
        "held_out": {client_id: run.held_out(client_id) for client_id in run.client_ids},
        "evaluations": [_without_envelope(event) for event in run.evaluations],
        "model_dir": view.finished.get("model_dir"),
        "pids": {"server": view.finished.get("pid", view.started.get("pid"))},
        "versions": view.started.get("versions", {}),
        "settings": view.started.get("settings", {}),
        "settings_changed": [dict(change) for change in run.changes],
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


def _client(run: WholeRun, client_id: str) -> dict[str, Any]:
    client, steps = run.now.client(client_id), list(run.steps.get(client_id, {}).values())
    before, after = (run.evaluation(client_id, phase) for phase in ("before", "after"))
    counted = client.traffic
    return (
        {"client_id": client_id}
        | {name: client.done.get(name) for name in _DONE_FIELDS}
        | {
            "eval_loss_before": before.get("eval_loss"),
            "eval_loss_after": after.get("eval_loss"),
            "num_eval_examples": (after or before).get("num_eval_examples"),
            "measures_before": measured_in(before),
            "measures_after": measured_in(after),
            "also": after.get("also") or {},
            "also_before": before.get("also") or {},
            "bytes_sent": client.done.get("bytes_sent", counted and counted.sent),
            "bytes_received": client.done.get("bytes_received", counted and counted.received),
            "steps": len(steps),
            "num_tokens": sum(step.num_tokens for step in steps),
            "num_label_tokens": sum(step.num_label_tokens for step in steps),
            "padding_share": _padding_share(steps),
            "left": None if client.done else client.left,
        }
    )


def _wall_seconds(lives: Iterable[Life]) -> float | None:
    """Return how long the run was served; of a process that was killed, the span of its events is all that is known."""
    return _sum_of_known(life.end.get("wall_seconds", max(0.0, life.last_s - life.first_s)) for life in lives)


def _server(lives: Sequence[Life]) -> dict[str, Any]:
    """Add up what the run has taken on the server; of a process that was killed, only its steps tell something."""
    if not any(life.end for life in lives):
        return dict.fromkeys(_SERVER_FIELDS)
    peaks = [life.end["peak_rss_bytes"] for life in lives if life.end.get("peak_rss_bytes") is not None]
    return {
        "peak_rss_bytes": max(peaks, default=None),
        "bytes_sent": _sum_of_known(life.bytes_sent for life in lives),
        "bytes_received": _sum_of_known(life.bytes_received for life in lives),
        "compute_seconds": _sum_of_known(life.end.get("compute_seconds", life.compute_seconds) for life in lives),
    }


def _sum_of_known(values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _padding_share(steps: Sequence[Step]) -> float | None:
    """Return which part of the positions that were sent in training is padding; None where nobody has counted."""
    positions = sum(step.num_positions for step in steps)
    return 1 - sum(step.num_tokens for step in steps) / positions if positions else None


def _copies(view: RunView) -> dict[str, int] | None:
    """Return what the server held for each client by itself, None where all share one backbone."""
    if not view.started.get("bytes_per_copy"):
        return None
    return {"bytes_each": view.started["bytes_per_copy"], "most_at_once": view.lives[-1].end.get("most_copies")}


def _curve(steps: Mapping[int, Step]) -> list[list[Any]]:
    return [[number, step.loss] for number, step in steps.items() if step.loss is not None]


def _mean_losses(clients: Iterable[dict[str, Any]]) -> tuple[float | None, float | None]:
    pairs = [(client["eval_loss_before"], client["eval_loss_after"]) for client in clients]
    both = [pair for pair in pairs if None not in pair]
    if both:
        return _mean([before for before, _ in both]), _mean([after for _, after in both])
    return _mean([before for before, _ in pairs if before is not None]), None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _date(lives: Sequence[Life]) -> str | None:
    """Return when the run began, in UTC as ISO 8601."""
    return datetime.fromtimestamp(lives[0].first_s, tz=UTC).isoformat(timespec="seconds") if lives else None


def _without_envelope(event: Told) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in {"event", "time", "elapsed_s"}}


def _replace(path: Path, text: str) -> None:
    """Write next to the file and move over it, so that a reader sees the old or the new one."""
    half_written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half_written.write_text(text, encoding="utf-8")
        half_written.replace(path)
    finally:
        half_written.unlink(missing_ok=True)
