"""The client's text: what becomes a label, what is cut off, what errors may say."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from client_edge.text.batches import collate
from client_edge.text.examples import Dataset
from client_edge.text.reading import check_examples, read_examples
from splitfl.config.own import DataSection
from splitfl.errors import DataError

BOS, EOS = 256, 257
SECRET = "Mrs Example has a cough"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; without merges, so that positions can be counted by eye."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: number for number, character in enumerate(alphabet)} | {"<s>": BOS, "</s>": EOS}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def write(path: Path, *objects: object) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in objects), encoding="utf-8")
    return path


def read(path: Path, tokenizer: object, *, length: int = 64, append_eos: bool = True, **fields: str) -> Dataset:
    section = DataSection(path=path, **fields)
    return read_examples(path, section=section, tokenizer=tokenizer, max_seq_length=length, append_eos=append_eos)


def labels_of(dataset: Dataset) -> list[list[int]]:
    return [example.labels.tolist() for example in dataset.examples]


def ids_of(dataset: Dataset) -> list[list[int]]:
    return [example.input_ids.tolist() for example in dataset.examples]


def test_a_text_is_learned_whole_and_ends_with_eos(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = read(write(tmp_path / "a.jsonl", {"text": "hello"}), tokenizer)
    expected = [*tokenizer("hello", add_special_tokens=False)["input_ids"], EOS]
    assert ids_of(dataset) == labels_of(dataset) == [expected]
    assert dataset.examples[0].input_ids.dtype == dataset.examples[0].labels.dtype == torch.int64
    assert (dataset.num_truncated, dataset.num_dropped) == (0, 0)


def test_no_loss_is_taken_on_a_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "abc", "completion": " de"})
    dataset = read(path, tokenizer, append_eos=False)
    completion = tokenizer(" de", add_special_tokens=False)["input_ids"]
    assert labels_of(dataset) == [[-100] * 3 + completion]
    assert ids_of(dataset) == [tokenizer("abc", add_special_tokens=False)["input_ids"] + completion]


def test_bos_goes_first_only_if_the_tokenizer_says_so(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    class WithBos(PreTrainedTokenizerFast):
        add_bos_token = True

    path = write(tmp_path / "a.jsonl", {"text": "hi"})
    with_bos = WithBos(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    without = read(path, tokenizer)
    with_it = read(path, with_bos)
    assert ids_of(with_it) == [[BOS, *ids_of(without)[0]]]
    assert labels_of(with_it) == [[-100, *labels_of(without)[0]]]


def test_without_an_eos_token_none_is_appended(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert len(ids_of(read(write(tmp_path / "a.jsonl", {"text": "hi"}), bare))[0]) == 2


@pytest.mark.parametrize(("text", "num_tokens", "num_truncated"), [("abcd", 5, 0), ("abcde", 5, 1), ("a" * 9, 5, 1)])
def test_truncation_takes_the_eos_first(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, text: str, num_tokens: int, num_truncated: int
) -> None:
    dataset = read(write(tmp_path / "a.jsonl", {"text": text}), tokenizer, length=5)
    assert len(ids_of(dataset)[0]) == num_tokens
    assert (ids_of(dataset)[0][-1] == EOS) == (num_truncated == 0)
    assert dataset.num_truncated == num_truncated


def test_an_example_without_a_label_to_predict_is_dropped_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    long_prompt = {"prompt": "a" * 9, "completion": "b"}
    only_position_0 = {"text": "a"}
    kept = {"prompt": "aa", "completion": "bbbb"}
    path = write(tmp_path / "a.jsonl", long_prompt, only_position_0, kept)
    dataset = read(path, tokenizer, length=4, append_eos=False)
    assert labels_of(dataset) == [[-100, -100, *tokenizer("bb", add_special_tokens=False)["input_ids"]]]
    assert (len(dataset), dataset.num_truncated, dataset.num_dropped) == (1, 1, 2)


def test_nothing_left_to_learn_names_the_setting(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "a" * 9, "completion": "b"})
    with pytest.raises(DataError, match=r"none of 1 example .* text\.max_seq_length"):
        read(path, tokenizer, length=4)


def test_plain_text_is_an_example_a_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.TXT"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\n  \ntwo \xe2\x80\xa8more\nthree")
    texts = ["one", "two \u2028more", "three"]
    expected = [[*tokenizer(text, add_special_tokens=False)["input_ids"], EOS] for text in texts]
    # the setting for JSON fields has no say in plain text
    assert ids_of(read(path, tokenizer, text_field="body")) == expected


def test_fields_are_named_by_the_settings(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.json", {"body": "x"}, {"question": "q", "answer": "a"})
    dataset = read(path, tokenizer, text_field="body", prompt_field="question", completion_field="answer")
    assert [row[0] == -100 for row in labels_of(dataset)] == [False, True]


def test_a_byte_order_mark_before_json_is_no_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "hi"}\n')
    assert len(read(path, tokenizer)) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            f'{{"text": "{SECRET}',
            r"line 3: not JSON: Unterminated string starting at, column 10; write one JSON object",
        ),
        (f'["{SECRET}"]', r"line 3: not an object but an array"),
        (f'"{SECRET}"', r"line 3: not an object but a string"),
        ("3", r"line 3: not an object but a number"),
        ("true", r"line 3: not an object but true or false"),
        ("null", r"line 3: not an object but null"),
        ("[" * 100_000, r"line 3: not JSON: .* nested too deeply"),
        ("1" * 5_000, r"line 3: not JSON: too long a number"),
        (f'{{"body": "{SECRET}"}}', r"line 3: no field 'text' or .*: 'body'; set data\.text_field"),
        (f'{{"prompt": "{SECRET}"}}', r"line 3: .* both 'prompt' and 'completion'; the fields there are: 'prompt';"),
        (f'{{"text": ["{SECRET}"]}}', r"line 3: field 'text' is not a string"),
        (f'{{"prompt": "{SECRET}", "completion": null}}', r"line 3: field 'completion' is not a string"),
        (f'{{"text": "{SECRET} \\ud800"}}', r"line 3: field 'text' holds half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_and_never_quoted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, content: str, reason: str
) -> None:
    path = tmp_path / "clinic.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{content}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"clinic\.jsonl, " + reason) as caught:
        read(path, tokenizer)
    assert SECRET not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "an empty file"),
        ("a.jsonl", b"\n  \n", "an empty file"),
        ("a.txt", b"fine\ncaf\xe9\n", r"line 2: not UTF-8; save the file as UTF-8"),
        ("a.xlsx", b"text\n", r"unknown suffix '\.xlsx'; known: \.jsonl, \.json, \.txt"),
    ],
)
def test_a_bad_file_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, content: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*{reason}"):
        read(path, tokenizer)


def test_a_path_that_is_no_file_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read(tmp_path / "none.jsonl", tokenizer)
    with pytest.raises(DataError, match=r": a directory; name one file in it"):
        read(tmp_path, tokenizer)
    write(tmp_path / "file.jsonl", {"text": "x"})
    with pytest.raises(DataError, match=r"cannot be read: Not a directory"):
        read(tmp_path / "file.jsonl" / "inner.jsonl", tokenizer)


def test_nothing_that_prints_itself_prints_ids(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = read(write(tmp_path / "a.jsonl", {"text": SECRET}), tokenizer)
    batch = collate(dataset.examples)
    assert "tensor" not in repr(dataset) + repr(dataset.examples[0]) + repr(batch)
    assert "lengths_B=(24,)" in repr(batch)


@pytest.mark.parametrize(
    "record",
    [
        {"text": 3},
        {"body": SECRET},
        {"prompt": SECRET},
        {"prompt": SECRET, "completion": 1},
        {"messages": SECRET},
        {"messages": [{"role": "assistant"}]},
        {"chosen": SECRET, "rejected": SECRET},
        {"prompt": [{"role": "user", "content": SECRET}], "completion": []},
        {"prompt": [{"role": "user", "content": SECRET}], "completion": [{"role": "assistant"}]},
    ],
)
def test_what_cannot_be_learned_is_found_without_a_tokenizer(
    record: dict[str, object], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "fine"}, record)
    with pytest.raises(DataError) as later:
        read(path, tokenizer)
    with pytest.raises(DataError) as at_once:
        check_examples(path, DataSection(path=path))
    assert str(at_once.value) == str(later.value)
    assert "line 2" in str(at_once.value)
    assert SECRET not in str(at_once.value)


def test_text_of_which_nothing_would_be_left_is_found_without_a_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "all there is"})
    with pytest.raises(DataError, match=r"holding out 0\.1 of 1 example leaves nothing to train on; add examples, "):
        check_examples(path, DataSection(path=path), held_out=0.1)
    check_examples(path, DataSection(path=path))
