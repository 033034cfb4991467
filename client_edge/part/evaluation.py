"""What a client measures on held-out text, with the backbone on the server; what comes out of it is numbers.

Three kinds of work: batches with their labels (loss, token accuracy), prompts that are answered (exact match, ROUGE-L),
and prompts with each label word behind them (accuracy, macro-F1).
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

from client_edge.layers.edge import Edge, Scored
from client_edge.link.link import Activations, Link
from client_edge.part.scores import accuracy, exact_match, macro_f1, rouge_l
from client_edge.text.batches import Batch, collate, eval_batches
from client_edge.text.encoding import Tokenizer
from client_edge.text.exam import Exam, Question
from client_edge.text.examples import Dataset, Example
from splitfl.config.identity import OPTIONAL_MEASURES
from splitfl.config.trees import RunConfig
from splitfl.models.loss import IGNORED_LABEL
from splitfl.telemetry.measures import complete


class Evaluator:
    """Measures what one client's layers and the server's are worth together on the client's held-out text."""

    def __init__(
        self, run: RunConfig, edge: Edge, link: Link, exam: Exam, answerer: "Answerer | None", *, max_rows: int = 0
    ) -> None:
        """`max_rows` are this client's own bound on a batch, 0 for none."""
        self._run = run
        self._max_rows = max_rows
        self._edge = edge
        self._link = link
        self._exam = exam
        self._answerer = answerer

    def adopt(self, run: RunConfig) -> None:
        """Go on with settings of which some have changed."""
        self._run = run
        if self._answerer is not None:
            self._answerer.adopt(run)

    def measure(self, held_out: Dataset) -> dict[str, float]:
        """Return all measures that are finite, and what they count over, by the names of `telemetry.measures`."""
        found = {"num_eval_examples": float(len(held_out)), **self._of_tokens(held_out)}
        if self._exam.to_classify:
            found |= class_measures(self._edge, self._link, self._exam, rows_at_once(self._run, self._max_rows))
        if self._answerer is not None:
            found |= self._answerer.measures(self._exam)
        unwanted = set(OPTIONAL_MEASURES) - set(self._run.evaluation.measures)
        return {name: value for name, value in complete(found).items() if name not in unwanted}

    def loss(self, text: Dataset) -> float:
        """Return the loss alone, not a number where the text has no label."""
        return self._of_tokens(text).get("eval_loss", math.nan)

    def _of_tokens(self, text: Dataset) -> dict[str, float]:
        batches = eval_batches(text, rows_at_once(self._run, self._max_rows))
        return token_measures(self._edge, self._link, batches)


def rows_at_once(run: RunConfig, max_rows: int) -> int:
    """Return the rows of one batch of an evaluation: the run's, or fewer where the client sends no more at once."""
    rows = run.federation.per_device_eval_batch_size
    return min(rows, max_rows) if max_rows else rows


def token_measures(edge: Edge, link: Link, batches: Iterable[Batch]) -> dict[str, float]:
    """Return loss and accuracy over label tokens, and their number."""
    loss, num_correct, num_label_tokens = 0.0, 0, 0
    for batch, scored in _scored(edge, link, batches):
        loss += scored.loss
        num_correct += scored.num_correct
        num_label_tokens += batch.num_label_tokens
    if not num_label_tokens:
        return {}
    return {
        "eval_loss": loss / num_label_tokens,
        "token_accuracy": num_correct / num_label_tokens,
        "num_eval_tokens": float(num_label_tokens),
    }


def _scored(edge: Edge, link: Link, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Scored]]:
    """Run batches through both sides, several under way; the server keeps no graph and counts no step."""
    under_way: dict[int, Batch] = {}

    def take_one() -> Iterator[tuple[Batch, Scored]]:
        answer = link.receive()
        if isinstance(answer, Activations):
            batch = under_way.pop(answer.request_id)
            yield batch, edge.evaluate_top(batch, answer.hidden_BSD)

    for batch in batches:
        if not link.session.has_credit:
            yield from take_one()
        under_way[link.send_forward(edge.evaluate_bottom(batch), batch.layout, step=0, micro_batch=0)] = batch
    while under_way:
        yield from take_one()


def class_measures(edge: Edge, link: Link, exam: Exam, rows: int) -> dict[str, float]:
    """Return accuracy and macro-F1 of choosing, for each prompt, the label word that is likeliest behind it.

    A word's log-likelihood is the sum over its tokens, the end-of-sequence token among them where examples have one.
    """
    candidates = [_with_label(question, label) for question in exam.to_classify for label in exam.labels]
    by_length = sorted(range(len(candidates)), key=lambda at: len(candidates[at].input_ids))
    places: dict[Batch, list[int]] = {}
    for start in range(0, len(by_length), rows):
        at = by_length[start : start + rows]
        places[collate([candidates[place] for place in at])] = at
    losses = [0.0] * len(candidates)
    for batch, scored in _scored(edge, link, places):
        for place, loss in zip(places[batch], scored.losses_B, strict=True):
            losses[place] = loss
    own = [tuple(question.completion_ids.tolist()) for question in exam.to_classify]
    width = len(exam.labels)
    chosen = [
        exam.labels[min(range(width), key=losses[first : first + width].__getitem__)]
        for first in range(0, len(losses), width)
    ]
    return {"accuracy": accuracy(own, chosen), "macro_f1": macro_f1(own, chosen), "num_classified": float(len(own))}


def _with_label(question: Question, label: tuple[int, ...]) -> Example:
    input_ids = torch.cat([question.prompt_ids, torch.tensor(label, dtype=torch.int64)])
    labels = input_ids.clone()
    labels[: len(question.prompt_ids)] = IGNORED_LABEL
    return Example(input_ids=input_ids, labels=labels)


class Answerer:
    """Answers prompts greedily, with the backbone and its cache on the server."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, run: RunConfig, *, max_rows: int = 0) -> None:
        """Take the client's model, whose middle is the server's; its own generation settings are left aside."""
        self._max_rows = max_rows
        self._model = model
        self._tokenizer = tokenizer
        self._run = run
        self._context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._stops = _stops(model, tokenizer)
        # sampling and penalties that a checkpoint asks for are not what is measured
        model.generation_config = GenerationConfig(eos_token_id=self._stops, pad_token_id=(self._stops or [0])[0])

    def adopt(self, run: RunConfig) -> None:
        """Go on with settings of which some have changed."""
        self._run = run

    def measures(self, exam: Exam) -> dict[str, float]:
        """Return exact match and ROUGE-L over the questions that are to be answered."""
        texts = self.answers([question.prompt_ids for question in exam.to_answer])
        pairs = [(text, self._text(q.completion_ids)) for text, q in zip(texts, exam.to_answer, strict=True)]
        return {
            "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
            "rouge_l": sum(rouge_l(*pair) for pair in pairs) / len(pairs),
            "num_generated": float(len(pairs)),
        }

    def answers(self, prompts: Sequence[Tensor]) -> list[str]:
        """Return what the model says after each prompt, in their order."""
        by_length = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
        said: dict[int, str] = {}
        for group in self._groups(by_length, prompts):
            said |= zip(group, self._answer([prompts[at] for at in group]), strict=True)
        return [said[at] for at in range(len(prompts))]

    def _groups(self, by_length: Sequence[int], prompts: Sequence[Tensor]) -> Iterator[list[int]]:
        """Yield batches of prompts that the server's cache has room for."""
        rest = list(by_length)
        while rest:
            rows = rows_at_once(self._run, self._max_rows)
            longest = len(prompts[rest[:rows][-1]]) + self._run.evaluation.max_new_tokens
            rows = max(1, min(rows, self._run.link.max_cache_tokens // longest))
            group, rest = rest[:rows], rest[rows:]
            yield group

    def _answer(self, prompts: Sequence[Tensor]) -> list[str]:
        padding = self._model.generation_config.pad_token_id or 0
        input_ids_BS = pad_sequence(list(prompts), batch_first=True, padding_value=padding, padding_side="left")
        ones = [torch.ones_like(prompt) for prompt in prompts]
        mask_BS = pad_sequence(ones, batch_first=True, padding_value=0, padding_side="left")
        num_given, wanted = input_ids_BS.shape[1], self._run.evaluation.max_new_tokens
        # the last token needs no room: nothing is asked behind it
        room = min(wanted, max(1, self._context - num_given + 1)) if self._context else wanted
        device = self._model.device
        said_BS = self._model.generate(
            input_ids=input_ids_BS.to(device), attention_mask=mask_BS.to(device), max_new_tokens=room, do_sample=False
        )
        return [self._text(self._until_stop(row)) for row in said_BS[:, num_given:].cpu()]

    def _until_stop(self, ids: Tensor) -> Tensor:
        at = torch.isin(ids, torch.tensor(self._stops, dtype=ids.dtype)).nonzero()
        return ids[: int(at[0])] if len(at) else ids

    def _text(self, ids: Tensor) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _stops(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end an answer: the model's and the tokenizer's."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    stops = configured if isinstance(configured, list) else [configured]
    return sorted({stop for stop in [*stops, tokenizer.eos_token_id] if stop is not None})
