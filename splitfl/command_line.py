"""The one command, `splitfl`: finds its sub-commands, prints errors as sentences, ends with documented exit codes.

Each role registers its own sub-commands in the entry-point group `splitfl.commands`; a module named there must import
nothing heavy, so that `splitfl --help` is quick.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from splitfl import __version__
from splitfl.errors import SplitflError
from splitfl.stopping import StopRequest, Terminated, on_signals

_INTERRUPTED = 130


class Command(Protocol):
    """One sub-command."""

    summary: str
    """One line for `--help`."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments."""
        ...

    def run(self, arguments: argparse.Namespace) -> None:
        """Do it, or raise a `SplitflError`; `arguments.stop` is the process's `StopRequest`."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run `splitfl` and return its exit code."""
    found = sorted(entry_points(group="splitfl.commands"), key=lambda entry: entry.name)
    return _run({entry.name: entry.load()() for entry in found}, argv)


def run_one(name: str, command: Command, argv: Sequence[str] | None = None) -> int:
    """Run one command as `python -m PACKAGE` does; return its exit code."""
    return _run({name: command}, [name, *(sys.argv[1:] if argv is None else argv)])


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add `--config` and `--set`."""
    parser.add_argument("--config", type=Path, required=required, metavar="FILE.toml", help="the settings")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="a setting that overrides the file's; may be given several times",
    )


def _run(commands: Mapping[str, Command], argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="splitfl",
        description="Train a language model together without sharing text: clients keep text, labels and the ends of"
        " the model; a server computes the blocks in between.",
    )
    parser.add_argument("--version", action="version", version=f"splitfl {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in commands.items():
        subparser = subparsers.add_parser(name, help=command.summary, description=command.summary)
        subparser.add_argument("-v", "--verbose", action="store_true", help="log what happens inside")
        command.configure(subparser)
    arguments = parser.parse_args(argv)
    level = logging.DEBUG if arguments.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Read when torch is loaded, which is later. Threads that spin while they wait take the cores from other processes
    # that compute; several of ours on one machine were six times slower with the default (docs/experiments.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments.stop = StopRequest()
    arguments.stop.raises = True
    try:
        with on_signals(arguments.stop, f"splitfl {arguments.command}"):
            commands[arguments.command].run(arguments)
    except SplitflError as error:
        sys.stderr.write(f"splitfl {arguments.command}: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write(f"splitfl {arguments.command}: interrupted\n")
        return _INTERRUPTED
    return 0


@contextmanager
def saved_on_sigterm() -> Iterator[None]:
    """End with 0 after SIGTERM: for commands that keep what matters on disk at every moment, also before they begin."""
    try:
        yield
    except Terminated:
        sys.stderr.write("stopped; the same command goes on from what is saved\n")
