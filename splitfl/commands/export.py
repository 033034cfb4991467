"""`splitfl export`: write the model that a run has trained as an ordinary Hugging Face directory."""

import argparse
import json
import sys
from pathlib import Path


class Export:
    """Write a run's model."""

    summary = "write a run's model as a directory that AutoModelForCausalLM.from_pretrained loads"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument(
            "run_dir", type=Path, metavar="RUN_DIR", help="a run's folder, such as runs/20261122-093000"
        )
        parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="a folder that is new or empty")
        parser.add_argument("--json", action="store_true", help="print where it is as JSON")

    def run(self, arguments: argparse.Namespace) -> None:
        """Export."""
        from splitfl.models.export import export_run

        where = export_run(arguments.run_dir, arguments.output_dir)
        sys.stdout.write(json.dumps({"model_dir": str(where)}) + "\n" if arguments.json else f"model: {where}\n")
