"""What a benchmark trains on: a Llama with random weights, a tokenizer of whole words, and lines of equal length."""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's and a batch's sizes."""

    hidden_size: int
    intermediate_size: int
    num_blocks: int
    num_heads: int
    vocab_size: int
    seq_length: int
    """Tokens of every row, end-of-sequence token included."""
    micro_batch_size: int
    micro_batches: int

    @property
    def batch_size(self) -> int:
        """Rows of one optimizer step."""
        return self.micro_batch_size * self.micro_batches


LLAMA_34M = Shape(
    hidden_size=512,
    intermediate_size=1376,
    num_blocks=8,
    num_heads=8,
    vocab_size=8192,
    seq_length=128,
    micro_batch_size=4,
    micro_batches=2,
)
TINY = Shape(
    hidden_size=64,
    intermediate_size=128,
    num_blocks=4,
    num_heads=4,
    vocab_size=256,
    seq_length=16,
    micro_batch_size=2,
    micro_batches=2,
)

_SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def write_model(directory: Path, shape: Shape, *, seed: int = 0) -> int:
    """Write a float32 Llama with untied embeddings and its tokenizer; return the number of parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_blocks,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.seq_length,
        tie_word_embeddings=False,
        bos_token_id=list(_SPECIAL).index("bos_token"),
        eos_token_id=list(_SPECIAL).index("eos_token"),
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    _tokenizer(shape.vocab_size).save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def write_lines(path: Path, shape: Shape, *, num_lines: int, seed: int = 0) -> None:
    """Write lines whose words are a token each, frequent ones first as in real text, so that a loss can fall."""
    draw = random.Random(seed)
    words = _words(shape.vocab_size)
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))
    lines = [" ".join(draw.choices(words, cum_weights=weights, k=shape.seq_length - 1)) for _ in range(num_lines)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _words(vocab_size: int) -> list[str]:
    return [f"w{number}" for number in range(vocab_size - len(_SPECIAL))]


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*_SPECIAL.values(), *_words(vocab_size)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, _SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL)
