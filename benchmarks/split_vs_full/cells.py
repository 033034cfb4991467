"""Runs cells, each once: what a finished one has found is kept in its folder, and read from there the next time."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.split_vs_full.arms import BY_NAME, Arm
from benchmarks.split_vs_full.learning import batches_of
from benchmarks.split_vs_full.measured import Outcome
from benchmarks.split_vs_full.plan import Cell, Job, Learned
from benchmarks.split_vs_full.score import BASE, score_files, sizes_of
from benchmarks.split_vs_full.text import Source, write_clients
from splitfl.errors import Incomplete, SplitflError

Found: TypeAlias = dict[str, Any]
"""The results of a cell: `status` ("done", "not available", "failed"), and all figures of a done one."""

_FOUND_FILE = "found.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where cells are run, and on what."""

    work_dir: Path
    model_dir: Path
    source: Source
    say: Callable[[str], None]

    def kept(self, cell: Cell) -> Found | None:
        """Return what the cell has found in an earlier run, if it has been run."""
        file = self._folder(cell) / _FOUND_FILE
        return json.loads(file.read_text(encoding="utf-8")) | {"study": cell.study} if file.exists() else None

    def run(self, cell: Cell) -> Found:
        """Return what the cell has found, running it if it has not been run."""
        if (found_before := self.kept(cell)) is not None:
            return found_before
        folder = self._folder(cell)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        found: Found = {"cell": asdict(cell), "study": cell.study, "data": self.source.name}
        try:
            found |= self._run(cell, folder)
        except SplitflError as error:
            self.say(f"  failed: {error}")
            return found | {"status": "failed", "reason": str(error)}  # not kept: it is tried again
        if found["status"] == "done":
            for file in folder.rglob("*.safetensors"):
                file.unlink()
            for file in folder.rglob("*.pt"):
                file.unlink()
            (folder / _FOUND_FILE).write_text(json.dumps(found, indent=1, default=str), encoding="utf-8")
        return found

    def _folder(self, cell: Cell) -> Path:
        return self.work_dir / "cells" / f"{self.source.key}-{self.model_dir.name}-{cell.key}"

    def _run(self, cell: Cell, folder: Path) -> Found:
        arm = BY_NAME[cell.arm]
        job = self._job(cell, folder)
        if reason := arm.objection(cell, job):
            return {"status": "not available", "reason": reason}
        if arm.run is None:
            return {"status": "done", **_base(job)}
        outcome = arm.run(job, cell)
        return {"status": "done", **_found(arm, job, outcome)}

    def _job(self, cell: Cell, folder: Path) -> Job:
        clients = write_clients(
            self.source,
            folder / "text",
            dealt=cell.dealt,
            num_clients=cell.num_clients,
            num_eval=cell.budget.num_eval,
            seed=cell.seed,
        )
        return Job(
            model_dir=self.model_dir,
            learned=Learned(table=cell.table),
            budget=cell.budget,
            seed=cell.seed,
            clients=clients,
            out_dir=folder,
        )


def _base(job: Job) -> Found:
    scores = score_files(job, [BASE])
    return {"rounds": [], "models": {"everyone": _summary(scores[BASE])}, "num_learned": 0}


def _found(arm: Arm, job: Job, outcome: Outcome) -> Found:
    """Score what was trained, check that it is what should have been, and put the figures together."""
    everyone = outcome.rounds.get("everyone", [])
    last = {name: str(rounds[-1].file) for name, rounds in outcome.rounds.items()}
    files = [BASE, *dict.fromkeys([*(str(end.file) for end in everyone), *last.values()])]
    scores = score_files(job, files, may_lack=arm.learns != "all")
    # the curve begins with the model as it came
    first = {"round": 0, "seconds": 0.0, "bytes_per_client": 0.0} | _summary(scores[BASE])
    rounds = [
        {"round": number, "seconds": end.seconds, "bytes_per_client": end.bytes_per_client}
        | _summary(scores[str(end.file)])
        for number, end in enumerate(everyone, start=1)
    ]
    return {
        "rounds": [first, *rounds],
        "models": {name: _summary(scores[file]) for name, file in last.items()},
        "num_learned": _num_learned(arm, last, sizes_of(job)),
        "num_label_tokens": outcome.num_label_tokens,
        "wall_seconds": outcome.wall_seconds,
        "server_cpu_seconds": outcome.server_cpu_seconds,
        "server_peak_rss": outcome.server_peak_rss,
        "clients": {name: asdict(use) for name, use in outcome.clients.items()},
        "notes": dict(outcome.notes) | _positions(job),
    }


def _summary(scores: Mapping[str, Mapping[str, float]]) -> Found:
    """Return each client's loss, their plain mean and the worst, and the same of accuracies where there are any."""
    losses = {name: score["loss"] for name, score in scores.items()}
    summary: Found = {"loss": losses, "mean_loss": _mean(losses.values()), "worst_loss": max(losses.values())}
    accuracies = {name: score["accuracy"] for name, score in scores.items() if "accuracy" in score}
    if accuracies:
        summary |= {
            "accuracy": accuracies,
            "mean_accuracy": _mean(accuracies.values()),
            "worst_accuracy": min(accuracies.values()),
        }
    return summary


def _num_learned(arm: Arm, files: Mapping[str, str], expected: Mapping[str, int]) -> int:
    """Count what was trained; raise `Incomplete` unless every model has exactly what the arm says learns."""
    from safetensors import safe_open

    counts = set()
    for name, file in files.items():
        with safe_open(file, "pt") as tensors:
            shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
        if arm.learns == "all" and shapes.keys() != expected.keys():
            raise Incomplete(
                f"{arm.name}: {len(shapes)} tensors were trained for {name}, where {len(expected)} learn in this table"
            )
        counts.add(sum(_product(shape) for shape in shapes.values()))
    if len(counts) != 1 or (arm.learns == "all" and counts != {sum(expected.values())}):
        raise Incomplete(f"{arm.name}: {sorted(counts)} parameters were trained, not {sum(expected.values())}")
    return counts.pop()


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _positions(job: Job) -> Found:
    """Count positions, padding included: of all of a client's micro-batches, the mean over clients; of the largest."""
    steps = range(1, job.budget.num_steps + 1)
    counts = []
    for name, text in job.clients.items():
        batches = batches_of(name, text, job)
        counts.append([batch.input_ids_BS.numel() for step in steps for batch in batches.at(step)])
    return {"positions_per_client": _mean(map(sum, counts)), "positions_at_most": max(map(max, counts))}


def _mean(values: Any) -> float:
    listed = list(values)
    return float(sum(listed) / len(listed))
