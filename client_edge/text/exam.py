"""What is asked of the model about held-out text: prompts to answer, and prompts to choose a label word for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from client_edge.text.encoding import Tokenizer
from client_edge.text.examples import Dataset, Example
from splitfl.config.trees import RunConfig
from splitfl.errors import DataError
from splitfl.models.loss import IGNORED_LABEL
from splitfl.telemetry.units import counted

# Completions that are more than this are texts, and no labels.
_MAX_LABELS = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Question:
    """A held-out example as what is given and what is to come: int64 vectors."""

    prompt_ids: Tensor = field(repr=False)
    completion_ids: Tensor = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Exam:
    """What is asked of the model besides predicting each held-out token."""

    to_answer: tuple[Question, ...] = field(default=(), repr=False)
    to_classify: tuple[Question, ...] = field(default=(), repr=False)
    labels: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    """The label words' tokens, as they follow a prompt."""

    @classmethod
    def of(cls, run: RunConfig, tokenizer: Tokenizer, train: Dataset, held_out: Dataset) -> "Exam":
        """Choose what is asked; raise `DataError` where the held-out text does not fit `evaluation.measures`."""
        wanted, max_seq_length = run.evaluation, run.text.max_seq_length
        if not wanted.measures:
            return cls()
        questions = _questions(held_out, tokenizer, max_seq_length)
        if not questions:
            raise DataError(
                f"evaluation.measures = {list(wanted.measures)} needs held-out prompts with completions, and there is"
                f" none that is shorter than text.max_seq_length = {max_seq_length} (longer ones may have lost"
                " their end): give data.eval_path such examples, or ask the server's operator for other measures"
            )
        to_answer = _spread(questions, wanted.num_examples) if wanted.generates else ()
        if not wanted.classifies:
            return cls(to_answer=to_answer)
        labels = _labels(run, tokenizer, [*_questions(train, tokenizer, max_seq_length), *questions])
        _check_labels(questions, labels)
        to_classify = _with_room(questions, max(map(len, labels)), max_seq_length)
        return cls(to_answer=to_answer, to_classify=to_classify, labels=labels)


def _with_room(questions: Sequence[Question], longest: int, max_seq_length: int) -> tuple[Question, ...]:
    """Keep the prompts that leave room for each label word; raise `DataError` if there are none."""
    fitting = tuple(each for each in questions if len(each.prompt_ids) + longest <= max_seq_length)
    if not fitting:
        raise DataError(
            f"no held-out prompt leaves room for the longest label word, which has {counted(longest, 'token')}, within"
            f" text.max_seq_length = {max_seq_length}: shorten the prompts, or raise that on the server"
        )
    return fitting


def _questions(dataset: Dataset, tokenizer: Tokenizer, max_seq_length: int) -> list[Question]:
    found = (_question(example, tokenizer) for example in dataset.examples if len(example.labels) < max_seq_length)
    return [question for question in found if question is not None]


def _question(example: Example, tokenizer: Tokenizer) -> Question | None:
    """Split an example before its last learned stretch: a conversation's is the assistant's last turn."""
    is_learned = (example.labels != IGNORED_LABEL).tolist()
    end = len(is_learned)
    while end and not is_learned[end - 1]:
        end -= 1
    start = end
    while start and is_learned[start - 1]:
        start -= 1
    prompt_ids = example.input_ids[:start]
    if not start or prompt_ids.tolist() == [tokenizer.bos_token_id]:
        return None  # a text that is learned whole
    return Question(prompt_ids=prompt_ids, completion_ids=example.input_ids[start:end])


def _spread(questions: Sequence[Question], limit: int) -> tuple[Question, ...]:
    """Take `limit` of them, as far apart as they can be: files are often sorted."""
    count = min(limit or len(questions), len(questions))
    return tuple(questions[at * len(questions) // count] for at in range(count))


def _labels(run: RunConfig, tokenizer: Tokenizer, questions: Iterable[Question]) -> tuple[tuple[int, ...], ...]:
    words = run.evaluation.label_words
    if words:
        end = [tokenizer.eos_token_id] if run.text.append_eos and tokenizer.eos_token_id is not None else []
        return tuple((*tokenizer(word, add_special_tokens=False)["input_ids"], *end) for word in words)
    found = sorted({tuple(question.completion_ids.tolist()) for question in questions})
    if not 2 <= len(found) <= _MAX_LABELS:
        raise DataError(
            f"evaluation.measures classifies by label words, and the completions are {len(found)} different texts,"
            f" where labels are 2 to {_MAX_LABELS}: name them in evaluation.label_words on the server, or leave"
            " accuracy and macro_f1 out"
        )
    return tuple(found)


def _check_labels(questions: Sequence[Question], labels: Sequence[tuple[int, ...]]) -> None:
    strange = sum(tuple(question.completion_ids.tolist()) not in set(labels) for question in questions)
    if strange:
        raise DataError(
            f"{strange} of {len(questions)} held-out completions are none of the {len(labels)} in"
            " evaluation.label_words: spell the words as the completions are, a leading space included"
        )
