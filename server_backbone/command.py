"""`splitfl server`: its arguments. What it does is imported when it runs, so that `--help` is quick."""

import argparse

from splitfl.command_line import add_config_arguments, saved_on_sigterm


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
            help="go on with an interrupted run of the same settings (default), or begin a new one",
        )
        parser.add_argument("--json", action="store_true", help="print the report as JSON at the end, and no progress")

    def run(self, arguments: argparse.Namespace) -> None:
        """Read the config and serve one run."""
        with saved_on_sigterm():
            from server_backbone.serve import serve
            from splitfl.config import ServerConfig

            config = ServerConfig.load(arguments.config, arguments.overrides)
            serve(config, as_json=arguments.json, resumes=arguments.resume == "auto")
