"""`splitfl export`: write what a run has trained as an ordinary Hugging Face directory, whole or as a PEFT adapter."""

import argparse
import json
import sys
from pathlib import Path


class Export:
    """Write a run's model or adapter."""

    summary = "write a run's model (or only its adapter) as a directory that transformers (or peft) loads"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument(
            "run_dir", type=Path, metavar="RUN_DIR", help="a run's folder, such as runs/20261122-093000"
        )
        parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="a folder that is new or empty")
        parser.add_argument(
            "--format",
            choices=("merged", "adapter"),
            default="merged",
            help="merged: the whole model (default); adapter: what PeftModel.from_pretrained puts on the base model",
        )
        parser.add_argument(
            "--client",
            default="",
            metavar="CLIENT_ID",
            help="whose backbone, where clients train copies of their own that are never merged",
        )
        parser.add_argument("--json", action="store_true", help="print where it is as JSON")

    def run(self, arguments: argparse.Namespace) -> None:
        """Export."""
        from splitfl.models.export import export_run

        where = export_run(arguments.run_dir, arguments.output_dir, arguments.format, arguments.client)
        if arguments.json:
            sys.stdout.write(json.dumps({"model_dir": str(where), "format": arguments.format}) + "\n")
            return
        sys.stdout.write(f"{'adapter' if arguments.format == 'adapter' else 'model'}: {where}\n")
