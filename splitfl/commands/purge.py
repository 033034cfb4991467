"""`splitfl purge`: remove what a run has left on this machine that others must not find."""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from splitfl.errors import ConfigError

# What a run's folder may hold that was learned from text, or tells of it; docs/files.md lists them.
_LAYERS_OF_A_RUN = ("uploads", "versions", "adapters.safetensors", "trained*.safetensors", "best-*.safetensors")
_KEPT_BY_A_RUN = ("state", "history.jsonl", *_LAYERS_OF_A_RUN)


class Purge:
    """Remove records and snapshots."""

    summary = "remove a run's records, snapshots and uploads (or all of its folder) from this machine"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument(
            "folder", type=Path, metavar="DIR", help="a server's run (runs/RUN), or a client's (client-runs/RUN/CLIENT)"
        )
        parser.add_argument("--all", action="store_true", help="the whole folder: the report and the model too")
        parser.add_argument("--yes", action="store_true", help="do it; without it, only what would be removed is said")
        parser.add_argument("--json", action="store_true", help="print the paths as JSON")

    def run(self, arguments: argparse.Namespace) -> None:
        """Say what there is, and remove it if asked to."""
        folder: Path = arguments.folder
        if not (folder / "metrics.jsonl").is_file() and not (folder / "state").is_dir():
            raise ConfigError(f"{folder} is not the folder of a run: name runs/RUN or client-runs/RUN/CLIENT")
        check_idle(folder)
        paths = [folder] if arguments.all else list(_found(folder))
        if arguments.yes:
            for path in paths:
                remove(path)
        done = "removed" if arguments.yes else "would be removed (add --yes)"
        if arguments.json:
            sys.stdout.write(json.dumps({"removed": arguments.yes, "paths": [str(path) for path in paths]}) + "\n")
            return
        sys.stdout.write("".join(f"{done}: {path}\n" for path in paths) or f"{folder}: nothing to remove\n")


def _found(folder: Path) -> Iterator[Path]:
    return (path for pattern in _KEPT_BY_A_RUN for path in sorted(folder.glob(pattern)))


def check_idle(folder: Path) -> None:
    """Refuse while a process is at work in the folder."""
    if (folder / "state").is_dir():
        from splitfl.durability.store import check_idle

        check_idle(folder / "state")


def remove(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be removed: {error.strerror}") from None
