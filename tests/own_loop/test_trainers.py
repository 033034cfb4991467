"""transformers.Trainer and peft on a model from `connect`: what they give on the unsplit model, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_loop.host import (
    FULL,
    LORA,
    SEED,
    Host,
    adamw,
    batches,
    differing,
    train,
    trained_of,
    whole_model,
    whole_name,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import client_edge
from splitfl.errors import Refused
from splitfl.models.trainable import first_adapter_values

Start = Callable[..., Host]

ONLY_BACKBONE = {"bottom": "none", "top": "none", "backbone": "lora"}


class Log(TrainerCallback):
    """What a `report_to` gets."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        # all but what depends on the time, or on the number of parameters here
        others = ("runtime", "per_second", "flos")
        self.lines.append({name: value for name, value in logs.items() if not any(other in name for other in others)})


def rows(num: int) -> list[dict[str, torch.Tensor]]:
    return [{name: tensor[0] for name, tensor in batch.items()} for batch in batches(num, rows=1)]


def trainer(model: torch.nn.Module, folder: Path, **more: Any) -> tuple[Trainer, Log]:
    log = Log()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=6,
        learning_rate=5e-2,
        optim="adamw_torch",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **more,
    )
    both = {"train_dataset": rows(30), "eval_dataset": rows(4)}
    return Trainer(model=model, args=arguments, callbacks=[log], **both), log


class TestTrainer:
    """Its defaults: clipping, a linear schedule, evaluation, accumulation, checkpoints."""

    def test_equals_the_unsplit_model_to_the_best_checkpoint(self, host: Start, tmp_path: Path) -> None:
        server = host(train=FULL)
        split, whole = server.connect(), whole_model(server.directory, is_lora=False)
        found = []
        for model, name in ((split, "split"), (whole, "whole")):
            run, log = trainer(model, tmp_path / name, load_best_model_at_end=True)
            run.train()
            found.append((log.lines, Path(run.state.best_model_checkpoint).name))
        assert found[0] == found[1]
        assert len({line["grad_norm"] for line in found[0][0] if "grad_norm" in line}) == 6
        best = int(found[0][1].removeprefix("checkpoint-"))
        assert best < 6
        assert [event["commit_number"] for event in server.events("went_back")] == [best]
        mine = {name: layer.clone() for name, layer in client_edge.own_layers(split).items()}
        server.stop()
        assert differing(mine | server.backbone(), trained_of(whole)) == []

    def test_resumes_from_a_checkpoint_on_a_server_that_was_stopped(self, host: Start, tmp_path: Path) -> None:
        server = host(train=FULL)
        first, log = trainer(server.connect(), tmp_path / "out")
        first.train()
        client_edge.disconnect(first.model)
        server.stop()
        whole_run = server.backbone()

        server.start()
        again, later = trainer(server.connect(), tmp_path / "out")
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))

        last = [line for line in log.lines if "grad_norm" in line or "eval_loss" in line][-3:]
        assert [line for line in later.lines if "grad_norm" in line or "eval_loss" in line] == last
        assert [event["step"] for event in server.events("step")] == [1, 2, 3, 4, 5, 6, 5, 6]
        server.stop()
        assert differing(server.backbone(), whole_run) == []

    def test_a_going_back_that_would_undo_others_steps_is_refused(self, host: Start) -> None:
        server = host()
        mine, others = server.connect(), server.connect("other")
        given = batches(2)
        train(mine, adamw(mine), given[:1])
        state = mine.state_dict()
        train(others, adamw(others), given)
        with pytest.raises(Refused, match="other has trained the backbone since commit 1, and going back would undo"):
            mine.load_state_dict(state)
        train(mine, adamw(mine), given)

    def test_a_snapshot_that_is_kept_no_more_is_refused(self, host: Start) -> None:
        server = host(storage={"keep_named": 2})
        model = server.connect()
        optimizer = adamw(model)
        states = []
        for batch in batches(4):
            train(model, optimizer, [batch])
            states.append(model.state_dict())
        with pytest.raises(Refused, match="no snapshot of commit 1 is kept; there are: 3, 4"):
            model.load_state_dict(states[0])
        model.load_state_dict(states[2])

    def test_the_tokenizer_is_where_the_model_says(self, host: Start) -> None:
        model = host().connect()
        assert AutoTokenizer.from_pretrained(model.name_or_path)("ab").input_ids


def adapted(model: torch.nn.Module) -> PeftModel:
    """Wrap a model as a user would, with the adapters' first values of the unsplit one."""
    config = LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=LORA["target_modules"])
    found = get_peft_model(model, config)
    for name, parameter in found.named_parameters():
        if ".lora_" in name:
            first_adapter_values(whole_name(name).replace(".weight", ".default.weight"), parameter.data, SEED)
    return found


class TestPeft:
    def test_adapters_of_the_users_own_equal_the_unsplit_model(self, host: Start) -> None:
        server = host(train=ONLY_BACKBONE)
        split, whole = adapted(server.connect()), whole_model(server.directory, is_lora=True)
        given = batches(4)
        assert train(split, adamw(split), given, clip=0.5) == train(whole, adamw(whole), given, clip=0.5)
        client_edge.disconnect(split)
        server.stop()
        mine = {
            whole_name(name).replace(".weight", ".default.weight"): p
            for name, p in split.named_parameters()
            if ".lora_" in name
        }
        assert differing(mine | server.backbone(), trained_of(whole)) == []

    def test_an_adapters_file_brings_the_server_back(self, host: Start, tmp_path: Path) -> None:
        server = host(train=ONLY_BACKBONE)
        model = adapted(server.connect())
        given, optimizer = batches(3), adamw(model)
        train(model, optimizer, given[:1])
        model.save_pretrained(tmp_path / "adapter")
        expected = self.logits(model, given[0])
        train(model, optimizer, given[1:])
        assert not torch.equal(self.logits(model, given[0]), expected)

        model.load_adapter(str(tmp_path / "adapter"), "default", is_trainable=True)

        assert torch.equal(self.logits(model, given[0]), expected)
        assert [event["commit_number"] for event in server.events("went_back")] == [1]

    def test_adapters_turned_off_are_off_on_both_sides(self, host: Start) -> None:
        server = host(train=ONLY_BACKBONE)
        split, whole = adapted(server.connect()), whole_model(server.directory, is_lora=True)
        given = batches(2)
        before = self.logits(split, given[0])
        for model in (split, whole):
            train(model, adamw(model), given)
        with split.disable_adapter(), whole.disable_adapter():
            assert torch.equal(self.logits(split, given[0]), self.logits(whole, given[0]))
            assert torch.equal(self.logits(split, given[0]), before)
        assert torch.equal(self.logits(split, given[0]), self.logits(whole, given[0]))
        assert not torch.equal(self.logits(split, given[0]), before)

    def test_generating_without_adapters(self, host: Start) -> None:
        server = host(train=ONLY_BACKBONE)
        split, whole = adapted(server.connect()), whole_model(server.directory, is_lora=True)
        asked = {"inputs": torch.tensor([[5, 6, 7, 8]]), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        for model in (split, whole):
            train(model, torch.optim.AdamW(model.parameters(), lr=0.5), batches(2))
            model.eval()
        found = []
        for model in (split, whole):
            with model.disable_adapter():
                without = model.generate(**asked)
            found.append((without.tolist(), model.generate(**asked).tolist()))
        assert found[0] == found[1]
        assert found[0][0] != found[0][1]

    def logits(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            return model(**batch).logits
