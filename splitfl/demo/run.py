"""The demo's runs: all clinics together, each alone if that is asked for, and what came of it."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from splitfl.commands.fleet import Fleet, free_port
from splitfl.config.own import default_cache_dir
from splitfl.demo.hpo import CITATION, write_clinics
from splitfl.demo.model import prepare_model
from splitfl.demo.settings import Plan, client_settings, server_settings
from splitfl.errors import ConfigError, Incomplete
from splitfl.reporting.report import write_report
from splitfl.telemetry.units import format_bytes

_SAMPLE_TOKENS = 48


def run_demo(arguments: argparse.Namespace, console: Console) -> tuple[dict[str, Any], Path]:
    """Do all of it; returns the report and the path of its page."""
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
    plan = Plan(model_dir=prepare_model(cache_dir, console), clinics=clinics, arguments=arguments)
    console.print(f"text: {CITATION}", markup=False)

    report = _federation(plan, run_dir, console)
    report["samples"] = [sample(plan, run_dir)]
    if arguments.compare_alone:
        report["alone"] = _alone(plan, run_dir, report, console)
    report["demo_wall_seconds"] = time.monotonic() - begun_s
    page = write_report(run_dir, report)
    _tell(report, console)
    return report, page


def sample(plan: Plan, run_dir: Path) -> dict[str, str]:
    """Let the untrained and the trained model define the first held-out term of a clinic."""
    clinic = next(iter(plan.clinics))
    record = json.loads(plan.clinics[clinic].eval.read_text(encoding="utf-8").splitlines()[0])
    command = [sys.executable, "-m", "splitfl.demo.sample", record["prompt"], str(_SAMPLE_TOKENS)]
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


def _federation(plan: Plan, run_dir: Path, console: Console) -> dict[str, Any]:
    """Train all clinics together."""
    names = list(plan.clinics)
    return _train(plan, run_dir, names, console, {}, shows_server=not plan.arguments.json)


def _alone(plan: Plan, run_dir: Path, together: Mapping[str, Any], console: Console) -> dict[str, Any]:
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
    plan: Plan,
    run_dir: Path,
    names: list[str],
    console: Console,
    also_evaluate: Mapping[str, str],
    *,
    shows_server: bool,
) -> dict[str, Any]:
    """Run one server and these clinics to their end and return the report."""
    address = f"tcp://127.0.0.1:{free_port()}"
    failed: dict[str, str] = {}

    with Fleet(folder=run_dir / "processes", shows_server=shows_server, stop=plan.arguments.stop) as fleet:

        def note_exit(name: str, code: int) -> None:
            if code != 0:
                failed[name] = fleet.last_words(name)
                console.print(f"{name} ended with exit code {code}: {failed[name]}", markup=False)

        fleet.start("server", "server_backbone", server_settings(plan, run_dir, address, len(names)))
        for name in names:
            fleet.start(name, "client_edge", client_settings(plan, run_dir, address, name, also_evaluate))
        fleet.wait(note_exit)
        report: dict[str, Any] = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
        report["pids"] |= fleet.pids
        report["peak_pss_bytes"] = fleet.peak_pss_bytes
    if failed:
        reasons = "; ".join(f"{name}: {words}" for name, words in failed.items())
        raise Incomplete(f"{len(failed)} of {len(names)} clinics did not finish ({reasons}); see {run_dir}")
    return report


def _tell(report: Mapping[str, Any], console: Console) -> None:
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
