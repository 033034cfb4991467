"""Answers to held-out prompts, made by the model whose middle is the server's."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from client_edge.measuring.scores import SCORES
from client_edge.text.encoding import Tokenizer
from client_edge.text.exam import Exam
from splitfl.config.trees import RunConfig
from splitfl.models.context import room_after


class Answerer:
    """Answers prompts greedily, with the backbone and its cache on the server."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
        """Take the client's model, whose middle is the server's; its own generation settings are left aside."""
        self._model = model
        self._tokenizer = tokenizer
        self._stops = _stops(model, tokenizer)
        # sampling and penalties that a checkpoint asks for are not what is measured
        model.generation_config = GenerationConfig(eos_token_id=self._stops, pad_token_id=(self._stops or [0])[0])

    def measures(self, exam: Exam, run: RunConfig, *, rows: int) -> dict[str, float]:
        """Return the mean of each score over the questions that are to be answered, up to `rows` at once."""
        texts = self._answers([question.prompt_ids for question in exam.to_answer], run, rows)
        pairs = [(text, self._text(q.completion_ids)) for text, q in zip(texts, exam.to_answer, strict=True)]
        measured: dict[str, float] = {"num_generated": float(len(pairs))}
        return measured | {name: sum(score(*pair) for pair in pairs) / len(pairs) for name, score in SCORES.items()}

    def _answers(self, prompts: Sequence[Tensor], run: RunConfig, rows: int) -> list[str]:
        """Return what the model says after each prompt, in their order."""
        by_length = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
        said: dict[int, str] = {}
        for group in _groups(by_length, prompts, run, rows):
            answers = self._answer([prompts[at] for at in group], run.evaluation.max_new_tokens)
            said |= zip(group, answers, strict=True)
        return [said[at] for at in range(len(prompts))]

    def _answer(self, prompts: Sequence[Tensor], wanted: int) -> list[str]:
        padding = self._model.generation_config.pad_token_id or 0
        input_ids_BS = pad_sequence(list(prompts), batch_first=True, padding_value=padding, padding_side="left")
        ones = [torch.ones_like(prompt) for prompt in prompts]
        mask_BS = pad_sequence(ones, batch_first=True, padding_value=0, padding_side="left")
        num_given, device = input_ids_BS.shape[1], self._model.device
        room = room_after(self._model.config, num_given, wanted)
        said_BS = self._model.generate(
            input_ids=input_ids_BS.to(device), attention_mask=mask_BS.to(device), max_new_tokens=room, do_sample=False
        )
        return [self._text(self._until_stop(row)) for row in said_BS[:, num_given:].cpu()]

    def _until_stop(self, ids: Tensor) -> Tensor:
        at = torch.isin(ids, torch.tensor(self._stops, dtype=ids.dtype)).nonzero()
        return ids[: int(at[0])] if len(at) else ids

    def _text(self, ids: Tensor) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _groups(by_length: Sequence[int], prompts: Sequence[Tensor], run: RunConfig, rows: int) -> Iterator[Sequence[int]]:
    """Yield batches of prompts that the server's cache has room for."""
    rest = by_length
    while rest:
        longest = len(prompts[rest[:rows][-1]]) + run.evaluation.max_new_tokens
        size = max(1, min(rows, run.link.max_cache_tokens // longest))
        yield rest[:size]
        rest = rest[size:]


def _stops(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end an answer: the model's and the tokenizer's."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    stops = configured if isinstance(configured, list) else [configured]
    return sorted({stop for stop in [*stops, tokenizer.eos_token_id] if stop is not None})
