"""The formulas of `benchmarks.arithmetic` against the models, tensors and messages they are about."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import arithmetic
from benchmarks.arithmetic import Shape

TARGETS = {"llama": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"], "gpt2": ["c_attn"]}
TARGETS["qwen2"] = TARGETS["llama"]


def lora_of(family: str) -> LoraConfig:
    return LoraConfig(r=8, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2")


def config_of(family: str, shape: Shape) -> Any:
    if family == "gpt2":
        return AutoConfig.for_model(
            "gpt2",
            n_embd=shape.hidden_size,
            n_layer=shape.num_blocks,
            n_head=shape.num_heads,
            vocab_size=shape.vocab_size,
            n_positions=shape.num_positions,
            bos_token_id=0,
            eos_token_id=0,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        )
    return AutoConfig.for_model(
        family,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_blocks,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.is_tied,
    )


def toy(family: str, *, num_blocks: int = 2, is_tied: bool = True) -> Shape:
    is_gpt2 = family == "gpt2"
    return Shape(
        family=family,
        hidden_size=64,
        num_blocks=num_blocks,
        num_heads=4,
        num_kv_heads=4 if is_gpt2 else 2,
        head_dim=16,
        intermediate_size=256 if is_gpt2 else 160,
        vocab_size=96,
        num_positions=48 if is_gpt2 else 0,
        is_tied=is_tied,
    )


@pytest.mark.parametrize("name", arithmetic.LARGER)
def test_the_larger_models_have_as_many_parameters_as_their_configs_say(name: str) -> None:
    shape = arithmetic.LARGER[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape.family, shape))
        real = sum(parameter.numel() for parameter in model.parameters())
        adapted = get_peft_model(model, lora_of(shape.family))
        adapters = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)

    assert arithmetic.num_parameters(shape) == real
    assert arithmetic.lora_parameters(shape) == adapters
    assert Shape.of(config_of(shape.family, shape)) == shape


@pytest.mark.parametrize("learns", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_block_keeps_as_many_values_as_autograd_does(family: str, learns: arithmetic.Learns) -> None:
    rows, length = 2, 24

    def kept_with(num_blocks: int) -> int:
        return saved_bytes(family, toy(family, num_blocks=num_blocks), learns, rows, length)

    measured = (kept_with(3) - kept_with(1)) / 2
    formula = arithmetic.activation_bytes(toy(family), learns, num_positions=rows * length, num_blocks=1)

    # what the formula leaves out is the attention mask, which these wide rows of few values make visible
    assert formula == pytest.approx(measured, rel=0.04)


def saved_bytes(family: str, shape: Shape, learns: str, rows: int, length: int) -> int:
    model = AutoModelForCausalLM.from_config(config_of(family, shape))
    if learns == "lora":
        model = get_peft_model(model, lora_of(family))
    model.train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in weights:
            kept[address] = tensor  # held, so that its address is not given again
        return tensor

    ids_BS = torch.randint(0, shape.vocab_size, (rows, length))
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, -3:] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids_BS, attention_mask=mask_BS, labels=ids_BS, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_known_traffic_comes_out() -> None:
    # a step of 8 rows of 512 of GPT-2: 50 MB; a round of full federated learning: 995 MB
    assert arithmetic.step_bytes(arithmetic.GPT2, 8 * 512) == 4 * 8 * 512 * 768 * 4
    assert arithmetic.fl_round_bytes(arithmetic.GPT2, "full") == 2 * 4 * 124_439_808


def test_the_table_has_a_row_for_each_model_and_kind_of_training() -> None:
    header, *rows = arithmetic.table()

    assert [row[0] for row in rows] == [name for name in arithmetic.LARGER for _ in range(2)]
    assert {len(row) for row in rows} == {len(header)}
