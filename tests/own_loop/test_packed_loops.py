"""Rows that several examples share in a loop of the user's own: the unsplit model's losses, or a sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_loop.host import FULL, Host, adamw, batches, differing, train, trained_of, whole_model

import client_edge
from splitfl.errors import ConfigError, ModelError

Start = Callable[..., Host]


def packed(num: int) -> list[dict[str, torch.Tensor]]:
    """Return rows of two and three examples, as a collator of packed rows makes them: positions, and no mask."""
    positions = torch.tensor([[*range(4), *range(6)], [*range(3), *range(2), *range(5)]])
    draw = torch.Generator().manual_seed(1)
    found = []
    for _ in range(num):
        ids = torch.randint(3, 259, (2, 10), generator=draw)
        labels = ids.masked_fill(positions == 0, -100)
        # with a cache transformers lets the examples of a row see each other
        found.append({"input_ids": ids, "position_ids": positions, "labels": labels, "use_cache": False})
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plain_loop_equals_the_unsplit_model(family: str, host: Start) -> None:
    server = host(model={"family": family}, train=FULL)
    split, whole = server.connect(), whole_model(server.directory, is_lora=False)

    split_losses = train(split, adamw(split), packed(4), every=2)

    assert split_losses == train(whole, adamw(whole), packed(4), every=2)
    assert [(each["num_tokens"], each["num_positions"]) for each in server.events("step")] == [(40, 40)] * 2
    mine = {name: layer.clone() for name, layer in client_edge.own_layers(split).items()}
    server.stop()
    assert differing(mine | server.backbone(), trained_of(whole)) == []


def test_an_evaluation_equals_the_unsplit_model(host: Start) -> None:
    server = host()
    split, whole = server.connect().eval(), whole_model(server.directory, is_lora=True).eval()
    with torch.no_grad():
        for one in packed(2):
            assert torch.equal(split(**one).logits, whole(**one).logits)


def test_a_family_that_does_not_keep_them_apart_is_refused_and_goes_on_without(host: Start) -> None:
    server = host(model={"family": "bloom"}, lora={"target_modules": ["query_key_value"]})
    model = server.connect().train()
    with pytest.raises(ModelError, match=r"this server takes 0 .*set packing and padding_free to False"):
        # bloom takes no positions at all: what a collator would give it comes by the stand-in's own way
        model.transformer.h[1]._server(
            torch.zeros(1, 4, 32), None, torch.tensor([[0, 1, 0, 1]]), training=True, adapters_off=False
        )
    assert len(set(train(model, adamw(model), batches(2)))) == 2
    assert server.events("violation") == []


class TestTrl:
    """TRL's packing and padding_free: all rows of a batch one after the other, as a single row."""

    pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning")

    @pytest.mark.parametrize(
        "more",
        [{"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}],
        ids=["packing", "padding_free"],
    )
    def test_equals_the_unsplit_model(self, more: dict[str, Any], host: Start, tmp_path: Path) -> None:
        pytest.importorskip("trl", reason="the extra `trl` is not installed")
        from own_loop.test_trl import ONLY_BACKBONE, TEXTS, arguments, run
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        server = host(train=ONLY_BACKBONE)
        split = server.connect()
        exact = {"bf16": False, "optim": "adamw_torch", "learning_rate": 5e-3, **more}
        tokenizer = AutoTokenizer.from_pretrained(split.name_or_path)
        lines = run(SFTTrainer, split, arguments(SFTConfig, tmp_path / "split", **exact), TEXTS, tokenizer)
        whole = AutoModelForCausalLM.from_pretrained(server.directory, dtype=torch.float32)
        expected = run(SFTTrainer, whole, arguments(SFTConfig, tmp_path / "whole", **exact), TEXTS, tokenizer)
        assert lines == expected
        assert len({line["loss"] for line in lines if "loss" in line}) == 3

    def test_with_its_defaults(self, host: Start, tmp_path: Path) -> None:
        """The first packed batch comes in the middle of bf16 autocast and gradient checkpointing."""
        pytest.importorskip("trl", reason="the extra `trl` is not installed")
        from own_loop.test_trl import ONLY_BACKBONE, TEXTS, arguments, run
        from transformers import AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        server = host(train=ONLY_BACKBONE)
        split = server.connect()
        tokenizer = AutoTokenizer.from_pretrained(split.name_or_path)
        lines = run(SFTTrainer, split, arguments(SFTConfig, tmp_path, packing=True), TEXTS, tokenizer)
        assert len({line["loss"] for line in lines if "loss" in line}) == 3
        assert all(module.training for module in split.modules())

    def test_a_row_beyond_the_servers_bound(self, host: Start) -> None:
        model = host(text={"max_seq_length": 8}).connect().train()
        with pytest.raises(ConfigError, match=r"rows of 10 tokens, more than text\.max_seq_length = 8"):
            model(**packed(1)[0])
