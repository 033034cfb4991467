"""Whether the disk has room for a run: asked by `splitfl check`, and by a server before it writes anything."""

import shutil
from pathlib import Path

from splitfl.config.trees import ServerConfig
from splitfl.errors import StorageError
from splitfl.models.cut import Cut
from splitfl.telemetry.findings import Finding
from splitfl.telemetry.units import format_bytes
from splitfl.training.backbones import backbone_of
from splitfl.training.forecast import Part


def room_for(config: ServerConfig, cut: Cut, *, run_dir: Path | None = None) -> Finding:
    """Compare what is free with the exported model and the snapshots of all that trains; raise `StorageError` if less.

    What an interrupted run in `run_dir` has on disk already, it need not write beside.
    """
    needed = max(0, _bytes_of_a_run(config, cut) - _bytes_in(run_dir))
    folder = config.server.runs_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{folder}: {format_bytes(free)} are free and the run's model and snapshots take about"
            f" {format_bytes(needed)}: make room, or set server.runs_dir to another disk"
        )
    return Finding(
        topic="disk",
        sentences=(
            f"The run's model and snapshots take about {format_bytes(needed)}; {format_bytes(free)} are free in"
            f" {folder}.",
        ),
        numbers={"free_bytes": free, "needed_bytes": needed},
    )


def _bytes_of_a_run(config: ServerConfig, cut: Cut) -> int:
    backbone, client = (Part.of(cut, side, config.optimizer) for side in ("server", "client"))
    exported = (backbone.weight_bytes + client.weight_bytes) * config.server.export_model
    copies = backbone_of(config).num_held(config.federation.min_available_clients)
    snapshot = copies * backbone.training_bytes + client.training_bytes
    return exported + config.storage.keep_snapshots * snapshot


def _bytes_in(run_dir: Path | None) -> int:
    if run_dir is None or not run_dir.is_dir():
        return 0
    return sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file())
