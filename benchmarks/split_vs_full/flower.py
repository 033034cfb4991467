"""The arms "LoRA FL" and "full FL": Flower's SuperLink, and a SuperNode for each client, as processes on loopback."""

import json
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import tomlkit

from benchmarks.split_vs_full.flower_home import flower_home, flower_version
from benchmarks.split_vs_full.measured import Outcome, RoundWatch, imports_of, use_of_marked
from benchmarks.split_vs_full.plan import Job
from benchmarks.split_vs_full.processes import ROOT, Processes
from benchmarks.split_vs_full.relay import Relay
from splitfl.commands.fleet import free_port
from splitfl.errors import Incomplete

# Flower looks for assignments in the text of the module before it takes an app.
_APP_MODULE = """from benchmarks.split_vs_full import flower_app

client_app = flower_app.client_app
server_app = flower_app.server_app
"""

# What a client's process imports; its message is in memory before it does, so it cannot be seen there.
_IMPORTS = """
import json, sys, time
import flwr.supernode.runtime.run_clientapp, benchmarks.split_vs_full.flower_app
from splitfl.telemetry.memory import rss_bytes
sys.stdout.write(json.dumps([rss_bytes(), time.process_time()]))
"""


def run_flower(job: Job) -> Outcome:
    """Train with Flower's FedAvg; each client learns with one thread."""
    programs, folder = flower_home(), job.out_dir
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    environment = _environment(programs, folder, job.num_threads)
    imports = imports_of([str(programs / "python"), "-c", _IMPORTS], environment)
    with ExitStack() as stack:
        processes = stack.enter_context(Processes(folder))
        relays = {name: stack.enter_context(Relay(port)) for name in sorted(job.clients)}
        watch = RoundWatch(folder, job.budget.num_rounds, processes.seconds, relays.values())
        link = ["--insecure", "--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
        processes.start("server", [str(programs / "flower-superlink"), *link], environment)
        for name, relay in relays.items():
            node = ["--insecure", "--superlink", f"127.0.0.1:{relay.port}", "--node-config", f'client="{name}"']
            command = [str(programs / "flower-supernode"), *node, "--host", "127.0.0.1", "--port", str(free_port())]
            processes.start(name, command, environment)
        _submit(programs, _write_app(folder, job, port), environment, processes)
        processes.wait_until(lambda: _is_done(folder), watch.tick)
        wall_seconds = processes.seconds()
    done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    clients = {
        name: use_of_marked(processes.used(name), folder / name / "marks.jsonl", imports=imports, relay=relay)
        for name, relay in relays.items()
    }
    server = processes.used("server")
    return Outcome(
        rounds={"everyone": watch.rounds},
        clients=clients,
        num_label_tokens=done["num_label_tokens"],
        wall_seconds=wall_seconds,
        server_cpu_seconds=server.cpu_seconds,
        server_peak_rss=server.tree_peak_rss,
        notes={"flwr": flower_version(), "seconds_of_strategy": done["seconds"]},
    )


def _environment(programs: Path, folder: Path, num_threads: int) -> dict[str, str]:
    return {
        "PATH": os.pathsep.join([str(programs), os.environ.get("PATH", "")]),
        "FLWR_HOME": str(folder / "flwr-home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": str(num_threads),
    }


def _write_app(folder: Path, job: Job, port: int) -> Path:
    """Write the app that Flower sends to its nodes: it only names the code of this repository."""
    app = folder / "app"
    app.mkdir(exist_ok=True)
    (app / "splitvsfull.py").write_text(_APP_MODULE, encoding="utf-8")
    project = {
        "project": {"name": "splitvsfull", "version": "1.0.0", "license": "Apache-2.0", "dependencies": []},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "splitfl",
                    "components": {
                        "serverapp": "splitvsfull:server_app",
                        "clientapp": "splitvsfull:client_app",
                    },
                    "config": {"job": str(job.write(folder / "job.json"))},
                }
            }
        },
    }
    (app / "pyproject.toml").write_text(tomlkit.dumps(project), encoding="utf-8")
    home = folder / "flwr-home"
    home.mkdir(exist_ok=True)
    connection = {"superlink": {"default": "here", "here": {"address": f"127.0.0.1:{port}", "insecure": True}}}
    (home / "config.toml").write_text(tomlkit.dumps(connection), encoding="utf-8")
    return app


def _submit(programs: Path, app: Path, environment: dict[str, str], processes: Processes) -> None:
    """Hand the app to the SuperLink, as soon as it listens."""
    command = [str(programs / "flwr"), "run", str(app), "here"]
    ours = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    said = "the SuperLink does not listen"

    def is_taken() -> bool:
        nonlocal said
        done = subprocess.run(command, env=ours, capture_output=True, text=True, check=False, timeout=120)
        said = done.stdout + done.stderr
        return done.returncode == 0

    for _ in range(_TRIES):
        if is_taken():
            return
        processes.wait([])
    raise Incomplete(f"flwr run failed: {' '.join(said.split())[-300:]}")


_TRIES = 20


def _is_done(folder: Path) -> bool:
    failed = folder / "failed.json"
    if failed.exists():
        trace = json.loads(failed.read_text(encoding="utf-8"))
        raise Incomplete(f"Flower's server app failed: {trace.strip().splitlines()[-1]}; see {folder}")
    return (folder / "done.json").exists()
