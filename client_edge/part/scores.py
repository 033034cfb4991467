"""Scores of answers and of chosen labels, from texts alone: pure Python, no model."""

import re
from collections.abc import Hashable, Sequence
from itertools import pairwise

_WORD = re.compile(r"[a-z0-9]+")


def exact_match(generated: str, reference: str) -> float:
    """Return 1.0 if both texts are equal but for the amount of white space between words and at the ends, else 0.0."""
    return float(generated.split() == reference.split())


def rouge_l(generated: str, reference: str) -> float:
    """Return ROUGE-L's F-measure: longest common subsequence of words, precision and recall in harmonic mean.

    Lin 2004, https://aclanthology.org/W04-1013, section 3.1 with beta = 1. As the package rouge-score without stemmer
    has it: lower case, and words are runs of a to z and digits, so a text in another script has none and scores 0.
    """
    given, wanted = _WORD.findall(generated.lower()), _WORD.findall(reference.lower())
    common = _longest_common_subsequence(given, wanted)
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    lengths = [0] * (len(second) + 1)
    for word in first:
        pairs = zip(second, pairwise(lengths), strict=True)
        row = [0]
        for other, (diagonal, above) in pairs:
            row.append(diagonal + 1 if word == other else max(above, row[-1]))
        lengths = row
    return lengths[-1]


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
