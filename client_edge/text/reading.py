"""Reads the client's own files: which fields of a record are learned, and what a bad file is told.

Errors name the file and the line, and quote no example.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client_edge.text.chat import messages_in
from client_edge.text.dealing import num_held_out
from client_edge.text.encoding import Encoder, Learned, Passage, Talk, Tokenizer
from client_edge.text.examples import Dataset, Example, num_label_tokens
from splitfl.config.own import DataSection
from splitfl.errors import DataError, ModelError
from splitfl.federation.records import PLAIN_TEXT_FIELD, Record, is_plain_text, name_fields, read_file
from splitfl.telemetry.units import counted

# What makes a record a pair of answers, of which one is preferred.
_PREFERENCE = ("chosen", "rejected")


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
    encoder = Encoder(tokenizer=tokenizer, max_seq_length=max_seq_length, append_eos=append_eos)
    kept: list[Example] = []
    num_read = num_truncated = 0
    for record in read_file(path):
        learned = _learned_in(record, section, is_text=is_plain_text(path))
        example, is_truncated = encoder.encode(learned, record.where)
        num_read += 1
        if num_label_tokens(example.labels) > 0:
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
        _learned_in(record, section, is_text=is_plain_text(path))
        num_records += 1
    num_held_out(num_records, held_out)


def read_preferences(path: Path, section: DataSection) -> list[dict[str, Any]]:
    """Read pairs of answers for TRL's `DPOTrainer`: `datasets.Dataset.from_list` takes what this returns.

    Each record has `chosen` and `rejected`, and a `section.prompt_field` unless both begin with it: all strings, or
    all conversations, as TRL has them. Raises `DataError` with the file and the line.
    """
    return [_preference_in(record, section.prompt_field) for record in read_file(path)]


def _preference_in(record: Record, prompt_field: str) -> dict[str, Any]:
    names = [prompt_field] if prompt_field in record.fields else []
    row = {name: _parsed(record.fields.get(name)) for name in (*names, *_PREFERENCE)}
    if not all(isinstance(value, str) for value in row.values()):
        if not all(isinstance(value, list) for value in row.values()):
            raise DataError(
                f"{record.where}: {' and '.join(row)} must be there, and all be strings or all be lists of messages"
            )
        for value in row.values():
            messages_in(value, record.where)
    return {"prompt" if name == prompt_field else name: value for name, value in row.items()}


def _check_ids(examples: Sequence[Example], vocab_size: int) -> None:
    largest = max(int(example.input_ids.max()) for example in examples)
    if vocab_size and largest >= vocab_size:
        raise ModelError(
            f"the tokenizer gives the token id {largest}, and the model has {vocab_size} embeddings: the server's"
            " tokenizer and model do not belong together"
        )


def _learned_in(record: Record, section: DataSection, *, is_text: bool) -> Learned:
    """Find what is learned by the fields a record has; a whole text wins, then a conversation."""
    fields = record.fields
    if is_text or section.text_field in fields:
        return Passage(completion=_string(record, PLAIN_TEXT_FIELD if is_text else section.text_field))
    if section.messages_field in fields:
        return Talk(messages=messages_in(_parsed(fields[section.messages_field]), record.where))
    if section.prompt_field in fields and section.completion_field in fields:
        return _completion_in(record, section)
    raise _nothing_to_learn(record, section)


def _completion_in(record: Record, section: DataSection) -> Learned:
    """Find a prompt and its completion, both text or both conversations (TRL's conversational form)."""
    prompt, completion = (record.fields[name] for name in (section.prompt_field, section.completion_field))
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = [*messages_in(prompt, record.where), *messages_in(completion, record.where)]
        return Talk(messages=messages, num_given=len(prompt))
    return Passage(prompt=_string(record, section.prompt_field), completion=_string(record, section.completion_field))


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
