"""What of held-out text is asked of the model, and what does not fit stops the client with a sentence."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tokenizer, write_text

from client_edge.text.exam import Exam
from client_edge.text.examples import Dataset
from client_edge.text.reading import read_examples
from splitfl.config.own import DataSection
from splitfl.config.trees import RunConfig
from splitfl.errors import DataError

MAX_LENGTH = 16


def run_with(**evaluation: Any) -> RunConfig:
    return RunConfig.from_tree({"text": {"max_seq_length": MAX_LENGTH}, "evaluation": evaluation}, source="test")


def read(path: Path) -> Dataset:
    return read_examples(
        path, section=DataSection(), tokenizer=tiny_tokenizer(), max_seq_length=MAX_LENGTH, append_eos=True
    )


def questions(folder: Path, rows: Sequence[tuple[str, str]]) -> Dataset:
    path = folder / "questions.jsonl"
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read(path)


def exam_of(run: RunConfig, held_out: Dataset, train: Dataset | None = None) -> Exam:
    return Exam.of(run, tiny_tokenizer(), train or held_out, held_out)


def test_nothing_is_asked_where_nothing_more_is_measured(tmp_path: Path) -> None:
    held_out = read(write_text(tmp_path / "a.txt", num_lines=3, seed=1))
    exam = exam_of(run_with(), held_out)
    assert (exam.to_answer, exam.to_classify, exam.labels) == ((), (), ())


def test_prompt_and_completion_come_apart_again(tmp_path: Path) -> None:
    exam = exam_of(run_with(measures=["rouge_l"]), questions(tmp_path, [("ab", " yes")]))
    (question,) = exam.to_answer
    tokenizer = tiny_tokenizer()
    assert question.prompt_ids.tolist() == tokenizer("ab")["input_ids"]
    assert question.completion_ids.tolist() == [*tokenizer(" yes")["input_ids"], 2]
    assert exam.to_classify == ()
    assert "yes" not in repr(exam)


def test_prompts_are_as_far_apart_as_they_can_be(tmp_path: Path) -> None:
    held_out = questions(tmp_path, [("abcdefghij"[n], "k") for n in range(10)])
    exam = exam_of(run_with(measures=["exact_match"], num_examples=3), held_out)
    wanted = [tiny_tokenizer()(letter)["input_ids"] for letter in "adg"]
    assert [question.prompt_ids.tolist() for question in exam.to_answer] == wanted
    assert len(exam_of(run_with(measures=["exact_match"], num_examples=0), held_out).to_answer) == 10
    assert len(exam_of(run_with(measures=["exact_match"], num_examples=99), held_out).to_answer) == 10


def test_what_may_have_lost_its_end_is_left_out(tmp_path: Path) -> None:
    held_out = questions(tmp_path, [("a" * 10, "b" * 10), ("a" * 10, "b" * 5), ("a", "b")])
    assert len(held_out) == 3
    assert len(exam_of(run_with(measures=["rouge_l"]), held_out).to_answer) == 1


def test_labels_are_the_completions_of_all_examples(tmp_path: Path) -> None:
    train = questions(tmp_path, [("a", " no"), ("b", " may be")])
    exam = exam_of(run_with(measures=["accuracy"]), questions(tmp_path, [("c", " yes"), ("d", " no")]), train)
    tokenizer = tiny_tokenizer()
    wanted = {(*tokenizer(word)["input_ids"], 2) for word in (" no", " may be", " yes")}
    assert set(exam.labels) == wanted
    assert len(exam.to_classify) == 2


def test_a_prompt_that_leaves_no_room_for_the_longest_label_is_left_out(tmp_path: Path) -> None:
    held_out = questions(tmp_path, [("a" * 12, "b"), ("a", "b" * 8)])
    exam = exam_of(run_with(measures=["accuracy"]), held_out)
    assert [len(question.prompt_ids) for question in exam.to_classify] == [1]


def test_a_conversation_asks_for_its_last_answer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    path = tmp_path / "chat.jsonl"
    turns = [("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "DE")]
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    held_out = read_examples(
        path, section=DataSection(), tokenizer=tokenizer, max_seq_length=MAX_LENGTH, append_eos=True
    )
    (question,) = Exam.of(run_with(measures=["rouge_l"]), tokenizer, held_out, held_out).to_answer
    assert question.completion_ids.tolist() == tokenizer("DE")["input_ids"]
    assert question.prompt_ids.tolist() == tokenizer("uAaBuCa")["input_ids"]


class TestRefused:
    def test_text_that_is_learned_whole(self, tmp_path: Path) -> None:
        held_out = read(write_text(tmp_path / "a.txt", num_lines=3, seed=1))
        with pytest.raises(DataError, match="needs held-out prompts with completions"):
            exam_of(run_with(measures=["rouge_l"]), held_out)

    def test_completions_that_are_no_labels(self, tmp_path: Path) -> None:
        held_out = questions(tmp_path, [("a", f"x{n}") for n in range(70)])
        with pytest.raises(DataError, match="the completions are 70 different texts, where labels are 2 to 64"):
            exam_of(run_with(measures=["accuracy"]), held_out)

    def test_one_label_alone(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="the completions are 1 different texts"):
            exam_of(run_with(measures=["macro_f1"]), questions(tmp_path, [("a", "b")]))

    def test_completions_that_are_spelt_otherwise(self, tmp_path: Path) -> None:
        held_out = questions(tmp_path, [("a", " yes"), ("b", "planted")])
        run = run_with(measures=["accuracy"], label_words=[" yes", " no"])
        with pytest.raises(DataError, match="1 of 2 held-out completions are none of the 2") as refused:
            exam_of(run, held_out)
        assert "planted" not in str(refused.value)

    def test_no_room_for_the_longest_label(self, tmp_path: Path) -> None:
        train = questions(tmp_path, [("a", "b" * 10), ("a", "c")])
        with pytest.raises(DataError, match="no held-out prompt leaves room for the longest label word, which has 11"):
            exam_of(run_with(measures=["accuracy"]), questions(tmp_path, [("a" * 8, "c")]), train)
