"""What the demo's runs share, and the files that their server and clients would be given."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfl.demo.hpo import ClinicFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all runs of one demo share."""

    model_dir: Path
    clinics: Mapping[str, ClinicFiles]
    arguments: argparse.Namespace


def server_settings(plan: Plan, run_dir: Path, address: str, num_clients: int) -> dict[str, Any]:
    """Return the server's file."""
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


def client_settings(
    plan: Plan, run_dir: Path, address: str, name: str, also_evaluate: Mapping[str, str]
) -> dict[str, Any]:
    """Return a clinic\'s file; it is tested on `also_evaluate` too, files by name."""
    files = plan.clinics[name]
    return {
        "client": {"client_id": name, "server_address": address, "output_dir": str(run_dir.parent)},
        "data": {"path": str(files.train), "eval_path": str(files.eval), "also_evaluate": dict(also_evaluate)},
    }
