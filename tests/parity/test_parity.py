"""Split training equals unsplit training bit for bit: the first test written, and the one that must never bend.

The reference is plain transformers, torch and peft: the whole model, the same micro-batches, `clip_grad_norm_`, AdamW
and `get_scheduler`. The split side is the product: a server and a client with the wire between them.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, write_text
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler
from unsplit import backward

from client_edge.text.batches import TrainBatches
from client_edge.text.reading import read_examples
from splitfl.config.own import ClientSection, DataSection
from splitfl.config.trees import RunConfig
from splitfl.models.trainable import first_adapter_values

STEPS = 5


@dataclass(frozen=True)
class Case:
    """One row of the pairwise table."""

    family: str
    transport: str
    padding: bool
    micro_batches: int
    train: str
    tied: bool
    blocks: tuple[int, int]

    def __str__(self) -> str:
        ends = f"{self.blocks[0]}-{self.blocks[1]}"
        pads, ties = "padded" if self.padding else "full-rows", "tied" if self.tied else "untied"
        return f"{self.family}-{self.transport}-{pads}-{self.micro_batches}mb-{self.train}-{ties}-{ends}"


AXES: dict[str, tuple[Any, ...]] = {
    "family": ("llama", "qwen2", "mistral", "glm4", "gpt2"),
    "transport": ("inproc", "tcp"),
    "padding": (True, False),
    "micro_batches": (1, 2),
    "train": ("full", "lora"),
    "tied": (True, False),
    "blocks": ((0, 0), (1, 1)),
}
CASES = [
    Case("llama", "inproc", True, 2, "full", True, (1, 1)),
    Case("llama", "tcp", False, 1, "lora", False, (0, 0)),
    Case("qwen2", "tcp", True, 2, "lora", True, (1, 1)),
    Case("qwen2", "inproc", False, 1, "full", False, (0, 0)),
    Case("mistral", "inproc", True, 1, "full", False, (1, 1)),
    Case("mistral", "tcp", False, 2, "lora", True, (0, 0)),
    Case("glm4", "tcp", True, 1, "full", True, (0, 0)),
    Case("glm4", "inproc", False, 2, "lora", False, (1, 1)),
    Case("gpt2", "tcp", True, 2, "full", True, (0, 0)),
    Case("gpt2", "inproc", False, 1, "lora", True, (1, 1)),
    Case("gpt2", "tcp", False, 2, "full", False, (1, 1)),
    Case("llama", "tcp", True, 2, "full", False, (0, 0)),
    Case("mistral", "inproc", True, 2, "lora", True, (1, 1)),
]


def settings(case: Case, directory: Path) -> dict[str, Any]:
    full = case.train == "full"
    return {
        "seed": 7,
        "model": {
            "model_name_or_path": str(directory),
            "bottom_layers": case.blocks[0],
            "top_layers": case.blocks[1],
        },
        "train": {
            "bottom": case.train,
            "top": case.train,
            "backbone": case.train,
            "norm_head": full,
            "embeddings": full,
            "loss": "plain",
        },
        "lora": {"target_modules": ["c_attn"] if case.family == "gpt2" else ["q_proj", "v_proj"]},
        "optimizer": {
            "learning_rate": 5e-3,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            "lr_scheduler_type": "linear",
            "warmup_steps": 2,
        },
        "federation": {
            "num_rounds": 1,
            "local_steps": STEPS,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": case.micro_batches,
        },
        "text": {"max_seq_length": 32},
        "server": {"export_model": False},
    }


def reference(directory: Path, data: Path, run: RunConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train the whole model with nothing of splitfl's but the batches and the adapters' first values."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if run.train.backbone == "lora":
        adapters = LoraConfig(
            r=run.lora.r,
            lora_alpha=run.lora.alpha,
            target_modules=list(run.lora.target_modules),
            fan_in_fan_out=model.config.model_type == "gpt2",
        )
        model = get_peft_model(model, adapters)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                first_adapter_values(name.removeprefix("base_model.model."), parameter.data, run.seed)
    else:
        model.requires_grad_(True)
    parameters = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if p.requires_grad}
    section = run.optimizer
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": section.weight_decay},
            {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=section.learning_rate,
    )
    schedule = get_scheduler("linear", optimizer, section.warmup_steps, STEPS)
    batches = batches_of(directory, data, run)
    losses = []
    model.train()
    for step in range(1, STEPS + 1):
        losses.append(backward(model, batches.at(step)))
        torch.nn.utils.clip_grad_norm_(parameters.values(), section.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, {name: parameter.detach() for name, parameter in parameters.items()}


def batches_of(directory: Path, data: Path, run: RunConfig) -> TrainBatches:
    dataset = read_examples(
        data,
        section=DataSection(),
        tokenizer=AutoTokenizer.from_pretrained(directory),
        max_seq_length=run.text.max_seq_length,
        append_eos=run.text.append_eos,
    )
    return TrainBatches.of(dataset, run, ClientSection(client_id="clinic"))


def losses_of(folder: Path) -> list[float]:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "step"]


class TestParity:
    """Losses and every trained parameter are the same bits as the unsplit model's."""

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_split_equals_whole(
        self,
        case: Case,
        make_model: Callable[..., Path],
        federate: Callable[..., Finished],
        tmp_path: Path,
    ) -> None:
        directory = make_model(case.family, tie_word_embeddings=case.tied)
        lengths = (4, 12) if case.padding else (9, 9)
        data = write_text(tmp_path / "text.txt", num_lines=12, seed=3, lengths=lengths)
        tree = settings(case, directory)
        run = RunConfig.from_tree({k: v for k, v in tree.items() if k != "server"}, source="test")

        finished = federate(tree, {"clinic": {"path": data, "eval_fraction": 0.0}}, transport=case.transport)

        assert finished.errors == {}
        whole_losses, whole = reference(directory, data, run)
        split = load_file(finished.run_dir / "trained.safetensors")
        assert losses_of(finished.folders["clinic"]) == whole_losses
        assert len(set(whole_losses)) == STEPS
        assert split.keys() == whole.keys()
        different = [name for name in whole if not torch.equal(split[name], whole[name])]
        assert different == []

    def test_table_covers_all_pairs(self) -> None:
        for first, second in itertools.combinations(AXES, 2):
            wanted = set(itertools.product(AXES[first], AXES[second]))
            found = {(getattr(case, first), getattr(case, second)) for case in CASES}
            assert found == wanted, (first, second, wanted - found)
