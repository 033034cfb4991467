"""`splitfl server`, `replay`, `rollback`: their arguments; their work is imported when they run."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from splitfl.command_line import add_config_arguments, saved_on_sigterm

if TYPE_CHECKING:
    from splitfl.telemetry.findings import Finding


class Server:
    """Host the backbone of one run."""

    summary = "host the backbone: wait for clients, train with them, merge their layers, write the model"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        add_config_arguments(parser)
        parser.add_argument(
            "--resume",
            choices=("auto", "never"),
            default="auto",
            help="auto (default): go on with the run that server.run_id names, or without it with the latest"
            " interrupted run in server.runs_dir. The settings that decide the weights must be the same. never:"
            " begin a new one. More rounds prolong a run that is named, also a finished one"
            " (docs/reliability.md)",
        )
        parser.add_argument("--json", action="store_true", help="print the report as JSON at the end, and no progress")

    def run(self, arguments: argparse.Namespace) -> None:
        """Read the config and serve one run."""
        with saved_on_sigterm():
            from server_backbone.host import serve
            from splitfl.config.trees import ServerConfig

            config = ServerConfig.load(arguments.config, arguments.overrides)
            serve(config, as_json=arguments.json, resumes=arguments.resume == "auto", stop=arguments.stop)


class Replay:
    """Do a run's log again."""

    summary = "do a run's log again from its snapshots, and compare every bit with what is saved"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a server's run, e.g. runs/20261122-093000")
        parser.add_argument("--json", action="store_true", help="print what was found as JSON")

    def run(self, arguments: argparse.Namespace) -> None:
        """Do it, and end with an error if a bit differs."""
        from server_backbone.replay import replay
        from splitfl.errors import StorageError
        from splitfl.telemetry.units import counted

        found = replay(arguments.run_dir)
        if arguments.json:
            sys.stdout.write(json.dumps(asdict(found)) + "\n")
        else:
            sys.stdout.write(
                f"{counted(found.commits, 'commit')} done again from snapshot {found.from_generation} to commit"
                f" {found.last_commit}; {counted(found.snapshots_equal, 'snapshot')} equal in every bit; weights"
                f" {found.digest}\n"
            )
        if found.problems:
            raise StorageError(
                f"{arguments.run_dir}: the log and what is saved differ: {'; '.join(found.problems[:5])}"
            )


class Rollback:
    """Take a run back to a snapshot."""

    summary = "take a stopped run back to its last snapshot, or an earlier one; clients go back with it"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a server's run; its server must be stopped")
        parser.add_argument("--to", type=int, metavar="N", help="the snapshot's number (state/snapshot-N.bin)")

    def run(self, arguments: argparse.Namespace) -> None:
        """Do it and say where the run stands."""
        from server_backbone.replay import rollback

        generation, commit_number = rollback(arguments.run_dir, arguments.to)
        sys.stdout.write(
            f"back at commit {commit_number} (snapshot {generation}); later records are kept as state/*.dropped. Start"
            " the server again: clients go back with it\n"
        )


def check(path: Path, overrides: Sequence[str]) -> "Iterator[Finding]":
    """Say what a server with this config will do, without doing it (`splitfl check`)."""
    from server_backbone.server_check import check_server

    return check_server(path, overrides)
