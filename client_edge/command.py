"""`splitfl client`: its arguments. Its work is imported when it runs, so that `--help` is quick."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from splitfl.command_line import add_config_arguments, saved_on_sigterm

if TYPE_CHECKING:
    from splitfl.telemetry.findings import Finding


class Client:
    """Take part in one run."""

    summary = "take part in a run: keep text and labels here, train the ends of the model around the server's blocks"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        add_config_arguments(parser)
        parser.add_argument(
            "--resume",
            choices=("auto", "never"),
            default="auto",
            help="go on where this client was (default), or forget what it had kept of the run",
        )
        add_accept_argument(parser)
        parser.add_argument(
            "--json", action="store_true", help="print where this client's metrics are as JSON at the end"
        )

    def run(self, arguments: argparse.Namespace) -> None:
        """Read the config and take part."""
        with saved_on_sigterm():
            from client_edge.part.run import take_part
            from splitfl.config.trees import ClientConfig

            config = ClientConfig.load(arguments.config, arguments.overrides)
            accept = ACCEPT if arguments.accept else False
            folder = take_part(config, resumes=arguments.resume == "auto", accept=accept, stop=arguments.stop)
            if arguments.json:
                sys.stdout.write(json.dumps({"folder": str(folder)}) + "\n")


ACCEPT = "--accept"


def add_accept_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--accept`."""
    parser.add_argument(
        ACCEPT,
        action="store_true",
        help="accept what the run's settings let the server see, which is shown; needed once a run without a terminal",
    )


def check(path: Path, overrides: Sequence[str]) -> "Iterator[Finding]":
    """Say what a client with this config will do, without doing it (`splitfl check`)."""
    from client_edge.client_check import check_client

    return check_client(path, overrides)
