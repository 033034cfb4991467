"""A server for own-loop clients, in a thread of this process, and the unsplit model to compare with."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import ALLOWS_ALL, free_port, tiny_config, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from served import ServedRun
from transformers import AutoModelForCausalLM, PreTrainedModel

import client_edge
from server_backbone.replay import rollback
from splitfl.config.trees import ServerConfig
from splitfl.models.trainable import first_adapter_values
from splitfl.telemetry.metrics import read_events

SEED = 7
LORA = {"r": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"]}
FULL = {"bottom": "full", "top": "full", "backbone": "full", "norm_head": True, "embeddings": True}


def write_model(directory: Path, family: str = "llama", **overrides: Any) -> Path:
    """Write a tiny random model with its tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def settings(directory: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return a server's settings for one client's own loop, with these laid over them."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"model_name_or_path": str(directory)},
        "lora": LORA,
        "train": {"loss": "plain"},
        "federation": {"num_rounds": 0, "server_mode": "sequential"},
        "text": {"max_seq_length": 64},
        "storage": {"fsync": "never"},
    }
    return {"seed": SEED} | {name: tree.get(name, {}) | dict(sections.get(name, {})) for name in {*tree, *sections}}


class Host(ServedRun):
    """One server for own-loop clients."""

    def __init__(self, folder: Path, tree: Mapping[str, Any]) -> None:
        self.configure(folder, tree)
        self.start()

    def configure(self, folder: Path, tree: Mapping[str, Any]) -> None:
        self.folder = folder
        self.address = f"tcp://127.0.0.1:{free_port()}"
        own = {"address": self.address, "runs_dir": folder, "run_id": "run", "cache_dir": folder / "cache"}
        config = ServerConfig.from_tree({**tree, "server": {**own, **tree.get("server", {})}}, source="test")
        super().__init__(config)
        self.directory = Path(config.model.model_name_or_path)

    def roll_back(self, generation: int) -> None:
        """Take the stopped server's run back, as `splitfl rollback` does."""
        rollback(self.run_dir, generation)

    def connect(self, client_id: str = "clinic", **more: Any) -> PreTrainedModel:
        folders = {"output_dir": self.folder / "clients", "cache_dir": self.folder / "cache" / "clients"}
        own = {"accept": True, "policy": ALLOWS_ALL, **folders, **more}
        return client_edge.connect(self.address, client_id=client_id, **own)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return all events, once nothing more comes: an event is written after the answer it is about."""
        size = -1
        while (now := self.metrics_path.stat().st_size) != size:
            size = now
            time.sleep(0.25)
        return self._events(kind)

    def _events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.metrics_path) if event["event"] == kind]

    def wait_for(self, kind: str, count: int = 1) -> None:
        deadline = time.monotonic() + 30
        while len(self._events(kind)) < count:
            assert time.monotonic() < deadline, f"no {count} events of {kind}"
            time.sleep(0.02)

    def backbone(self) -> dict[str, torch.Tensor]:
        """Return what the stopped server has learned."""
        return load_file(self.run_dir / "trained.safetensors")


def whole_model(directory: Path, *, is_lora: bool) -> PreTrainedModel:
    """Return the unsplit model in plain transformers and peft, with the adapters' first values of the run."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if is_lora:
        model = get_peft_model(
            model, LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=LORA["target_modules"])
        )
        for name, parameter in trained_of(model).items():
            first_adapter_values(name, parameter.data, SEED)
    return model


def trained_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return what trains in an unsplit model, by its name without peft's wrapping."""
    named = model.named_parameters()
    return {name.removeprefix("base_model.model."): p for name, p in named if p.requires_grad}


def batches(num: int, *, side: str = "right", rows: int = 3, length: int = 10) -> list[dict[str, torch.Tensor]]:
    """Return padded batches of random tokens with their labels."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for _ in range(num):
        ids = torch.randint(3, 259, (rows, length), generator=draw)
        lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=draw)
        positions = torch.arange(length)
        mask = (positions < lengths if side == "right" else positions >= length - lengths).long()
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


def differing(split: Mapping[str, torch.Tensor], whole: Mapping[str, torch.Tensor]) -> list[str]:
    """Name the tensors that are not bitwise the same on both sides, or on one only."""
    missing = sorted(split.keys() ^ whole.keys())
    return missing + [name for name in split.keys() & whole.keys() if not torch.equal(split[name], whole[name])]


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    given: Iterable[dict[str, torch.Tensor]],
    *,
    every: int = 1,
    clip: float = 0.0,
) -> list[float]:
    """Train as anybody would: forward, backward, clip, step; return the losses."""
    losses = []
    model.train()
    for number, batch in enumerate(given, start=1):
        loss = model(**batch).loss
        (loss / every).backward()
        losses.append(loss.item())
        if number % every == 0:
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def adamw(model: torch.nn.Module, lr: float = 5e-3) -> torch.optim.AdamW:
    """Return the optimizer that the server has by default."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def whole_name(name: str) -> str:
    """Return the name in the whole model (4 blocks) of a client's parameter (1 block at each end)."""
    return name.removeprefix("base_model.model.").replace("layers.2.", "layers.3.").replace(".default", "")
