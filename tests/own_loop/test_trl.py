"""TRL's SFTTrainer and DPOTrainer on a model from `connect`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_loop.host import FULL, LORA, SEED, Host, whole_name
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitfl.errors import ConfigError
from splitfl.models.trainable import first_adapter_values

datasets = pytest.importorskip("datasets", reason="the extra `trl` is not installed")
trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")

# TRL asks transformers by names that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning")

Start = Callable[..., Host]

ADAPTERS = {"r": LORA["r"], "lora_alpha": LORA["alpha"], "target_modules": LORA["target_modules"]}
ONLY_BACKBONE = {"bottom": "none", "top": "none", "backbone": "lora"}
TEXTS = [{"prompt": "ab" * (1 + i % 3), "completion": "cdefg"[: 2 + i % 4]} for i in range(12)]
PAIRS = [
    {"prompt": "ab" * (1 + i % 3), "chosen": "cdefg"[: 2 + i % 4], "rejected": "xyzw"[: 1 + i % 3]} for i in range(12)
]


def arguments(kind: Any, folder: Path, **more: Any) -> Any:
    own = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "max_length": 32, **more}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    return kind(output_dir=str(folder), dataloader_pin_memory=False, **own, **quiet)


def run(kind: Any, model: Any, settings: Any, data: list[dict[str, str]], tokenizer: Any) -> list[dict[str, float]]:
    """Train with the trainer's own adapters, begun with the run's values, and return what was logged."""
    trainer = kind(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=LoraConfig(**ADAPTERS),
    )
    for name, parameter in trainer.model.named_parameters():
        if ".lora_" in name:
            is_split = any("remote_" in other for other, _ in trainer.model.named_parameters())
            known_as = whole_name(name) if is_split else name.removeprefix("base_model.model.").replace(".default", "")
            first_adapter_values(known_as.replace(".weight", ".default.weight"), parameter.data, SEED)
    trainer.train()
    return [
        {
            key: value
            for key, value in line.items()
            if "runtime" not in key and "per_second" not in key and "flos" not in key
        }
        for line in trainer.state.log_history
    ]


CASES = [("sft", TEXTS), ("dpo", PAIRS)]


def kinds(name: str) -> tuple[Any, Any]:
    return (trl.SFTTrainer, trl.SFTConfig) if name == "sft" else (trl.DPOTrainer, trl.DPOConfig)


@pytest.mark.parametrize(("name", "data"), CASES, ids=lambda value: value if isinstance(value, str) else "")
class TestTrl:
    def test_with_its_defaults(self, name: str, data: list[dict[str, str]], host: Start, tmp_path: Path) -> None:
        """Gradient checkpointing, bf16 autocast, head patches: one request a forward, and nothing of bf16 there."""
        server = host(train=ONLY_BACKBONE)
        split = server.connect()
        kind, config = kinds(name)
        settings = arguments(config, tmp_path / "split")
        assert settings.gradient_checkpointing
        assert settings.bf16
        far = split.model.layers[1]._server.backbone
        asked: list[str] = []
        far.forward, forward = lambda *args: asked.append("train") or forward(*args), far.forward
        far.evaluate, evaluate = lambda *args: asked.append("reference") or evaluate(*args), far.evaluate

        lines = run(kind, split, settings, data, AutoTokenizer.from_pretrained(split.name_or_path))

        assert asked == ["train"] * 3 if name == "sft" else ["train", "reference"] * 3
        whole = AutoModelForCausalLM.from_pretrained(server.directory, dtype=torch.float32)
        settings = arguments(config, tmp_path / "whole")
        expected = run(kind, whole, settings, data, AutoTokenizer.from_pretrained(server.directory))
        for line, other in zip(lines, expected, strict=True):
            # the unsplit model's middle computes in bf16 and the server's does not
            loss, other_loss = (each.get("loss", each.get("train_loss")) for each in (line, other))
            assert loss == pytest.approx(other_loss, abs=0.02)

    def test_without_autocast_equals_the_unsplit_model(
        self, name: str, data: list[dict[str, str]], host: Start, tmp_path: Path
    ) -> None:
        server = host(train=ONLY_BACKBONE)
        split = server.connect()
        kind, config = kinds(name)
        exact = {"bf16": False, "optim": "adamw_torch", "learning_rate": 5e-3}
        tokenizer = AutoTokenizer.from_pretrained(split.name_or_path)
        lines = run(kind, split, arguments(config, tmp_path / "split", **exact), data, tokenizer)
        whole = AutoModelForCausalLM.from_pretrained(server.directory, dtype=torch.float32)
        assert lines == run(kind, whole, arguments(config, tmp_path / "whole", **exact), data, tokenizer)
        assert len({line["loss"] for line in lines if "loss" in line}) == 3


def test_reference_log_probs_before_the_training(host: Start, tmp_path: Path) -> None:
    """Neither adapters nor a second model: the way for a backbone that trains in full."""
    server = host(train=FULL)
    losses = []
    for model in (server.connect(), AutoModelForCausalLM.from_pretrained(server.directory, dtype=torch.float32)):
        exact = {"bf16": False, "optim": "adamw_torch", "learning_rate": 5e-3, "precompute_ref_log_probs": True}
        trainer = trl.DPOTrainer(
            model=model,
            args=arguments(trl.DPOConfig, tmp_path / str(len(losses)), **exact),
            train_dataset=datasets.Dataset.from_list(PAIRS),
            processing_class=AutoTokenizer.from_pretrained(server.directory),
        )
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


def test_a_fully_trained_backbone_has_no_reference(host: Start, tmp_path: Path) -> None:
    server = host(train={**ONLY_BACKBONE, "backbone": "full"})
    model = server.connect()
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    with pytest.raises(ConfigError, match="compute the reference log-probs before training"):
        run(trl.DPOTrainer, model, arguments(trl.DPOConfig, tmp_path), PAIRS, tokenizer)
