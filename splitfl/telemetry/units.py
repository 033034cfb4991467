"""Bytes, seconds and losses as people read them."""

from collections.abc import Iterator, Mapping
from typing import Any

from splitfl.telemetry.measures import MEASURES


def format_bytes(num_bytes: float | None) -> str:
    """Write a size in decimal units (1 kB is 1000 B), as `1.2 MB`; unknown is a dash."""
    if num_bytes is None:
        return "-"
    if abs(num_bytes) < 1000:
        return f"{num_bytes:.0f} B"
    size = float(num_bytes)
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if abs(size) < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"


def format_seconds(seconds: float | None) -> str:
    """Write a span as `9.4 s`, `3 min 05 s` or `2 h 05 min`; unknown is a dash."""
    if seconds is None:
        return "-"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def counted(number: int, one: str, many: str = "") -> str:
    """Write a number and what it counts: `1 round`, `2 rounds`; `many` where the plural takes more than an s."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def format_loss(loss: float | None) -> str:
    """Write a loss (nats a token) with three decimals; unknown is a dash."""
    return "-" if loss is None else f"{loss:.3f}"


def format_measure(name: str, value: float | None) -> str:
    """Write a measure of held-out text by its name: shares as a percentage, others with three decimals."""
    if value is None:
        return "-"
    measure = MEASURES[name]
    if measure.is_share:
        return f"{value:.1%}"
    return f"{value:,.3f}" if value < 1e5 else f"{value:.3g}"


def format_change(before: float | None, after: float | None) -> str:
    """Write `after - before` with its sign; a dash where either is unknown."""
    return "-" if before is None or after is None else f"{after - before:+.3f}"


def format_share(share: float | None) -> str:
    """Write a part of a whole as `12.3 %`; unknown is a dash."""
    return "-" if share is None else f"{share:.1%}".replace("%", " %")


def format_weight(weight: float) -> str:
    """Write a client's weight in a merge: counts as `1,234`, anything else with three decimals."""
    return f"{weight:,.0f}" if weight == int(weight) else f"{weight:,.3f}"


def format_weights(merge: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each client of a merge and what it counted; of one that was held down, what it would have counted too."""
    capped = merge.get("capped", {})
    for client_id, weight in merge["clients"].items():
        held_down = f", held down from {format_weight(capped[client_id])}" if client_id in capped else ""
        yield client_id, format_weight(weight) + held_down


def printable(text: object, most: int | None = None) -> str:
    """Replace control characters, so that a name or a reason from a peer cannot steer the terminal.

    What is longer than `most` characters is cut off there.
    """
    return "".join(character if character.isprintable() else "?" for character in str(text)[:most])
