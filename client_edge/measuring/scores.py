"""Scores of answers and of chosen labels, from texts alone: no model."""

import unicodedata
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING

import regex

from splitfl.config.optional_measures import MeasureOfAnswers

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

# Scripts that are written without spaces between words: each letter counts as a word, with the marks that belong to it.
_UNSPACED = "".join(
    rf"\p{{scx={script}}}" for script in ("Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar")
)
_WORD = regex.compile(
    rf"(?V1)[[\p{{L}}\p{{N}}]&&[{_UNSPACED}]]\p{{M}}*"
    rf"|[[\p{{L}}\p{{N}}]--[{_UNSPACED}]][[\p{{L}}\p{{N}}\p{{M}}\p{{Join_Control}}]--[{_UNSPACED}]]*"
)


def exact_match(generated: str, reference: str) -> float:
    """Return 1.0 if both texts are equal but for the amount of white space between words and at the ends, else 0.0."""
    return float(generated.split() == reference.split())


def rouge_l(generated: str, reference: str) -> float:
    """Return ROUGE-L's F-measure: longest common subsequence of words, precision and recall in harmonic mean.

    Lin 2004, https://aclanthology.org/W04-1013, section 3.1 with beta = 1, by rouge-score. ASCII text scores what
    that package gives by itself without stemmer; words of all other scripts count too (`words`).
    """
    return float(_rouge_scorer().score(reference, generated)["rougeL"].fmeasure)


def words(text: str) -> list[str]:
    """Return the words of a text in any script: runs of letters and digits, without case and compatibility forms.

    Where a script has no spaces between words (Chinese, Japanese, Thai, ...), each letter is a word.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class _Words:
    """Our words, as rouge-score asks for them: its own tokenizer drops everything but a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@cache
def _rouge_scorer() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk, 30 MB that other runs do without

    return RougeScorer(["rougeL"], tokenizer=_Words())


SCORES: Mapping[MeasureOfAnswers, Callable[[str, str], float]] = MappingProxyType(
    {"exact_match": exact_match, "rouge_l": rouge_l}
)
"""What answers are scored by: of the generated text and its reference."""


def accuracy(labels: Sequence[Hashable], predicted: Sequence[Hashable]) -> float:
    """Return the share of at least one example whose predicted label is its own."""
    return sum(a == b for a, b in zip(labels, predicted, strict=True)) / len(labels)


def macro_f1(labels: Sequence[Hashable], predicted: Sequence[Hashable]) -> float:
    """Return the plain mean of the F1 of every label that occurs, as an example's own or as a prediction.

    As scikit-learn's `f1_score(average="macro", zero_division=0)`: a label that is never hit has an F1 of 0.
    """
    pairs = list(zip(labels, predicted, strict=True))
    scores = []
    for label in set(labels) | set(predicted):
        hits = sum(own == label == other for own, other in pairs)
        claims = sum((own == label) + (other == label) for own, other in pairs)
        scores.append(2 * hits / claims)
    return sum(scores) / len(scores)
