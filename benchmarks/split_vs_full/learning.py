"""The whole model in one process, in plain transformers, peft and torch: the other side of the comparison.

Batches are splitfl's, so that every arm sees the same examples in the same order. The adapters' first values are
splitfl's too, so that every arm starts from the same weights. Nothing else of splitfl's takes part.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from benchmarks.split_vs_full.plan import Budget, ClientText, Job, Learned
from client_edge.text.batches import Batch, TrainBatches
from client_edge.text.examples import Dataset
from client_edge.text.reading import read_examples
from splitfl.config.own import DataSection
from splitfl.models.trainable import first_adapter_values

_PEFT_PREFIX = "base_model.model."


def whole_model(directory: Path, learned: Learned, seed: int) -> nn.Module:
    """Load the model with what learns marked, and adapters where those are what learns."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if learned.table == "full":
        return model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=learned.r,
        lora_alpha=learned.alpha,
        target_modules=list(learned.target_modules),
        lora_dropout=0.0,
    )
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            first_adapter_values(name, parameter, seed)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what learns, in the model's order, by the names that every arm writes."""
    return {
        name.removeprefix(_PEFT_PREFIX): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load(model: nn.Module, tensors: Mapping[str, Tensor], *, may_lack: bool = False) -> None:
    """Write these tensors into what learns; raise `ValueError` for a name too many, or one too few."""
    parameters = trained(model)
    unknown = sorted(tensors.keys() - parameters.keys())
    missing = [] if may_lack else sorted(parameters.keys() - tensors.keys())
    if unknown or missing:
        raise ValueError(f"tensors that do not learn here: {unknown[:2]}; tensors that are missing: {missing[:2]}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def save(model: nn.Module, path: Path) -> None:
    """Write what learns; the file appears whole."""
    half_done = path.with_suffix(".partial")
    save_file({name: parameter.detach().contiguous() for name, parameter in trained(model).items()}, half_done)
    half_done.replace(path)


def read_text(path: Path, job: Job) -> Dataset:
    """Read a file as `splitfl client` does."""
    return read_examples(
        path,
        section=DataSection(),
        tokenizer=AutoTokenizer.from_pretrained(job.model_dir),
        max_seq_length=job.budget.max_seq_length,
        append_eos=True,
    )


def batches_of(client_id: str, text: ClientText, job: Job) -> TrainBatches:
    """Deal a client's examples as `splitfl client` does."""
    return TrainBatches(
        read_text(text.train, job),
        seed=job.seed,
        client_id=client_id,
        per_device_train_batch_size=job.budget.batch_size,
        gradient_accumulation_steps=job.budget.micro_batches,
    )


class Learner:
    """Steps of AdamW with clipping and a learning rate that falls in a straight line, as transformers' Trainer."""

    def __init__(self, model: nn.Module, budget: Budget) -> None:
        self.model = model
        self.num_label_tokens = 0
        """Label tokens learned from so far."""
        self._parameters = list(trained(model).values())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=budget.learning_rate, weight_decay=0.0)
        self._schedule = get_scheduler("linear", self._optimizer, 0, budget.num_steps)

    def step(self, batches: Sequence[Batch]) -> float:
        """Learn from micro-batches as one batch; return the mean loss over its label tokens."""
        num_label_tokens = sum(batch.num_label_tokens for batch in batches)
        total = 0.0
        self.model.train()
        for batch in batches:
            loss = self.model(
                input_ids=batch.input_ids_BS,
                attention_mask=mask_of(batch),
                labels=batch.labels_BS,
                num_items_in_batch=num_label_tokens,
                use_cache=False,
            ).loss
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()
        self.num_label_tokens += num_label_tokens
        return total

    def state(self) -> dict[str, Any]:
        """Return what the next round goes on with."""
        return {"optimizer": self._optimizer.state_dict(), "schedule": self._schedule.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` returned."""
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])


def mask_of(batch: Batch) -> Tensor:
    """Return 1 for tokens and 0 for padding (int64, micro-batch x sequence)."""
    positions_S = torch.arange(batch.input_ids_BS.shape[1])
    return (positions_S < torch.tensor(batch.lengths_B)[:, None]).long()
