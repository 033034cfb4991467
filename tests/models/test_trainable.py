"""Configuration decides what trains: per part, with adapters or in full, and never by accident."""

from typing import Any

import pytest
import torch
from conftest import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from splitfl.config.trees import RunConfig
from splitfl.errors import ConfigError
from splitfl.models.cut import Cut
from splitfl.models.trainable import checkpoint_name, choose_trainable, first_adapter_values, is_adapter

NONE = {"bottom": "none", "top": "none", "backbone": "none"}


def chosen(
    train: dict[str, Any], family: str = "llama", *, tied: bool = False, **sections: Any
) -> tuple[Cut, list[str]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family, tie_word_embeddings=tied))
    run = RunConfig.from_tree({"train": train, **sections}, source="test")
    cut = Cut.of(model, bottom_layers=1, top_layers=1)
    return cut, choose_trainable(cut, run)


def parts(cut: Cut) -> set[str]:
    """Name what trains: the number of each block, and the modules at the ends."""
    found = set()
    for name in cut.trainable():
        layer = cut.layer_of(name)
        found.add(str(layer) if layer is not None else name.split(".")[-2])
    return found


class TestParts:
    def test_adapters_in_all_blocks_by_default(self) -> None:
        cut, notes = chosen({})
        assert parts(cut) == {"0", "1", "2", "3"}
        assert all(is_adapter(name) for name in cut.trainable())
        assert notes == []

    @pytest.mark.parametrize(
        ("train", "wanted"),
        [
            ({**NONE, "bottom": "full"}, {"0"}),
            ({**NONE, "top": "full"}, {"3"}),
            ({**NONE, "backbone": "full"}, {"1", "2"}),
            ({**NONE, "backbone": "full", "backbone_layers": 1}, {"2"}),
            ({**NONE, "backbone": "lora", "backbone_layers": 1}, {"2"}),
            ({**NONE, "norm_head": True}, {"norm", "lm_head"}),
            ({**NONE, "embeddings": True}, {"embed_tokens"}),
            ({"bottom": "lora", "top": "full", "backbone": "none"}, {"0", "3"}),
        ],
    )
    def test_only_what_is_named(self, train: dict[str, Any], wanted: set[str]) -> None:
        assert parts(chosen(train)[0]) == wanted

    def test_full_means_all_weights_of_the_block(self) -> None:
        cut, _ = chosen({**NONE, "bottom": "full"})
        block = {name for name, _ in cut.parameters() if cut.layer_of(name) == 0}
        assert set(cut.trainable()) == block
        assert not any(is_adapter(name) for name in block)

    def test_full_everywhere_is_the_whole_model(self) -> None:
        full = {"bottom": "full", "top": "full", "backbone": "full", "norm_head": True, "embeddings": True}
        for family in ("llama", "gpt2", "opt"):
            cut, _ = chosen(full, family, tied=True)
            assert set(cut.trainable()) == {name for name, _ in cut.parameters()}

    def test_learned_positions_train_with_the_embeddings(self) -> None:
        assert parts(chosen({**NONE, "embeddings": True}, "gpt2", tied=True)[0]) == {"wte", "wpe"}
        assert parts(chosen({**NONE, "norm_head": True}, "gpt2", tied=True)[0]) == {"ln_f"}

    def test_a_frozen_server_trains_no_backbone(self) -> None:
        cut, notes = chosen({"backbone": "full"}, federation={"server_mode": "frozen"})
        assert parts(cut) == {"0", "3"}
        assert notes == ["nothing on the server trains: the backbone stays as it is"]

    def test_clients_without_anything_to_train_are_told(self) -> None:
        _, notes = chosen({"bottom": "none", "top": "none"})
        assert notes == ["nothing on the clients trains: their merges are empty"]

    def test_what_trained_before_does_not_matter(self) -> None:
        cut, _ = chosen({**NONE, "top": "full"})
        run = RunConfig.from_tree({"train": {**NONE, "bottom": "full"}}, source="test")
        choose_trainable(cut, run)
        assert parts(cut) == {"0"}


class TestTiedHead:
    def test_a_tied_head_stays_with_its_embedding_and_says_so(self) -> None:
        cut, notes = chosen({**NONE, "norm_head": True}, tied=True)
        assert parts(cut) == {"norm"}
        assert notes[0].startswith("the LM head is tied to the embedding and stays frozen with it")
        assert "train.embeddings = true" in notes[0]

    def test_both_train_together(self) -> None:
        cut, notes = chosen({**NONE, "norm_head": True, "embeddings": True}, tied=True)
        assert parts(cut) == {"norm", "embed_tokens"}
        assert not any("tied" in note for note in notes)

    def test_an_untied_head_needs_no_note(self) -> None:
        _, notes = chosen({**NONE, "norm_head": True}, tied=False)
        assert not any("tied" in note for note in notes)


class TestRefusals:
    def test_nothing_trains(self) -> None:
        with pytest.raises(ConfigError, match=r"nothing trains: set train.bottom, train.top or train.backbone"):
            chosen(NONE)

    def test_a_target_that_is_in_no_block(self) -> None:
        with pytest.raises(ConfigError, match=r"no qkv in a block; known here: down_proj, gate_proj, .*v_proj"):
            chosen({}, lora={"target_modules": ["q_proj", "qkv"]})

    def test_more_layers_than_the_backbone_has(self) -> None:
        with pytest.raises(ConfigError, match=r"train\.backbone_layers = 3: the backbone has 2 blocks; 0 means all"):
            chosen({"backbone_layers": 3})


class TestAdapters:
    @pytest.mark.parametrize(("family", "target"), [("llama", "up_proj"), ("gpt2", "c_attn"), ("gpt_neox", "dense")])
    def test_on_the_layers_that_are_named(self, family: str, target: str) -> None:
        cut, _ = chosen({}, family, lora={"target_modules": [target], "r": 3})
        names = list(cut.trainable())
        assert len(names) == 2 * 4  # A and B in each block
        assert all(f".{target}.lora_" in name for name in names)
        assert {3} == {min(p.shape) for p in cut.trainable().values()}

    def test_a_family_has_its_usual_targets(self) -> None:
        cut, _ = chosen({})
        assert {name.split(".lora_")[0].split(".")[-1] for name in cut.trainable()} == {"q_proj", "v_proj"}

    def test_they_are_float32_whatever_the_model_is(self) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.bfloat16)
        cut = Cut.of(model, bottom_layers=1, top_layers=1)
        choose_trainable(cut, RunConfig())
        assert {parameter.dtype for parameter in cut.trainable().values()} == {torch.float32}

    def test_names_in_a_checkpoint_know_no_adapter(self) -> None:
        cut, _ = chosen({})
        plain = {checkpoint_name(name) for name, _ in cut.parameters() if not is_adapter(name)}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config("llama", tie_word_embeddings=False))
        assert plain == {name for name, _ in model.named_parameters()}

    def test_first_values_are_the_names_and_the_seeds(self) -> None:
        def first(name: str, seed: int) -> Tensor:
            values = torch.full((4, 8), 9.0)
            first_adapter_values(name, values, seed)
            return values

        one = first("x.lora_A.default.weight", 1)
        assert torch.equal(one, first("x.lora_A.default.weight", 1))
        assert not torch.equal(one, first("y.lora_A.default.weight", 1))
        assert not torch.equal(one, first("x.lora_A.default.weight", 2))
        assert 0 < one.abs().max() <= (1 / 8) ** 0.5  # uniform within 1 / sqrt(fan in)
        assert not first("x.lora_B.default.weight", 1).any()
