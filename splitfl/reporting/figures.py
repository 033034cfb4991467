"""What was measured of held-out text, as rows of the tables that the page and the terminal show."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from splitfl.telemetry.measures import MEASURES
from splitfl.telemetry.units import format_measure

Report: TypeAlias = Mapping[str, Any]


def measure_rows(report: Report) -> list[dict[str, Any]]:
    """Return, for each measure that there is, its figures over all clients as text; mean and worst are the last."""
    before, after = (_figures(report, phase) for phase in ("before", "after"))
    last = after or before
    return [
        {
            "title": measure.title,
            "before": _figure(before, name, "value"),
            "after": _figure(after, name, "value"),
            "mean": _figure(last, name, "mean"),
            "worst": _figure(last, name, "worst"),
            "worst_client": last.get(name, {}).get("worst_client"),
        }
        for name, measure in MEASURES.items()
        if name in before or name in after
    ]


def _figures(report: Report, phase: str) -> dict[str, dict[str, Any]]:
    found = [group["measures"] for group in report["federated"] if group["phase"] == phase]
    # clients that join late evaluate before they train, but not the layers that the others began with
    return (found[0] if phase == "before" else found[-1]) if found else {}


def _figure(figures: dict[str, dict[str, Any]], name: str, which: str) -> str | None:
    return format_measure(name, figures[name][which]) if name in figures else None


def client_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return the titles of all measures, and for each client its name and these before and after."""
    clients = [client for client in report["clients"] if client["measures_before"] or client["measures_after"]]
    there = [
        name
        for name in MEASURES
        if any(name in client["measures_before"] or name in client["measures_after"] for client in clients)
    ]
    rows = [[client["client_id"], *(_change(client, name) for name in there)] for client in clients]
    return [MEASURES[name].title for name in there], rows


def _change(client: Mapping[str, Any], name: str) -> str:
    before, after = (format_measure(name, client[which].get(name)) for which in ("measures_before", "measures_after"))
    return f"{before} \u2192 {after}"
