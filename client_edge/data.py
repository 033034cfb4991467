"""Reads the client's own text, turns it into tokens, and deals batches in an order that a resumed run repeats.

Tensor names end in their shape: B rows of a micro-batch, S positions of its longest row. Ids, labels and text stay
out of every `repr` and error.
"""

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from splitfl.config import DataSection
from splitfl.errors import ConfigError, DataError
from splitfl.federation.records import PLAIN_TEXT_FIELD, Record, is_plain_text, name_fields, read_file

IGNORED_LABEL = -100
"""The label on which no loss is taken, as in transformers."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer; `add_bos_token` is read where there is one."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Sequence[int]]: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One example: int64 vectors of equal length; a label is its own position's id or `IGNORED_LABEL`."""

    input_ids: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataset:
    """The examples of one file, in its order.

    `num_truncated` of `examples` lost tokens at their end, be it only the end-of-sequence token; `num_dropped` more had
    no label left and are not among them.
    """

    examples: tuple[Example, ...] = field(repr=False)
    num_truncated: int = 0
    num_dropped: int = 0

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """A micro-batch, int64, padded on the right to its longest row; `lengths_B` tells the padding, no id does."""

    input_ids_BS: Tensor = field(repr=False)
    labels_BS: Tensor = field(repr=False)
    lengths_B: tuple[int, ...]
    num_label_tokens: int
    """Labels that a loss is taken on; position 0 is never predicted and does not count."""


def read_examples(
    path: Path, *, section: DataSection, tokenizer: Tokenizer, max_seq_length: int, append_eos: bool
) -> Dataset:
    """Read a file of examples; raise `DataError` with the file and the line, which never quotes an example.

    A line of .txt, or an object's `section.text_field`, is learned whole; of a prompt and a completion, the completion.
    """
    encoder = _Encoder(tokenizer=tokenizer, max_seq_length=max_seq_length, append_eos=append_eos)
    parts = _plain_parts if is_plain_text(path) else functools.partial(_object_parts, section=section)
    encoded = [encoder.encode(*parts(record)) for record in read_file(path)]
    kept = [(example, truncated) for example, truncated in encoded if _num_label_tokens(example.labels) > 0]
    if not kept:
        raise DataError(
            f"{path}: none of {len(encoded)} examples has a token to learn within {max_seq_length} tokens; shorten the"
            " prompts, or raise text.max_seq_length on the server"
        )
    return Dataset(
        examples=tuple(example for example, _ in kept),
        num_truncated=sum(truncated for _, truncated in kept),
        num_dropped=len(encoded) - len(kept),
    )


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split into what is trained on and what is held out, drawn by `seed`, each in the file's order.

    A fraction above 0 holds out at least one example. The counts of truncated and dropped examples stay with the first.
    Raises `ConfigError` for a fraction outside [0, 1), `DataError` if nothing is left to train on.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"data.eval_fraction must be at least 0 and below 1, got {fraction}")
    num_held_out = _num_held_out(len(dataset), fraction)
    order = torch.randperm(len(dataset), generator=_generator("hold-out", seed)).tolist()
    held_out = set(order[:num_held_out])
    train = tuple(example for index, example in enumerate(dataset.examples) if index not in held_out)
    evaluation = tuple(dataset.examples[index] for index in sorted(held_out))
    counts = {"num_truncated": dataset.num_truncated, "num_dropped": dataset.num_dropped}
    return Dataset(examples=train, **counts), Dataset(examples=evaluation)


def collate(examples: Sequence[Example]) -> Batch:
    """Pad at least one example to the longest; padding has id 0, which every vocabulary has, and no label."""
    labels_BS = pad_sequence([example.labels for example in examples], batch_first=True, padding_value=IGNORED_LABEL)
    return Batch(
        input_ids_BS=pad_sequence([example.input_ids for example in examples], batch_first=True, padding_value=0),
        labels_BS=labels_BS,
        lengths_B=tuple(len(example.input_ids) for example in examples),
        num_label_tokens=_num_label_tokens(labels_BS),
    )


@dataclass(frozen=True, slots=True, eq=False)
class TrainBatches:
    """An endless stream of shuffled epochs, cut into steps: what a step holds hangs on its number alone.

    A batch may run over the border of two epochs, so none is short, and fewer examples than a batch repeat in it.
    Raises `DataError` if there are no examples.
    """

    dataset: Dataset
    _: KW_ONLY
    seed: int
    client_id: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int

    def __post_init__(self) -> None:
        if not self.dataset.examples:
            raise DataError(f"client {self.client_id} has no examples to train on; see data.path")

    def at(self, step: int) -> tuple[Batch, ...]:
        """Return the micro-batches of a step, counted from 1; raise `ValueError` below that."""
        if step < 1:
            raise ValueError(f"steps count from 1, got {step}")
        size = self.per_device_train_batch_size
        first = (step - 1) * self.gradient_accumulation_steps * size
        starts = range(first, first + self.gradient_accumulation_steps * size, size)
        return tuple(collate([self._example(start + row) for row in range(size)]) for start in starts)

    def _example(self, position: int) -> Example:
        epoch, place = divmod(position, len(self.dataset))
        order = _epoch_order(len(self.dataset), self.seed, self.client_id, epoch)
        return self.dataset.examples[order[place]]


def eval_batches(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """Yield every example once, the short ones first, so that little is padding; the last batch may be smaller."""
    by_length = sorted(dataset.examples, key=lambda example: len(example.input_ids))
    for start in range(0, len(by_length), batch_size):
        yield collate(by_length[start : start + batch_size])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoder:
    """Turns one example into ids and labels, cut at `max_seq_length`."""

    tokenizer: Tokenizer
    max_seq_length: int
    append_eos: bool

    def encode(self, prompt: str, completion: str) -> tuple[Example, bool]:
        """Tokenize both apart, so that the border between them is exact; say whether the end was cut off."""
        given = self._beginning() + self._ids(prompt)
        learned = self._ids(completion) + self._end()
        ids = torch.tensor(given + learned, dtype=torch.int64)[: self.max_seq_length]
        labels = ids.clone()
        labels[: len(given)] = IGNORED_LABEL
        return Example(input_ids=ids, labels=labels), len(given) + len(learned) > self.max_seq_length

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _beginning(self) -> list[int]:
        token_id = self.tokenizer.bos_token_id
        return [token_id] if token_id is not None and getattr(self.tokenizer, "add_bos_token", False) else []

    def _end(self) -> list[int]:
        token_id = self.tokenizer.eos_token_id
        return [token_id] if token_id is not None and self.append_eos else []


def _plain_parts(record: Record) -> tuple[str, str]:
    return "", _string(record, PLAIN_TEXT_FIELD)


def _object_parts(record: Record, section: DataSection) -> tuple[str, str]:
    """Return what is given and what is learned; a whole text wins where an object has both forms."""
    if section.text_field in record.fields:
        return "", _string(record, section.text_field)
    if section.prompt_field in record.fields and section.completion_field in record.fields:
        return _string(record, section.prompt_field), _string(record, section.completion_field)
    raise DataError(
        f"{record.where}: no field {section.text_field!r}, nor both {section.prompt_field!r} and"
        f" {section.completion_field!r}; the fields there are: {name_fields(record.fields)}; set data.text_field, or"
        " data.prompt_field and data.completion_field"
    )


def _string(record: Record, name: str) -> str:
    value = record.fields[name]
    if not isinstance(value, str):
        raise DataError(f"{record.where}: field {name!r} is not a string; put its value in quotes")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise DataError(
            f"{record.where}: field {name!r} holds half a surrogate pair; write the character itself"
        ) from None
    return value


def _num_label_tokens(labels: Tensor) -> int:
    return int((labels[..., 1:] != IGNORED_LABEL).sum())


def _num_held_out(num_examples: int, fraction: float) -> int:
    num_held_out = max(1, min(round(fraction * num_examples), num_examples - 1)) if fraction > 0 else 0
    if num_held_out >= num_examples:
        raise DataError(
            f"holding out {fraction} of {num_examples} examples leaves nothing to train on; add examples, name"
            " data.eval_path, or set data.eval_fraction to 0"
        )
    return num_held_out


@functools.lru_cache(maxsize=2)
def _epoch_order(num_examples: int, seed: int, client_id: str, epoch: int) -> tuple[int, ...]:
    """Return the permutation of an epoch, the same in every process."""
    return tuple(torch.randperm(num_examples, generator=_generator("order", seed, client_id, epoch)).tolist())


def _generator(*parts: str | int) -> torch.Generator:
    """Seed a generator from what it is for, so that neither the global seed nor other draws change it."""
    digest = hashlib.sha256("\n".join(str(part) for part in parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
