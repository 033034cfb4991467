"""`splitfl simulate`: a server and N clients as processes of one command, on one file dealt out by a partitioner."""

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitfl.command_line import add_config_arguments
from splitfl.errors import ConfigError, Incomplete

if TYPE_CHECKING:
    from splitfl.config.trees import ServerConfig


class Simulate:
    """Try a run on this machine before there are any clinics."""

    summary = "try a run here: a server and N clients on one data file, dealt out by a partitioner"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        add_config_arguments(parser)
        parser.add_argument(
            "--data", type=Path, required=True, metavar="FILE", help="a .jsonl, .csv, .tsv, .parquet or .txt file"
        )
        parser.add_argument("--num-clients", type=int, default=2, metavar="N", help="clients to deal the data to (2)")
        parser.add_argument(
            "--partition",
            default="iid",
            metavar="HOW",
            help="iid, field:NAME (by a field's values), or dirichlet:NAME:ALPHA (a field's values in unlike shares)",
        )
        parser.add_argument(
            "--eval-fraction", type=float, default=0.1, metavar="SHARE", help="held out by each client (0.1)"
        )
        parser.add_argument("--num-threads", type=int, default=1, metavar="N", help="threads of each process (1)")
        parser.add_argument("--json", action="store_true", help="print the report as JSON at the end, and no progress")

    def run(self, arguments: argparse.Namespace) -> None:
        """Deal the data, run the processes, print where the report is."""
        report, run_dir = simulate(arguments)
        sys.stdout.write(json.dumps(report) + "\n" if arguments.json else f"report: {run_dir / 'report.html'}\n")


def simulate(arguments: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Run it all; returns the report and the run's folder."""
    from splitfl.commands.fleet import Fleet, free_port
    from splitfl.config.own import PolicySection
    from splitfl.config.rules import objections_to
    from splitfl.config.trees import ClientConfig, ServerConfig
    from splitfl.federation.partition import partitioner_from, read_records, write_partitions
    from splitfl.reporting.report import write_report

    if arguments.num_clients < 1:
        raise ConfigError(f"--num-clients {arguments.num_clients}: must be at least 1")
    if not 0 <= arguments.eval_fraction < 1:
        raise ConfigError(f"--eval-fraction {arguments.eval_fraction:g}: must be at least 0 and below 1")
    config = ServerConfig.load(arguments.config, arguments.overrides)
    parts = partitioner_from(arguments.partition, arguments.num_clients, config.seed).partition(
        read_records(arguments.data)
    )
    run_id = config.server.run_id or datetime.now().strftime("%Y%m%d-%H%M%S")
    run_dir = config.server.runs_dir / run_id
    if (run_dir / "config.toml").exists():
        raise ConfigError(
            f"{run_dir} holds a run: set server.run_id to another name, or leave it empty for date and time"
        )
    address = f"tcp://127.0.0.1:{free_port()}"
    settings = config.model_dump(mode="json", exclude_none=True)
    settings["server"] |= {"address": address, "run_id": run_id}
    settings["server"].pop("keys", None)  # nothing leaves this machine, and these clients have none
    settings["federation"] |= {"min_available_clients": arguments.num_clients}
    # one user is both parties here, so nothing is kept from the run; what a clinic's own policy would say is said
    policy, objections = _policy_for(config), objections_to(PolicySection(), config)
    if objections and not arguments.json:
        sys.stdout.write(f"note: a client's [policy] as shipped does not allow this: {'; '.join(objections)}\n")
    clients: dict[str, dict[str, Any]] = {}
    for number, path in enumerate(write_partitions(arguments.data, run_dir / "partitions", parts)):
        own = {"client_id": f"client-{number}", "server_address": address, "output_dir": str(config.server.runs_dir)}
        clients[own["client_id"]] = {
            "client": own,
            "data": {"path": str(path), "eval_fraction": arguments.eval_fraction},
            "policy": policy,
        }
        ClientConfig.from_tree(clients[own["client_id"]], source="simulate")

    failed = []
    with Fleet(
        folder=run_dir / "processes",
        num_threads=arguments.num_threads,
        shows_server=not arguments.json,
        stop=arguments.stop,
    ) as fleet:

        def note_exit(name: str, code: int) -> None:
            if code != 0:
                failed.append(f"{name} ended with exit code {code}: {fleet.last_words(name)}")

        fleet.start("server", "server_backbone", settings)
        for name, tree in clients.items():
            fleet.start(name, "client_edge", tree)
        fleet.wait(note_exit)
        report: dict[str, Any] = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
        report["pids"] |= fleet.pids
        report["peak_pss_bytes"] = fleet.peak_pss_bytes
        write_report(run_dir, report)
    if failed:
        raise Incomplete("; ".join(failed))
    return report, run_dir


def _policy_for(config: "ServerConfig") -> dict[str, Any]:
    """Return a policy that allows a run's settings."""
    return {
        "min_bottom_layers": min(1, config.model.bottom_layers),
        "min_top_layers": min(1, config.model.top_layers),
        "allow_embeddings": config.train.embeddings,
        "allow_answers": config.evaluation.generates,
        "max_rounds": max(1000, config.federation.num_rounds),
        "max_steps": max(100_000, 2 * config.total_steps),
        "max_silence": max(300.0, config.link.heartbeat_timeout),
        "max_learning_rate": max(10.0, config.optimizer.learning_rate),
    }
