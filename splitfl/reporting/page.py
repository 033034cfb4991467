"""The report as one HTML page that needs nothing beside itself: style, plots and numbers inline.

`templates/report.html` is the page. jinja2 escapes all that goes into it but the plots, which hold no text from users.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined

from splitfl.reporting import plots
from splitfl.reporting.figures import client_rows, measure_rows
from splitfl.telemetry.units import (
    format_bytes,
    format_change,
    format_loss,
    format_seconds,
    format_share,
    format_weights,
)

Report: TypeAlias = Mapping[str, Any]

_DASH = "\u2013"
_PATH = re.compile(r"(?:(?<=ipc://)|(?<![\w/.:~<-]))(?:/|[A-Za-z]:[\\/])[^\s\"'<>|,;]+")


def render_page(report: Report) -> str:
    """Write the whole page; `samples` and `alone` are shown where the report has them."""
    titles, rows = client_rows(report)
    return (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            about=[report["model"], _mode(report), report["device"], report["machine"], _date(report)],
            traffic=_traffic(report["server"]),
            have_plots=plots.have_matplotlib(),
            figures=_figures(report) if plots.have_matplotlib() else (),
            alone=report.get("alone"),
            samples=report.get("samples"),
            measures=measure_rows(report),
            client_measures={"titles": titles, "rows": rows},
            facts={
                "Trained model": report["model_dir"],
                "Settings fingerprint": report["fingerprint"],
                "Steps a round": report["local_steps"],
                "Server threads": report["num_threads"],
            },
            settings=_flat(report["settings"]),
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("splitfl.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"dash": _DASH, "num_colours": plots.NUM_COLOURS}
    environment.filters |= {
        "change": _change,
        "count": lambda number: _DASH if number is None else f"{number:,}",
        "loss": lambda loss: _DASH if loss is None else format_loss(loss),
        "minute": _minute,
        "num_equal": _num_equal,
        "pathless": _without_paths,
        "seconds": format_seconds,
        "setting": _setting,
        "share": lambda share: _DASH if share is None else format_share(share),
        "size": lambda num_bytes: _DASH if num_bytes is None else format_bytes(num_bytes),
        "tenths": lambda seconds: _DASH if seconds is None else f"{seconds:,.1f}",
        "weights": lambda merge: ", ".join(f"{client_id} ({weight})" for client_id, weight in format_weights(merge)),
    }
    return environment


def _mode(report: Report) -> str | None:
    return f"{report['server_mode']} backbone" if report["server_mode"] else None


def _date(report: Report) -> str | None:
    """Write the report's ISO date, which is in UTC, to the minute."""
    return f"{report['date'][:16].replace('T', ' ')} UTC" if report["date"] else None


def _traffic(server: Mapping[str, int | None]) -> int | None:
    """Return the bytes both ways, None where either is unknown."""
    sent, received = server["bytes_sent"], server["bytes_received"]
    return None if sent is None or received is None else sent + received


def _figures(report: Report) -> list[tuple[str, str]]:
    """Return the plots that there is something for, as SVG and caption."""
    training, held_out = (_known(report[name]) for name in ("curves", "held_out"))
    figures = []
    if any(training.values()):
        figures.append((plots.plot_training(training), "Training loss by step: smoothed, raw points faint."))
    if any(held_out.values()):
        means = _mean_points(held_out)
        plot = plots.plot_held_out(held_out, means, ended=any(client["measures_after"] for client in report["clients"]))
        mean = " Broad grey line: mean over clients." if len(held_out) > 1 and len(means) > 1 else ""
        figures.append((plot, f"Loss on each client's held-out text (dots).{mean}"))
    return figures


def _known(curves: Mapping[str, Iterable[Sequence[Any]]]) -> dict[str, list[tuple[float, float]]]:
    return {client_id: [(x, y) for x, y in points if y is not None] for client_id, points in curves.items()}


def _mean_points(curves: Mapping[str, Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Average over clients at each x that every evaluated client has, so that the mean never changes its members."""
    evaluated = [dict(points) for points in curves.values() if points]
    shared = sorted(set.intersection(*map(set, evaluated)))
    return [(x, sum(points[x] for points in evaluated) / len(evaluated)) for x in shared]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Name each setting in full, as `--set` takes it."""
    rows = []
    for name, value in tree.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else [(prefix + name, value)]
    return rows


def _change(before: float | None, after: float | None) -> str:
    return _DASH if before is None or after is None else format_change(before, after)


def _minute(seconds: float) -> str:
    """Write seconds since 1970 as a date and time in UTC."""
    return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M")


def _num_equal(merge: Mapping[str, Any]) -> str:
    """Say how many clients loaded what the server merged; silence is not reported as a difference."""
    digests = merge["client_digests"]
    same = sum(digest == merge["digest"] for digest in digests.values())
    return f"{same} of {max(len(digests), len(merge['clients']))}"


def _setting(value: Any) -> str:
    match value:
        case None | {} | []:
            return _DASH
        case bool():
            return str(value).lower()
        case list():
            return ", ".join(map(_setting, value))
        case _:
            return _without_paths(value)


def _without_paths(value: object) -> str:
    """Shorten absolute paths to their last part: a page that is passed on says nothing of the machine's folders."""
    text = str(value)
    for flavour in (PurePosixPath, PureWindowsPath):
        if flavour(text).is_absolute():
            return f"…/{flavour(text).name}"
    return _PATH.sub(lambda found: "…/" + re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)
