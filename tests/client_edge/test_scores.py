"""ROUGE-L, accuracy and macro-F1 are what rouge-score and scikit-learn give; ROUGE-L knows every script."""

# ruff: noqa: RUF001  letters of other scripts are what is tested

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from client_edge.measuring.scores import SCORES, accuracy, exact_match, macro_f1, rouge_l, words
from splitfl.config.optional_measures import MeasureOfAnswers

RECORDED = json.loads((Path(__file__).parent / "recorded" / "rouge_score_and_scikit_learn.json").read_text())


@pytest.mark.parametrize(("reference", "generated", "wanted"), RECORDED["rouge_l"])
def test_rouge_l_is_rouge_scores(reference: str, generated: str, wanted: float) -> None:
    assert rouge_l(generated, reference) == pytest.approx(wanted, abs=1e-12)


ENGLISH = st.lists(st.sampled_from(["the", "The", "cat's", "sat", "on-a", "MAT", "3.5", "_x_", "!", "\n", "\t."])).map(
    " ".join
)


@given(ENGLISH | st.text(st.characters(max_codepoint=127)), ENGLISH)
def test_rouge_l_of_english_is_the_reference_value(reference: str, generated: str) -> None:
    by_the_package = RougeScorer(["rougeL"]).score(reference, generated)["rougeL"].fmeasure
    assert rouge_l(generated, reference) == by_the_package


@pytest.mark.parametrize(
    ("reference", "generated", "wanted"),
    [
        ("患者は頭が痛い", "患者は腹が痛い", 6 / 7),  # Japanese: both scripts, a letter a word
        ("病人发烧，咳嗽。", "病人咳嗽", 2 * 4 / (6 + 4)),
        ("病人发烧", "天气很好", 0.0),
        ("体温39.5度", "体温 39.5 度", 1.0),  # numbers are words of their own
        ("يعاني المريض من حمى شديدة", "يعاني المريض من سعال", 2 * 3 / (5 + 4)),
        ("المريض", "الطبيب", 0.0),
        ("Größe unter der Norm", "große unter norm", 2 * 2 / (4 + 3)),
        ("GRÖSSE", "Größe", 1.0),
        ("caf\u00e9 au lait", "cafe\u0301 au lait", 1.0),  # composed or not
        ("café", "cafe", 0.0),
        ("пациент жалуется на боль", "Пациент: боль", 2 * 2 / (4 + 2)),
        ("환자는 열이 있다", "환자는 열이 없다", 2 / 3),
        ("रोगी को बुखार है", "रोगी को खाँसी है", 3 / 4),  # with marks for vowels, which are no letters
        ("มีไข้", "มีไอ", 2 / 3),
        ("ＡＢＣ １２", "abc 12", 1.0),  # full width
    ],
)
def test_rouge_l_counts_the_words_of_every_script(reference: str, generated: str, wanted: float) -> None:
    assert rouge_l(generated, reference) == pytest.approx(wanted, abs=1e-12)


def test_words_are_those_of_the_script() -> None:
    assert words("Don't-stop_me, 2024!") == ["don", "t", "stop", "me", "2024"]
    assert words("病人发烧 39.5°C") == ["病", "人", "发", "烧", "39", "5", "c"]
    assert words("コーヒーが好き") == list("コーヒーが好き")
    assert words("می\u200cخواهم بروم") == ["می\u200cخواهم", "بروم"]  # joined without a space
    assert words("มีไข้") == ["มี", "ไ", "ข้"]
    assert words("🙂 — …\u0301\u200d") == []


def test_rouge_is_loaded_when_it_is_asked_for_and_not_before() -> None:
    program = "import sys, client_edge.measuring.scores; sys.exit('nltk' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


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


def test_every_measure_of_answers_has_a_score() -> None:
    assert list(SCORES) == list(get_args(MeasureOfAnswers))
