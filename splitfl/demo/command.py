"""`splitfl demo`: the main job on real input."""

import argparse
import json
import sys
from pathlib import Path


class Demo:
    """Run the main job and show what came of it."""

    summary = "four clinics train a real language model on real text through one server, all on this machine"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument(
            "--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="where the run's folder goes"
        )
        parser.add_argument("--run-id", default="", metavar="NAME", help="name of the run (default: date and time)")
        parser.add_argument("--num-rounds", type=int, default=4, metavar="N", help="rounds, each ended by a merge (4)")
        parser.add_argument("--local-steps", type=int, default=6, metavar="N", help="steps of each clinic a round (6)")
        parser.add_argument("--num-eval", type=int, default=24, metavar="N", help="held-out terms of each clinic (24)")
        parser.add_argument("--seed", type=int, default=42, metavar="N", help="seed of data, adapters and order (42)")
        parser.add_argument(
            "--compare-alone",
            action="store_true",
            help="also train each clinic alone with the same budget, no merges and a backbone of its own",
        )
        parser.add_argument("--json", action="store_true", help="print the report as JSON at the end, and no progress")

    def run(self, arguments: argparse.Namespace) -> None:
        """Prepare, train, compare if asked to, and write the report."""
        from rich.console import Console

        from splitfl.demo.run import run_demo

        console = Console(stderr=arguments.json, soft_wrap=True, highlight=False)
        report, page = run_demo(arguments, console)
        if arguments.json:
            sys.stdout.write(json.dumps(report) + "\n")
        console.print(f"\nreport: {page}", markup=False)
