"""Reads the client's own text, turns it into tokens, and deals batches in an order that a resumed run repeats.

Tensor names end in their shape: B rows of a micro-batch, S positions of its longest row. Ids, labels and text stay
out of every `repr` and error.
"""

import functools
import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from client_edge.text.chat import Conversation, messages_in, render
from splitfl.config.own import ClientSection, DataSection
from splitfl.config.trees import RunConfig
from splitfl.errors import ConfigError, DataError, ModelError
from splitfl.federation.records import PLAIN_TEXT_FIELD, Record, is_plain_text, name_fields, read_file
from splitfl.models.layout import Layout
from splitfl.models.loss import IGNORED_LABEL
from splitfl.session.terms import MAX_PACKED_EXAMPLES
from splitfl.telemetry.units import counted

T = TypeVar("T")

# What makes a record a pair of answers, of which one is preferred.
_PREFERENCE = ("chosen", "rejected")


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer; `add_bos_token` and `chat_template` are read where there are any."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def __call__(self, text: str, **options: bool) -> Mapping[str, Any]: ...


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
    """Labels that a loss is taken on; an example's first token is never predicted and does not count."""
    example_lengths: tuple[int, ...] = ()
    """Lengths of the examples that the rows are packed from, row after row; () where each row is one example."""

    @property
    def layout(self) -> Layout:
        """How the rows are filled."""
        return Layout(lengths_B=self.lengths_B, example_lengths=self.example_lengths)

    @property
    def num_tokens(self) -> int:
        """Positions that are not padding."""
        return sum(self.lengths_B)

    @property
    def num_positions(self) -> int:
        """Tokens and padding: what is computed, and sent."""
        return self.input_ids_BS.numel()


def read_examples(
    path: Path,
    *,
    section: DataSection,
    tokenizer: Tokenizer,
    max_seq_length: int,
    append_eos: bool,
    vocab_size: int = 0,
) -> Dataset:
    """Read a file of examples; raise `DataError` with the file and the line, which never quotes an example.

    A line of .txt, or an object's `section.text_field`, is learned whole; of a prompt and a completion, the completion;
    of a conversation, the assistant's turns. Raises `ModelError` if a token's id is not below `vocab_size` (0: not
    checked): tokenizer and model do not belong together then.
    """
    encoder = _Encoder(tokenizer=tokenizer, max_seq_length=max_seq_length, append_eos=append_eos)
    kept: list[Example] = []
    num_read = num_truncated = 0
    for record in read_file(path):
        example, is_truncated = _encoded(record, encoder, section, is_text=is_plain_text(path))
        num_read += 1
        if _num_label_tokens(example.labels) > 0:
            kept.append(example)
            num_truncated += is_truncated
    if not kept:
        raise DataError(
            f"{path}: none of {counted(num_read, 'example')} has a token to learn within"
            f" {counted(max_seq_length, 'token')}; shorten the"
            " prompts, or raise text.max_seq_length on the server"
        )
    _check_ids(kept, vocab_size)
    return Dataset(examples=tuple(kept), num_truncated=num_truncated, num_dropped=num_read - len(kept))


def check_examples(path: Path, section: DataSection, *, held_out: float = 0.0) -> None:
    """Find what `read_examples` and `hold_out` would refuse, as far as no tokenizer is needed for it."""
    num_records = 0
    for record in read_file(path):
        _check_fields(record, section, is_text=is_plain_text(path))
        num_records += 1
    _num_held_out(num_records, held_out)


def read_preferences(path: Path, section: DataSection) -> list[dict[str, Any]]:
    """Read pairs of answers for TRL's `DPOTrainer`: `datasets.Dataset.from_list` takes what this returns.

    Each record has `chosen` and `rejected`, and a `section.prompt_field` unless both begin with it: all strings, or
    all conversations, as TRL has them. Raises `DataError` with the file and the line.
    """
    rows = []
    for record in read_file(path):
        names = [section.prompt_field] if section.prompt_field in record.fields else []
        row = {name: _parsed(record.fields.get(name)) for name in (*names, *_PREFERENCE)}
        if not all(isinstance(value, str) for value in row.values()):
            if not all(isinstance(value, list) for value in row.values()):
                raise DataError(
                    f"{record.where}: {' and '.join(row)} must be there, and all be strings or all be lists of messages"
                )
            for value in row.values():
                messages_in(value, record.where)
        rows.append({{section.prompt_field: "prompt"}.get(name, name): value for name, value in row.items()})
    return rows


def _check_ids(examples: Sequence[Example], vocab_size: int) -> None:
    largest = max(int(example.input_ids.max()) for example in examples)
    if vocab_size and largest >= vocab_size:
        raise ModelError(
            f"the tokenizer gives the token id {largest}, and the model has {vocab_size} embeddings: the server's"
            " tokenizer and model do not belong together"
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


def collate_packed(rows: Sequence[Sequence[Example]]) -> Batch:
    """Put the examples of each row one behind the other, without a label where one begins, and pad the rows."""
    batch = collate([_joined(row) for row in rows])
    return replace(batch, example_lengths=tuple(len(each.input_ids) for row in rows for each in row))


def _joined(row: Sequence[Example]) -> Example:
    labels = torch.cat([example.labels for example in row])
    starts = [0, *accumulate(len(example.labels) for example in row)][:-1]
    labels[starts] = IGNORED_LABEL  # or the last token of one example would be asked to predict the next one's first
    return Example(input_ids=torch.cat([example.input_ids for example in row]), labels=labels)


def pack(lengths: Sequence[int], *, capacity: int, max_examples: int) -> list[tuple[int, ...]]:
    """Deal examples, by their lengths, into rows of up to `capacity` tokens and `max_examples` examples.

    Best fit decreasing (Johnson 1973): the long ones first, each into the row with the least room that holds it.
    Returns each row's examples by number, rising; rows in the order of their first.
    """
    rows: dict[int, list[list[int]]] = {}  # by the room that is left
    rooms: list[int] = []  # those that there are rows for, rising
    full: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        at = bisect_left(rooms, lengths[number])
        room = rooms[at] if at < len(rooms) else capacity
        row = rows[room].pop() if at < len(rooms) else []
        if at < len(rooms) and not rows[room]:
            del rooms[at], rows[room]
        row.append(number)
        room -= lengths[number]
        if room <= 0 or len(row) == max_examples:
            full.append(row)
            continue
        if room not in rows:
            rows[room] = []
            insort(rooms, room)
        rows[room].append(row)
    return sorted(tuple(sorted(row)) for row in (*full, *(row for others in rows.values() for row in others)))


@dataclass(frozen=True, slots=True, eq=False)
class TrainBatches:
    """An endless stream of shuffled epochs, cut into steps: what a step holds hangs on its number alone.

    An epoch has each row once, and so each example. A batch may run over the border of two epochs, so none is short,
    and fewer rows than a batch repeat in it. Raises `DataError` if there are no examples.
    """

    dataset: Dataset
    _: KW_ONLY
    seed: int
    client_id: str
    per_device_train_batch_size: int
    """Rows in a micro-batch: an example each, or several."""
    gradient_accumulation_steps: int
    packed_length: int = 0
    """Tokens up to which examples are packed into one row; 0 where each row is one example."""
    groups_by_length: bool = False
    """Whether rows of about the same length share a micro-batch."""
    max_rows: int = 0
    """Rows that a micro-batch is cut into pieces of, each a micro-batch of its own; 0 leaves them whole."""
    rows: tuple[tuple[Example, ...], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.dataset.examples:
            raise DataError(f"client {self.client_id} has no examples to train on; see data.path")
        object.__setattr__(self, "rows", tuple(self._pack() if self.packed_length else self._one_each()))

    @classmethod
    def of(cls, dataset: Dataset, run: RunConfig, client: ClientSection) -> "TrainBatches":
        """Deal one client's examples as a run's settings say, in pieces where its own say so."""
        return cls(
            dataset,
            seed=run.seed,
            client_id=client.client_id,
            max_rows=client.micro_batch_rows,
            per_device_train_batch_size=run.federation.per_device_train_batch_size,
            gradient_accumulation_steps=run.federation.gradient_accumulation_steps,
            packed_length=run.text.max_seq_length if run.text.packing else 0,
            groups_by_length=run.text.train_sampling_strategy == "group_by_length",
        )

    def at(self, step: int) -> tuple[Batch, ...]:
        """Return the micro-batches of a step, counted from 1; raise `ValueError` below that."""
        if step < 1:
            raise ValueError(f"steps count from 1, got {step}")
        size = self.per_device_train_batch_size
        first = (step - 1) * self.gradient_accumulation_steps * size
        order = functools.cache(self._order)
        places = [divmod(at, len(self.rows)) for at in range(first, first + self.gradient_accumulation_steps * size)]
        rows = [self.rows[order(epoch)[place]] for epoch, place in places]
        pieces = (piece for group in _cut(rows, size) for piece in _cut(group, self.max_rows or size))
        return tuple(self._collated(piece) for piece in pieces)

    def _collated(self, rows: Sequence[tuple[Example, ...]]) -> Batch:
        return collate_packed(rows) if self.packed_length else collate([example for (example,) in rows])

    def _order(self, epoch: int) -> tuple[int, ...]:
        seeded = (self.seed, self.client_id, epoch)
        if not self.groups_by_length:
            return _epoch_order(len(self.rows), *seeded)
        lengths = tuple(sum(len(example.input_ids) for example in row) for row in self.rows)
        size = self.per_device_train_batch_size
        return _grouped_order(lengths, size, -epoch * len(lengths) % size, *seeded)

    def _one_each(self) -> Iterator[tuple[Example]]:
        return ((example,) for example in self.dataset.examples)

    def _pack(self) -> Iterator[tuple[Example, ...]]:
        examples = self.dataset.examples
        packed = pack(
            [len(example.input_ids) for example in examples],
            capacity=self.packed_length,
            max_examples=max(1, MAX_PACKED_EXAMPLES // self.per_device_train_batch_size),
        )
        return (tuple(examples[number] for number in row) for row in packed)


def padding_share(batches: TrainBatches, num_steps: int) -> float | None:
    """Return which part of the positions of the first steps is padding, None for no steps."""
    num_tokens = num_positions = 0
    for step in range(1, num_steps + 1):
        for batch in batches.at(step):
            num_tokens += batch.num_tokens
            num_positions += batch.num_positions
    return 1 - num_tokens / num_positions if num_positions else None


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
        learned = self._ids(completion) + self._end() if completion else []  # an end alone teaches nothing
        return self._cut(given + learned, [False] * len(given) + [True] * len(learned))

    def encode_conversation(self, conversation: Conversation) -> tuple[Example, bool]:
        """Tokenize the whole at once, as it is read later; a token is learned if it lies within a learned stretch."""
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


def _encoded(record: Record, encoder: _Encoder, section: DataSection, *, is_text: bool) -> tuple[Example, bool]:
    """Encode one record by the fields it has; a whole text wins, then a conversation."""
    fields = record.fields
    if is_text or section.text_field in fields:
        return encoder.encode("", _string(record, PLAIN_TEXT_FIELD if is_text else section.text_field))
    if section.messages_field in fields:
        messages = messages_in(_parsed(fields[section.messages_field]), record.where)
        return encoder.encode_conversation(render(encoder.tokenizer, messages, record.where))
    if section.prompt_field in fields and section.completion_field in fields:
        return _encoded_pair(record, encoder, section)
    raise _nothing_to_learn(record, section)


def _nothing_to_learn(record: Record, section: DataSection) -> DataError:
    fields = record.fields
    if set(_PREFERENCE) <= set(fields):
        return DataError(
            f"{record.where}: pairs of chosen and rejected answers are for TRL's DPOTrainer on a model from"
            " client_edge.connect (docs/data.md); splitfl client learns from text, messages, or prompt and completion"
        )
    return DataError(
        f"{record.where}: no field {section.text_field!r} or {section.messages_field!r}, nor both"
        f" {section.prompt_field!r} and {section.completion_field!r}; the fields there are: {name_fields(fields)}; set"
        " data.text_field, data.messages_field, or data.prompt_field and data.completion_field"
    )


def _check_fields(record: Record, section: DataSection, *, is_text: bool) -> None:
    """Raise as `_encoded` does for a record that has not what is learned."""
    fields = record.fields
    if is_text or section.text_field in fields:
        _string(record, PLAIN_TEXT_FIELD if is_text else section.text_field)
    elif section.messages_field in fields:
        messages_in(_parsed(fields[section.messages_field]), record.where)
    elif section.prompt_field in fields and section.completion_field in fields:
        prompt, completion = (fields[name] for name in (section.prompt_field, section.completion_field))
        if isinstance(prompt, list) and isinstance(completion, list):
            messages_in([*prompt, *completion], record.where)
        else:
            _string(record, section.prompt_field)
            _string(record, section.completion_field)
    else:
        raise _nothing_to_learn(record, section)


def _encoded_pair(record: Record, encoder: _Encoder, section: DataSection) -> tuple[Example, bool]:
    """Encode a prompt and a completion, both text or both conversations (TRL's conversational form)."""
    prompt, completion = (record.fields[name] for name in (section.prompt_field, section.completion_field))
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = [*messages_in(prompt, record.where), *messages_in(completion, record.where)]
        return encoder.encode_conversation(render(encoder.tokenizer, messages, record.where, num_given=len(prompt)))
    return encoder.encode(_string(record, section.prompt_field), _string(record, section.completion_field))


def _parsed(value: object) -> object:
    """Return a conversation that a table's cell holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


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
            f"holding out {fraction} of {counted(num_examples, 'example')} leaves nothing to train on; add examples,"
            " name data.eval_path, or set data.eval_fraction to 0"
        )
    return num_held_out


@functools.lru_cache(maxsize=2)
def _epoch_order(num_examples: int, seed: int, client_id: str, epoch: int) -> tuple[int, ...]:
    """Return the permutation of an epoch, the same in every process."""
    return tuple(torch.randperm(num_examples, generator=_generator("order", seed, client_id, epoch)).tolist())


@functools.lru_cache(maxsize=2)
def _grouped_order(
    lengths: tuple[int, ...], size: int, begun: int, seed: int, client_id: str, epoch: int
) -> tuple[int, ...]:
    """Return a permutation of an epoch in which rows of about the same length share a micro-batch of `size` rows.

    As transformers' `LengthGroupedSampler`: shuffled, cut into stretches of up to 50 micro-batches, each sorted by
    length. Beyond it micro-batches are shuffled once more, so that no stretch goes from long to short; and the first
    `begun` rows, which fill the micro-batch that the last epoch has begun, are left as they fall, so that micro-batches
    are cut where the sorting meant them to be.
    """
    order = _epoch_order(len(lengths), seed, client_id, epoch)
    end = begun + max(0, len(order) - begun) // size * size
    stretch = size * max(1, min(len(lengths) // (4 * size), 50))
    groups = [
        group
        for part in _cut(order[begun:end], stretch)
        for group in _cut(sorted(part, key=lambda row: lengths[row], reverse=True), size)
    ]
    shuffled = torch.randperm(len(groups), generator=_generator("groups", seed, client_id, epoch)).tolist()
    return (*order[:begun], *(row for number in shuffled for row in groups[number]), *order[end:])


def _cut(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _generator(*parts: str | int) -> torch.Generator:
    """Seed a generator from what it is for, so that neither the global seed nor other draws change it."""
    digest = hashlib.sha256("\n".join(str(part) for part in parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
