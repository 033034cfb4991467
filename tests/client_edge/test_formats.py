"""Text as people have it: tables, conversations, pairs of answers."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import tiny_tokenizer
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from client_edge.text.examples import Dataset
from client_edge.text.reading import read_examples, read_preferences
from splitfl.config.own import DataSection
from splitfl.errors import DataError, ModelError
from splitfl.federation.partition import read_records, write_partitions

SECRET = "Mrs Example has a cough"
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "a cough"},
    {"role": "assistant", "content": "poor you"},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# thinks aloud in the last turn only, as some models' templates do
FORGETFUL = "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last else m.content[:2] }}\n{% endfor %}"


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.chat_template = template
    made.backend_tokenizer.decoder = decoders.ByteLevel()
    return made


def read(path: Path, with_tokenizer: Any = None, *, length: int = 200, **more: Any) -> Dataset:
    section = DataSection(path=path)
    return read_examples(
        path,
        section=section,
        tokenizer=with_tokenizer or tokenizer(),
        max_seq_length=length,
        append_eos=False,
        **more,
    )


def learned(dataset: Dataset, number: int = 0) -> str:
    labels = dataset.examples[number].labels
    return str(tokenizer().decode(labels[labels >= 0]))


def write(path: Path, *objects: object) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in objects), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


class TestTables:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.csv", 'prompt,completion,ward\n"one, two", three,7\nfour," five\nsix",8\n'),
            ("a.csv", '\ufeffprompt;completion;ward\r\none, two; three;7\r\nfour;" five\nsix";8\r\n'),
            ("a.tsv", 'prompt\tcompletion\tward\none, two\t three\t7\nfour\t" five\nsix"\t8\n'),
        ],
    )
    def test_csv(self, tmp_path: Path, name: str, content: str) -> None:
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        dataset = read(tmp_path / name)
        assert [learned(dataset, number) for number in range(2)] == [" three", " five\nsix"]

    def test_parquet(self, tmp_path: Path) -> None:
        rows: list[dict[str, Any]] = [{"messages": TALK, "ward": number} for number in range(3)]
        dataset = read(write_parquet(tmp_path / "a.parquet", rows))
        assert len(dataset) == 3
        assert learned(dataset, 2) == "yes?<end>\npoor you<end>\n"

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (f"text,text\n{SECRET},\n", "each once: 'text' comes twice"),
            (f"text,\n{SECRET},\n", "a column has no name"),
            (f"text\n{SECRET},more\n", "line 2: 2 cells where the header has 1"),
            ("text\n", "a table without rows"),
            (f'text\n"{SECRET}" and\n', "not CSV"),
            (f"body\n{SECRET}\n", "line 2: no field 'text'"),
        ],
    )
    def test_a_bad_table_is_named_and_never_quoted(self, tmp_path: Path, content: str, reason: str) -> None:
        (tmp_path / "a.csv").write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=reason) as caught:
            read(tmp_path / "a.csv")
        assert SECRET not in str(caught.value)

    def test_other_encodings_and_other_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_bytes("text\nMüller\n".encode("latin-1"))
        with pytest.raises(DataError, match="not UTF-8"):
            read(tmp_path / "a.csv")
        (tmp_path / "a.parquet").write_text("no table")
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            read(tmp_path / "a.parquet")
        with pytest.raises(DataError, match="no such file"):
            read(tmp_path / "missing.parquet")

    def test_a_cell_longer_than_the_csv_modules_own_limit(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text(f"text\n{'a' * 200_000}\n")
        assert read(tmp_path / "a.csv", length=5).num_truncated == 1

    def test_shares_of_a_table_are_lines_of_json(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", [{"text": f"number {number}"} for number in range(4)])
        one, two = write_partitions(path, tmp_path / "out", [[0, 3], [1, 2]])
        assert [each["text"] for each in (*read_records(one), *read_records(two))] == [
            f"number {number}" for number in (0, 3, 1, 2)
        ]


class TestConversations:
    def test_every_turn_of_the_assistant_is_learned_and_nothing_else(self, tmp_path: Path) -> None:
        dataset = read(write(tmp_path / "a.jsonl", {"messages": TALK}))
        assert learned(dataset) == "yes?<end>\npoor you<end>\n"
        whole = tokenizer().apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
        assert dataset.examples[0].input_ids.tolist() == whole

    def test_a_conversation_in_a_cell(self, tmp_path: Path) -> None:
        cell = json.dumps(TALK[:3]).replace('"', '""')
        (tmp_path / "a.csv").write_text(f'messages\n"{cell}"\n')
        assert learned(read(tmp_path / "a.csv")) == "yes?<end>\n"

    def test_a_prompt_and_a_completion_of_messages(self, tmp_path: Path) -> None:
        dataset = read(write(tmp_path / "a.jsonl", {"prompt": TALK[:4], "completion": TALK[4:]}))
        assert learned(dataset) == "poor you<end>\n"

    @pytest.mark.parametrize(
        ("messages", "template", "reason"),
        [
            (TALK, None, "messages need a chat template"),
            (TALK, FORGETFUL, "writes message 3 differently when others follow"),
            (TALK, "{{ raise_exception('no ' + messages[1].content) }}", "refuses this conversation"),
            (TALK[:2], TEMPLATE, "no message of the role 'assistant'"),
            ([], TEMPLATE, "no list of at least one"),
            ("hello", TEMPLATE, "no list of at least one"),
            ([{"role": "user", "content": ["x"]}], TEMPLATE, "message 1 is no object with a role"),
        ],
    )
    def test_a_bad_conversation_is_named_and_never_quoted(
        self, tmp_path: Path, messages: object, template: str | None, reason: str
    ) -> None:
        path = write(tmp_path / "a.jsonl", {"messages": messages})
        with pytest.raises(DataError, match=rf"line 1: .*{reason}") as caught:
            read(path, tokenizer(template))
        assert "cough" not in str(caught.value)


class TestPreferences:
    def test_pairs_are_read_for_trl(self, tmp_path: Path) -> None:
        rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"chosen": TALK[:3], "rejected": TALK[:3]}]
        path = write(tmp_path / "a.jsonl", *rows)
        assert read_preferences(path, DataSection(path=path)) == rows

    def test_splitfl_client_says_who_takes_them(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="TRL's DPOTrainer"):
            read(write(tmp_path / "a.jsonl", {"chosen": "a", "rejected": "b"}))

    @pytest.mark.parametrize("row", [{"chosen": "a"}, {"chosen": "a", "rejected": TALK}, {"chosen": 1, "rejected": 2}])
    def test_half_a_pair(self, tmp_path: Path, row: dict[str, Any]) -> None:
        path = write(tmp_path / "a.jsonl", row)
        with pytest.raises(DataError, match="line 1: chosen and rejected must be there"):
            read_preferences(path, DataSection(path=path))


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "zz"})
    assert len(read(path, vocab_size=259)) == 1
    with pytest.raises(ModelError, match="do not belong together"):
        read(path, vocab_size=20)


def test_an_empty_completion_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "b"})
    section = DataSection(path=path)
    dataset = read_examples(path, section=section, tokenizer=tokenizer(), max_seq_length=20, append_eos=True)
    assert (len(dataset), dataset.num_dropped) == (1, 1)
