"""The one scoring of every arm, in plain transformers and peft.

Each file of trained tensors is laid over the base model, and all clients' held-out text is scored. The score is the
mean loss of a label token. Where the text has labels, it is also the share of examples whose label's words are the
likeliest.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from benchmarks.split_vs_full.learning import load, mask_of, read_text, trained, whole_model
from benchmarks.split_vs_full.plan import Job
from client_edge.text.batches import Batch, collate, eval_batches
from client_edge.text.examples import Dataset, Example
from splitfl.models.loss import IGNORED_LABEL

_BATCH_SIZE = 8
BASE = "base"
"""In place of a file: the model as it came."""


def score_files(job: Job, files: Sequence[str], *, may_lack: bool = False) -> dict[str, dict[str, dict[str, float]]]:
    """Return, for each file and client, `loss` and where there are labels `accuracy`.

    `may_lack` allows files with fewer tensors than learn, for arms in which fewer do.
    """
    model = whole_model(job.model_dir, job.learned, job.seed).eval()
    held_out = {name: read_text(text.eval, job) for name, text in job.clients.items()}
    labelled = {name: _label_choices(text.eval, job) for name, text in job.clients.items()}
    scores = {}
    for file in files:
        if file != BASE:
            load(model, load_file(file), may_lack=may_lack)
        scores[file] = {
            name: {"loss": mean_loss(model, dataset), **_accuracy(model, labelled[name])}
            for name, dataset in held_out.items()
        }
    return scores


@torch.no_grad()
def mean_loss(model: nn.Module, dataset: Dataset) -> float:
    """Return the mean loss per label token."""
    total, num_label_tokens = 0.0, 0
    for batch in eval_batches(dataset, _BATCH_SIZE):
        total -= float(_log_likelihoods(model, batch).sum())
        num_label_tokens += batch.num_label_tokens
    return total / num_label_tokens


@torch.no_grad()
def _log_likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """Return the log likelihood of each row's labels (float32, B)."""
    logits_BSV = model(input_ids=batch.input_ids_BS, attention_mask=mask_of(batch), use_cache=False).logits
    losses_N = cross_entropy(
        logits_BSV[:, :-1].flatten(0, 1), batch.labels_BS[:, 1:].flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return -losses_N.view(len(batch.lengths_B), -1).sum(1)


def _label_choices(path: Path, job: Job) -> list[tuple[list[Example], int]]:
    """Return for each labelled example one example per label, and which of them is right."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not all({"prompt", "label", "labels"} <= record.keys() for record in records):
        return []
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    choices = []
    for record in records:
        longest = max(len(ids(f" {label}")) for label in record["labels"])
        given = ids(record["prompt"])[longest - job.budget.max_seq_length :]  # the question is at the end
        rows = []
        for label in record["labels"]:
            words = ids(f" {label}")
            labels = [IGNORED_LABEL] * len(given) + words
            rows.append(Example(input_ids=torch.tensor(given + words), labels=torch.tensor(labels)))
        choices.append((rows, record["labels"].index(record["label"])))
    return choices


def _accuracy(model: nn.Module, choices: Sequence[tuple[list[Example], int]]) -> Mapping[str, float]:
    if not choices:
        return {}
    right = sum(int(_log_likelihoods(model, collate(rows)).argmax()) == label for rows, label in choices)
    return {"accuracy": right / len(choices)}


def sizes_of(job: Job) -> dict[str, int]:
    """Return the number of elements of every tensor that learns, by name."""
    return {name: parameter.numel() for name, parameter in trained(whole_model(job.model_dir, job.learned, 0)).items()}
