"""The arms of one process: centralised (all text in one place), and each client alone."""

import dataclasses
import json
import os
import sys

from benchmarks.split_vs_full.measured import Outcome, RoundWatch, use_of_marked
from benchmarks.split_vs_full.plan import Job
from benchmarks.split_vs_full.processes import Processes


def run_centralised(job: Job) -> Outcome:
    """Learn from all clients' text at once, with all threads."""
    return _run({"everyone": dataclasses.replace(job, num_threads=os.cpu_count() or 1)}, at_once=1)


def run_local(job: Job) -> Outcome:
    """Let every client learn alone, two at a time with a thread each."""
    jobs = {
        name: dataclasses.replace(job, clients={name: text}, out_dir=job.out_dir / name)
        for name, text in sorted(job.clients.items())
    }
    return _run(jobs, at_once=2)


def _run(jobs: dict[str, Job], *, at_once: int) -> Outcome:
    folders = {job.out_dir if len(jobs) == 1 else job.out_dir.parent for job in jobs.values()}
    (folder,) = folders
    watches: dict[str, RoundWatch] = {}
    names = list(jobs)
    with Processes(folder) as processes:
        for first in range(0, len(names), at_once):
            together = names[first : first + at_once]
            for name in together:
                job = jobs[name]
                job.out_dir.mkdir(parents=True, exist_ok=True)
                watches[name] = RoundWatch(job.out_dir, job.budget.num_rounds, processes.seconds)
                command = [sys.executable, "-m", "benchmarks.split_vs_full.whole"]
                own = {"OMP_NUM_THREADS": str(job.num_threads)}
                processes.start(name, [*command, str(job.write(job.out_dir / "job.json"))], own)
            processes.wait(together, lambda: [watch.tick() for watch in watches.values()])
        wall_seconds = processes.seconds()
    told = [json.loads((job.out_dir / "learned.json").read_text(encoding="utf-8")) for job in jobs.values()]
    return Outcome(
        rounds={name: watch.rounds for name, watch in watches.items()},
        clients={name: use_of_marked(processes.used(name), jobs[name].out_dir / "marks.jsonl") for name in names},
        num_label_tokens=sum(one["num_label_tokens"] for one in told),
        wall_seconds=wall_seconds,
    )
