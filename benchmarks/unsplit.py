"""The other side of the comparison: the whole model in one process, in plain transformers and torch.

Nothing of splitfl's is used but the settings and the batches. `python -m benchmarks.unsplit` reads the server's and the
client's settings of a run. It trains as many steps as the run has, and writes seconds and losses as JSON.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from client_edge.text.batches import Batch, TrainBatches
from client_edge.text.reading import read_examples
from splitfl.config.trees import ClientConfig, RunConfig, ServerConfig
from splitfl.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """What a few steps took, step by step."""

    ended_at: list[float]
    """Unix seconds."""
    seconds: list[float]
    compute_seconds: list[float]
    """CPU seconds of the thread that computes."""
    losses: list[float]
    """Mean over the step's label tokens."""


def train_whole(model: nn.Module, batches: TrainBatches, run: RunConfig) -> Burst:
    """Train all parameters with AdamW and clipping; the run must say so, with a constant learning rate."""
    _check(run)
    parameters = list(model.parameters())
    section = run.optimizer
    optimizer = torch.optim.AdamW(
        parameters,
        lr=section.learning_rate,
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_epsilon,
        weight_decay=0.0,
    )
    burst = Burst(ended_at=[], seconds=[], compute_seconds=[], losses=[])
    model.train()
    for step in range(1, run.total_steps + 1):
        begun, begun_cpu = time.perf_counter(), time.thread_time()
        loss = _forward_and_backward(model, batches.at(step))
        if section.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(parameters, section.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        burst.ended_at.append(time.time())
        burst.seconds.append(time.perf_counter() - begun)
        burst.compute_seconds.append(time.thread_time() - begun_cpu)
        burst.losses.append(loss)
    return burst


def batches_of(run: RunConfig, directory: Path, client: ClientConfig, *, micro_batches: int) -> TrainBatches:
    """Deal the same examples as the client does, a step's worth cut into `micro_batches`."""
    federation = run.federation
    dataset = read_examples(
        client.data.path,
        section=client.data,
        tokenizer=AutoTokenizer.from_pretrained(directory),
        max_seq_length=run.text.max_seq_length,
        append_eos=run.text.append_eos,
    )
    rows = federation.per_device_train_batch_size * federation.gradient_accumulation_steps
    return TrainBatches(
        dataset,
        seed=run.seed,
        client_id=client.client.client_id,
        per_device_train_batch_size=rows // micro_batches,
        gradient_accumulation_steps=micro_batches,
    )


def _forward_and_backward(model: nn.Module, micro_batches: Sequence[Batch]) -> float:
    num_label_tokens = sum(batch.num_label_tokens for batch in micro_batches)
    total = 0.0
    for batch in micro_batches:
        # rows are full, so neither side has a mask
        out = model(
            input_ids=batch.input_ids_BS,
            labels=batch.labels_BS,
            num_items_in_batch=num_label_tokens,
            use_cache=False,
        )
        out.loss.backward()
        total += out.loss.item()
    return total


def _check(run: RunConfig) -> None:
    section = run.optimizer
    wanted = ("adamw_torch", "constant", 0.0)
    found = (section.optim, section.lr_scheduler_type, section.weight_decay)
    if found != wanted:
        raise ConfigError(f"(optim, lr_scheduler_type, weight_decay) = {found}: only {wanted} is compared here")


def main(argv: Sequence[str] | None = None) -> None:
    """Train with the run's micro-batches and with one batch a step, each from the first weights."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unsplit", description=__doc__.splitlines()[0])
    parser.add_argument("--server", type=Path, required=True, metavar="FILE.toml", help="the server's settings")
    parser.add_argument("--client", type=Path, required=True, metavar="FILE.toml", help="the client's settings")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where to write the result")
    arguments = parser.parse_args(argv)
    server, client = ServerConfig.load(arguments.server), ClientConfig.load(arguments.client)
    torch.set_num_threads(client.client.num_threads or 1)
    run, directory = server.run_config(), Path(server.model.model_name_or_path)
    result = {}
    for name, micro_batches in {"micro_batches": run.federation.gradient_accumulation_steps, "one_batch": 1}.items():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).requires_grad_(True)
        batches = batches_of(run, directory, client, micro_batches=micro_batches)
        result[name] = asdict(train_whole(model, batches, run))
        del model  # two at once would double the memory
    arguments.json.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
