"""ROUGE-L, accuracy and macro-F1 are what rouge-score and scikit-learn gave when they were recorded."""

import json
from pathlib import Path

import pytest

from client_edge.part.scores import accuracy, exact_match, macro_f1, rouge_l

RECORDED = json.loads((Path(__file__).parent / "recorded" / "rouge_score_and_scikit_learn.json").read_text())


@pytest.mark.parametrize(("reference", "generated", "wanted"), RECORDED["rouge_l"])
def test_rouge_l_is_rouge_scores(reference: str, generated: str, wanted: float) -> None:
    assert rouge_l(generated, reference) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("labels", "predicted", "wanted_accuracy", "wanted_f1"), RECORDED["classification"])
def test_accuracy_and_macro_f1_are_scikit_learns(
    labels: list[str], predicted: list[str], wanted_accuracy: float, wanted_f1: float
) -> None:
    assert accuracy(labels, predicted) == pytest.approx(wanted_accuracy, abs=1e-12)
    assert macro_f1(labels, predicted) == pytest.approx(wanted_f1, abs=1e-12)


def test_exact_match_looks_past_white_space_alone() -> None:
    assert exact_match(" a  word\n", "a word") == 1.0
    assert exact_match("A word", "a word") == 0.0
    assert exact_match("a word.", "a word") == 0.0
    assert exact_match("", " ") == 1.0
