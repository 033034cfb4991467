"""The report's plots as inline SVG: no text from users in them, colours left to the page."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points: TypeAlias = Sequence[tuple[float, float]]

NUM_COLOURS = 8
"""Series colours the page defines, as CSS variables --c0 to --c7; further series repeat them dashed."""

_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
# Stand-ins that matplotlib can parse; the page's own colours take their place in the finished SVG.
_TEXT_COLOUR, _GRID_COLOUR = "#0a0b01", "#0a0b02"
_SERIES_COLOURS = [f"#0a0c{number:02x}" for number in range(NUM_COLOURS)]
_PAGE_COLOURS = {_TEXT_COLOUR: "var(--muted)", _GRID_COLOUR: "var(--line)"} | {
    colour: f"var(--c{number})" for number, colour in enumerate(_SERIES_COLOURS)
}
_SETTINGS = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": _TEXT_COLOUR,
    "axes.edgecolor": _GRID_COLOUR,
    "axes.labelcolor": _TEXT_COLOUR,
    "xtick.color": _TEXT_COLOUR,
    "ytick.color": _TEXT_COLOUR,
    "grid.color": _GRID_COLOUR,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "ytick.major.size": 0,
}


def have_matplotlib() -> bool:
    """Tell whether plots can be drawn at all."""
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        return False
    return True


def smooth(points: Points, *, weight: float = 0.35) -> list[tuple[float, float]]:
    """Average each point with those before it, their share falling by `1 - weight` a point (Adam's bias correction)."""
    smoothed, total, share = [], 0.0, 0.0
    for step, loss in points:
        total = (1 - weight) * total + weight * loss
        share = (1 - weight) * share + weight
        smoothed.append((step, total / share))
    return smoothed


def plot_training(curves: Mapping[str, Points]) -> str:
    """Draw the training loss over steps, a line a client: smoothed, with the points faint beneath it."""
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _blank("step", "training loss")
        for number, points in enumerate(curves.values()):
            style = _style(number)
            axes.plot(*_columns(points), marker="o", markersize=2.5, linestyle="none", alpha=0.4, color=style["color"])
            axes.plot(*_columns(smooth(points)), linewidth=1.8, **style)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _to_svg(figure, "training")


def plot_held_out(curves: Mapping[str, Points], mean: Points, *, ended: bool) -> str:
    """Draw the held-out loss before (0), after each round, and the clients' mean; `ended`: the last x is "after"."""
    import matplotlib

    last = max((x for points in curves.values() for x, _ in points), default=0)
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _blank("round", "held-out loss")
        for number, points in enumerate(curves.values()):
            axes.plot(*_columns(points), marker="o", markersize=5, linewidth=1.8, **_style(number))
        if len(curves) > 1:
            axes.plot(*_columns(mean), linewidth=6, color=_TEXT_COLOUR, alpha=0.35, zorder=1.5)
        axes.set_xlim(-0.08 * last - 0.05, 1.08 * last + 0.05)
        axes.set_xticks(*_round_ticks(int(last), ended=ended))
        return _to_svg(figure, "held-out")


def _round_ticks(last: int, *, ended: bool) -> tuple[list[int], list[str]]:
    """Name the ends and about six of the rounds between them."""
    every = max(1, -(-last // 7))
    between = [number for number in range(every, last, every) if last - number >= every / 2]
    ticks = [0, *between, *([last] if last else [])]
    return ticks, ["before" if x == 0 else "after" if ended and x == last else str(x) for x in ticks]


def _blank(x_label: str, y_label: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _style(number: int) -> dict[str, Any]:
    dashes = _DASHES[number // NUM_COLOURS % len(_DASHES)]
    return {"color": _SERIES_COLOURS[number % NUM_COLOURS], "linestyle": dashes}


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _to_svg(figure: "Figure", name: str) -> str:
    """Write the figure as an SVG element that sits in a page: its own ids, the page's font and colours."""
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    svg = written.getvalue()
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg[svg.index("<svg") :]
    )  # the page sets the size
    for stand_in, colour in _PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    svg = re.sub(r'\bid="|url\(#|href="#', lambda found: f"{found[0]}{name}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # older versions of matplotlib write the `font` shorthand, newer ones `font-family`
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1; font-family: var(--font)", svg)
    return re.sub(r"font-family: '[^;\"]*", "font-family: var(--font)", svg)
