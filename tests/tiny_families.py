"""Every causal LM of the installed transformers as a tiny random model: configs shrink by their fields' names."""

from collections.abc import Mapping
from typing import Any

import torch
from conftest import VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NUM_BLOCKS = 4
WIDTH = 32

# The value of a field in a tiny model, whichever family has it.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "n_embd": WIDTH,
    "d_model": WIDTH,
    "embedding_size": WIDTH,
    "word_embed_proj_dim": WIDTH,
    "intermediate_size": 64,
    "n_inner": 64,
    "ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "d_inner": 64,
    "ffn_hidden_size": 64,
    "dim_ff": 64,
    "dff": 64,
    "encoder_ffn_dim": 64,
    "num_hidden_layers": NUM_BLOCKS,
    "n_layer": NUM_BLOCKS,
    "n_layers": NUM_BLOCKS,
    "num_layers": NUM_BLOCKS,
    "decoder_layers": NUM_BLOCKS,
    "encoder_layers": 1,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "moe_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 4,
    "shared_intermediate_size": 16,
    "sliding_window": 4,
    "window_size": 4,
    "state_size": 4,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def families() -> list[str]:
    """Return every model type that transformers has a causal LM for."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


# What the fields above leave inconsistent in a family.
_AS_MANY_KEYS_AS_QUERIES = (
    "axk1",
    "axk2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "dots3_note",
    "dots3_note_text",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "longcat_flash",
    "minicpm3",
    "youtu",
)
_PADDED_BY_ID = (
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
_OWN: dict[str, dict[str, Any]] = {
    **{family: {"num_key_value_heads": 4} for family in _AS_MANY_KEYS_AS_QUERIES},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 16,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots1": {"n_shared_experts": 1, "num_key_value_heads": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "tie_word_embeddings": False,
        "ffn_config": {"ffn_hidden_size": 16},
    },
    "cohere_compass_text": {"layer_types": ["full_attention"] * NUM_BLOCKS},
    "emu3": {"pad_token_id": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], NUM_BLOCKS // 2]]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (NUM_BLOCKS // 2)},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "modernbert-decoder": {"pad_token_id": 0},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    "hrm_text": {"num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"] * 2},
    "reformer": {"is_decoder": True},
    **{family: {"pad_token_id": 1, "is_decoder": True} for family in _PADDED_BY_ID},
}


def small_config(family: str, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a small config of a family without dropout; `overrides` are its own fields."""
    known = AutoConfig.for_model(family)
    text = known.get_text_config()
    names = vars(text).keys() | (text.attribute_map or {}).keys()
    small = {name: value for name, value in _SMALL.items() if name in names}
    small |= (
        {name: 0.0 for name in names if _is_dropout(name, vars(text).get(name))}
        | dict(overrides)
        | _OWN.get(family, {})
    )
    if text is known:
        return AutoConfig.for_model(family, **small)
    field = next(name for name, value in vars(known).items() if value is text)
    return AutoConfig.for_model(family, **{field: {"model_type": text.model_type, **small}})


def _is_dropout(name: str, value: object) -> bool:
    return isinstance(value, float) and ("drop" in name or name.endswith("_pdrop"))


def small_model(family: str, *, attn_implementation: str | None = None, **overrides: Any) -> PreTrainedModel:
    """Return a random model whose every weight matters: norms are 1 and biases 0 in a fresh one."""
    torch.manual_seed(0)
    model = _built(family, attn_implementation, overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def empty_model(family: str) -> PreTrainedModel:
    """Return a model with shapes but no memory: all it takes to know whether a family is refused."""
    with torch.device("meta"):
        return _built(family, None, {}).eval()


def _built(family: str, attn_implementation: str | None, overrides: Mapping[str, Any]) -> PreTrainedModel:
    config = small_config(family, overrides)
    family_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if attn_implementation == "sdpa" and not family_class._supports_sdpa:
        attn_implementation = "eager"
    choice = {"attn_implementation": attn_implementation} if attn_implementation else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **choice)
    return model
