"""`python -m benchmarks.split_vs_full.whole JOB.json`: one process learns from the text of all the job's clients.

With all clients it is the centralised arm, with one it is a client that learns alone.
"""

import json
import sys
from pathlib import Path

import torch

from benchmarks.split_vs_full.learning import Learner, batches_of, save, whole_model
from benchmarks.split_vs_full.meter import Mark
from benchmarks.split_vs_full.plan import Job, round_file


def main(path: Path) -> None:
    """Do the job; tells of itself in `out_dir`/marks.jsonl and learned.json."""
    import peft  # noqa: F401  # so that what follows is what the work takes
    import transformers.models.llama.modeling_llama  # noqa: F401

    job = Job.read(path)
    torch.set_num_threads(job.num_threads)
    with Mark(job.out_dir / "marks.jsonl"):
        streams = [batches_of(name, text, job) for name, text in sorted(job.clients.items())]
        learner = Learner(whole_model(job.model_dir, job.learned, job.seed), job.budget)
        losses = []
        for step in range(1, job.budget.num_steps + 1):
            losses.append(learner.step([batch for stream in streams for batch in stream.at(step)]))
            if step % job.budget.local_steps == 0:
                save(learner.model, round_file(job.out_dir, step // job.budget.local_steps))
    told = {"num_label_tokens": learner.num_label_tokens, "losses": losses}
    (job.out_dir / "learned.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
