"""Turns what is learned of a record into ids and labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch

from client_edge.text.chat import Message, render
from client_edge.text.examples import Example
from splitfl.models.loss import IGNORED_LABEL


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer; `add_bos_token` and `chat_template` are read where there are any."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def __call__(self, text: str, **options: bool) -> Mapping[str, Any]: ...

    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A completion, which is learned, after a prompt, which is not; a text that is learned whole has none."""

    prompt: str = field(default="", repr=False)
    completion: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """A conversation: the assistant's turns after the first `num_given` messages are learned."""

    messages: Sequence[Message] = field(repr=False)
    num_given: int = 0


Learned: TypeAlias = Passage | Talk
"""What is learned of a record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """Turns one example into ids and labels, cut at `max_seq_length`."""

    tokenizer: Tokenizer
    max_seq_length: int
    append_eos: bool

    def encode(self, learned: Learned, where: str) -> tuple[Example, bool]:
        """Return the example, and whether its end was cut off; raise `DataError` that names `where` for a bad talk."""
        match learned:
            case Passage():
                return self._passage(learned)
            case Talk():
                return self._talk(learned, where)

    def _passage(self, passage: Passage) -> tuple[Example, bool]:
        """Tokenize prompt and completion apart, so that the border between them is exact."""
        given = self._beginning() + self._ids(passage.prompt)
        # an end alone teaches nothing
        learned = self._ids(passage.completion) + self._end() if passage.completion else []
        return self._cut(given + learned, [False] * len(given) + [True] * len(learned))

    def _talk(self, talk: Talk, where: str) -> tuple[Example, bool]:
        """Tokenize the whole at once, as it is read later; a token is learned if it lies within a learned stretch."""
        conversation = render(self.tokenizer, talk.messages, where, num_given=talk.num_given)
        encoded = self.tokenizer(conversation.text, add_special_tokens=False, return_offsets_mapping=True)
        is_learned = [
            any(first <= start and end <= last for first, last in conversation.learned)
            for start, end in encoded["offset_mapping"]
        ]
        return self._cut(list(encoded["input_ids"]), is_learned)

    def _cut(self, ids: list[int], is_learned: list[bool]) -> tuple[Example, bool]:
        input_ids = torch.tensor(ids, dtype=torch.int64)[: self.max_seq_length]
        labels = input_ids.masked_fill(
            ~torch.tensor(is_learned, dtype=torch.bool)[: self.max_seq_length], IGNORED_LABEL
        )
        return Example(input_ids=input_ids, labels=labels), len(ids) > self.max_seq_length

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _beginning(self) -> list[int]:
        token_id = self.tokenizer.bos_token_id
        return [token_id] if token_id is not None and getattr(self.tokenizer, "add_bos_token", False) else []

    def _end(self) -> list[int]:
        token_id = self.tokenizer.eos_token_id
        return [token_id] if token_id is not None and self.append_eos else []
