"""Generation on a model that is split within one process: the tokens are the whole model's."""

from typing import Any

import pytest
import torch
from conftest import VOCABULARY, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

import splitfl
from splitfl.errors import DataError, ModelError
from splitfl.models.numbering import numbered

FAMILIES = ("llama", "mistral", "gpt2", "gemma2")
ENDS = ((1, 1), (0, 0), (1, 0), (0, 1))
CASES = [(family, ends) for family in FAMILIES for ends in ENDS]
CASES += [(family, (1, 1)) for family in ("qwen3", "mixtral", "gpt_neox", "opt", "phi3")]
LENGTHS = (9, 4, 7)


def whole_model(family: str, **overrides: Any) -> PreTrainedModel:
    """Return a random model with a sliding window shorter than the text where the family has windows."""
    torch.manual_seed(0)
    window = {"sliding_window": 6} if family in ("mistral", "gemma2") else {}
    model = AutoModelForCausalLM.from_config(tiny_config(family, **window, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
    return model.eval()


def prompts(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """Return random prompts padded on the left."""
    torch.manual_seed(1)
    longest = max(lengths)
    ids_BS = torch.randint(3, VOCABULARY, (len(lengths), longest))
    mask_BS = (torch.arange(longest) >= longest - torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": ids_BS, "attention_mask": mask_BS}


def tokens(model: PreTrainedModel, **how: Any) -> list[list[int]]:
    torch.manual_seed(2)
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | how
    return model.generate(**prompts(how.pop("lengths", LENGTHS)), **how).tolist()


WAYS = {
    "greedy": {},
    "one row": {"lengths": (9,)},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
}


class TestGenerate:
    @pytest.mark.parametrize(("family", "ends"), CASES)
    def test_tokens_are_the_whole_models(self, family: str, ends: tuple[int, int]) -> None:
        model = whole_model(family)
        client, _ = splitfl.split(model, bottom_layers=ends[0], top_layers=ends[1])
        said = set()
        for name, way in WAYS.items():
            wanted = tokens(model, **way)
            assert tokens(client, **way) == wanted, name
            said |= {token for row in wanted for token in row[-12:]}
        assert len(said) > 8, "the model says too few things to tell"

    def test_no_cache_gives_the_same(self) -> None:
        model = whole_model("llama")
        client, _ = splitfl.split(model)
        assert tokens(client, use_cache=False) == tokens(model)

    def test_the_cut_leaves_the_whole_model_as_it_was(self) -> None:
        model = whole_model("llama")
        before = tokens(model)
        splitfl.split(model)
        assert [block.self_attn.layer_idx for block in model.model.layers] == list(range(len(model.model.layers)))
        assert tokens(model) == before

    def test_a_joined_model_generates_too(self) -> None:
        model = whole_model("gpt2")
        assert tokens(splitfl.join(*splitfl.split(model))) == tokens(model)

    def test_a_renumbered_block_shares_what_it_gets_later(self) -> None:
        block = whole_model("gpt2").transformer.h[0]
        twin = numbered(block, 3)
        assert (block.attn.layer_idx, twin.attn.layer_idx) == (0, 3)
        block.attn.c_attn._parameters["bias"] = torch.nn.Parameter(torch.ones(1))
        block.attn._buffers["bias"] = torch.ones(1)
        assert twin.attn.c_attn.bias is block.attn.c_attn.bias
        assert twin.attn.bias is block.attn.bias


class TestRefused:
    def test_a_static_cache(self) -> None:
        client, _ = splitfl.split(whole_model("llama"))
        with pytest.raises(ModelError, match="StaticCache"):
            client(**prompts(), past_key_values=StaticCache(config=client.config, max_cache_len=32), use_cache=True)

    def test_going_back_in_the_cache(self) -> None:
        client, _ = splitfl.split(whole_model("llama"))
        with pytest.raises(ModelError, match="assisted decoding"):
            tokens(client, prompt_lookup_num_tokens=2, lengths=(9,))

    def test_a_prompt_longer_than_the_context(self) -> None:
        client, _ = splitfl.split(whole_model("llama", max_position_embeddings=8))
        with pytest.raises(DataError, match="9 tokens, more than the 8"):
            tokens(client)

    def test_padding_on_the_right(self) -> None:
        client, _ = splitfl.split(whole_model("llama"))
        given = prompts()
        with pytest.raises(DataError, match="padded on the left"):
            client(input_ids=given["input_ids"], attention_mask=given["attention_mask"].flip(1), use_cache=True)
