"""`splitfl check`: what a server or client with this config will do, said without joining or beginning a run.

Each role registers how it is checked in the entry-point group `splitfl.checks`.
"""

import argparse
import json
import sys
from importlib.metadata import entry_points

from splitfl.command_line import add_config_arguments
from splitfl.errors import SplitflError


class Check:
    """Look at a config and all it names."""

    summary = "read a server's or client's config, keys, data and model, and say what will happen; nothing is begun"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        add_config_arguments(parser)
        parser.add_argument("--json", action="store_true", help="print what was found as JSON")

    def run(self, arguments: argparse.Namespace) -> None:
        """Say what is found as it is found, and raise what is wrong."""
        from splitfl.config.reading import role_of

        role = role_of(arguments.config, arguments.overrides)
        (entry,) = entry_points(group="splitfl.checks", name=role)
        found: dict[str, object] = {"role": role}
        try:
            for finding in entry.load()(arguments.config, arguments.overrides):
                found[finding.topic] = {"says": list(finding.sentences), **finding.numbers}
                if not arguments.json:
                    sys.stdout.write("".join(f"{finding.topic:<10} {sentence}\n" for sentence in finding.sentences))
                    sys.stdout.flush()
        except SplitflError as error:
            found["error"] = {"says": str(error), "exit_code": error.exit_code}
            raise
        finally:
            if arguments.json:
                sys.stdout.write(json.dumps(found) + "\n")
        if not arguments.json:
            sys.stdout.write("all is well\n")
