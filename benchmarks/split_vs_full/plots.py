"""The curves and bars as PNG files: loss against bytes and against wall time, and the memory of a client."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.split_vs_full.arms import arms_of
from benchmarks.split_vs_full.claims import client_use, of_arm
from benchmarks.split_vs_full.plan import Table

_TABLES: tuple[Table, ...] = ("lora", "full")


def write_plots(cells: Sequence[Mapping[str, Any]], folder: Path, stem: str) -> list[Path]:
    """Draw what there is; returns the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    done = [found for found in cells if found["status"] == "done" and found["study"] == "arms"]
    if not done:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    curves = {"bytes": ("bytes_per_client", 1e6, "MB up and down per client"), "wall": ("seconds", 1.0, "seconds")}
    paths = [
        _curves(done, folder / f"{stem}-loss-against-{name}.png", key, scale, label)
        for name, (key, scale, label) in curves.items()
    ]
    return [*paths, _memory(done, folder / f"{stem}-memory.png")]


def _curves(cells: Sequence[Mapping[str, Any]], path: Path, key: str, scale: float, label: str) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for ax, table in zip(axes, _TABLES, strict=True):
        for arm in arms_of(table):
            # the first seed's curve; the spread of the ends is in the tables
            for found in of_arm(cells, arm.name, table)[:1]:
                points = [(end[key] / scale, end["mean_loss"]) for end in found["rounds"]]
                if len(points) > 1 and (key != "bytes_per_client" or points[-1][0] > 0):
                    ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=arm.title[table])
        ax.set_title({"lora": "LoRA", "full": "full weights"}[table])
        ax.set_xlabel(label)
        ax.set_ylabel("held-out loss, mean over clients")
        if key == "bytes_per_client":
            ax.set_xscale("symlog", linthresh=0.1)
        if ax.lines:
            ax.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _memory(cells: Sequence[Mapping[str, Any]], path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
    names, values = [], []
    for table in _TABLES:
        for arm in arms_of(table):
            peak = client_use(of_arm(cells, arm.name, table), "peak_rss_above_imports")
            if peak is not None:
                names.append(f"{arm.title[table]} ({table})")
                values.append(peak / 1e6)
    ax.barh(names, values)
    ax.invert_yaxis()
    ax.set_xlabel("client's peak memory above imports, MB")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
