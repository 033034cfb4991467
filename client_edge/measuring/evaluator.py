"""What a client measures on held-out text, with the backbone on the server; what comes out of it is numbers.

Three kinds of work: batches with their labels (loss, token accuracy) and prompts that are answered (exact match,
ROUGE-L). The third is prompts with each label word after them (accuracy, macro-F1).
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from client_edge.layers.edge import Edge, Scored
from client_edge.link.link import Activations, Link
from client_edge.measuring.answerer import Answerer
from client_edge.measuring.scores import accuracy, macro_f1
from client_edge.text.batches import Batch, collate, eval_batches
from client_edge.text.dealing import pieces_of
from client_edge.text.exam import Exam, Question
from client_edge.text.examples import Dataset, Example
from splitfl.config.optional_measures import OF_ANSWERS, OF_LABELS
from splitfl.config.trees import RunConfig
from splitfl.models.loss import IGNORED_LABEL
from splitfl.telemetry.measures import complete


class Evaluator:
    """Measures what one client's layers and the server's are worth together on the client's held-out text."""

    def __init__(self, edge: Edge, link: Link, exam: Exam, answerer: Answerer | None, *, max_rows: int = 0) -> None:
        """`max_rows` are this client's own bound on a batch, 0 for none."""
        self._max_rows = max_rows
        self._edge = edge
        self._link = link
        self._exam = exam
        self._answerer = answerer

    def measure(self, held_out: Dataset) -> dict[str, float]:
        """Return all measures that are finite, and what they count over, by the names of `telemetry.measures`."""
        found = {"num_eval_examples": float(len(held_out)), **self._of_tokens(held_out)}
        if self._exam.to_classify:
            found |= class_measures(self._edge, self._link, self._exam, self._rows_at_once)
        if self._answerer is not None:
            found |= self._answerer.measures(self._exam, self._run, rows=self._rows_at_once)
        unwanted = (OF_ANSWERS | OF_LABELS) - set(self._run.evaluation.measures)
        return {name: value for name, value in complete(found).items() if name not in unwanted}

    def loss(self, text: Dataset) -> float:
        """Return the loss alone, not a number where the text has no label."""
        return self._of_tokens(text).get("eval_loss", math.nan)

    def _of_tokens(self, text: Dataset) -> dict[str, float]:
        return token_measures(self._edge, self._link, eval_batches(text, self._rows_at_once))

    @property
    def _run(self) -> RunConfig:
        """The settings of this moment: a server may come back with others."""
        return self._link.connection.run

    @property
    def _rows_at_once(self) -> int:
        """The rows of one batch: the run's, or fewer where this client sends no more at once."""
        rows = self._run.federation.per_device_eval_batch_size
        return min(rows, self._max_rows) if self._max_rows else rows


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
    """Return accuracy and macro-F1 of choosing, for each prompt, the label word that is likeliest after it.

    A word's log-likelihood is the sum over its tokens, the end-of-sequence token among them where examples have one.
    """
    candidates = [_with_label(question, label) for question in exam.to_classify for label in exam.labels]
    losses = _losses(edge, link, candidates, rows)
    own = [tuple(question.completion_ids.tolist()) for question in exam.to_classify]
    width = len(exam.labels)
    chosen = [
        exam.labels[min(range(width), key=losses[first : first + width].__getitem__)]
        for first in range(0, len(losses), width)
    ]
    return {"accuracy": accuracy(own, chosen), "macro_f1": macro_f1(own, chosen), "num_classified": float(len(own))}


def _losses(edge: Edge, link: Link, examples: Sequence[Example], rows: int) -> list[float]:
    """Return each example's loss, summed over its tokens; examples of about one length share a batch."""
    by_length = sorted(range(len(examples)), key=lambda at: len(examples[at].input_ids))
    places = {collate([examples[at] for at in group]): group for group in pieces_of(by_length, rows)}
    losses = [0.0] * len(examples)
    for batch, scored in _scored(edge, link, places):
        for place, loss in zip(places[batch], scored.losses_B, strict=True):
            losses[place] = loss
    return losses


def _with_label(question: Question, label: tuple[int, ...]) -> Example:
    input_ids = torch.cat([question.prompt_ids, torch.tensor(label, dtype=torch.int64)])
    labels = input_ids.clone()
    labels[: len(question.prompt_ids)] = IGNORED_LABEL
    return Example(input_ids=input_ids, labels=labels)
