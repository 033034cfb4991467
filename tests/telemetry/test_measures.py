"""What several clients' numbers say together, and which numbers are none."""

import math
from typing import get_args

import pytest

from splitfl.config.identity import MeasureName
from splitfl.telemetry.measures import MEASURES, complete, federated, objection, perplexity

TWO = {
    "a": {"eval_loss": 1.0, "token_accuracy": 0.5, "rouge_l": 0.2, "num_eval_tokens": 300.0, "num_generated": 1.0},
    "b": {"eval_loss": 3.0, "token_accuracy": 0.1, "rouge_l": 0.8, "num_eval_tokens": 100.0, "num_generated": 3.0},
}


def test_each_measure_is_weighted_by_what_it_counts_over() -> None:
    found = federated({client: complete(measured) for client, measured in TWO.items()})
    assert found["eval_loss"] == {"value": 1.5, "mean": 2.0, "worst": 3.0, "worst_client": "b"}
    assert found["token_accuracy"]["value"] == pytest.approx((0.5 * 300 + 0.1 * 100) / 400)
    assert found["token_accuracy"]["worst_client"] == "b"  # the least, where more is better
    assert found["rouge_l"] == {
        "value": pytest.approx((0.2 + 3 * 0.8) / 4),
        "mean": 0.5,
        "worst": 0.2,
        "worst_client": "a",
    }


def test_perplexity_together_is_that_of_the_weighted_loss() -> None:
    found = federated({client: complete(measured) for client, measured in TWO.items()})["perplexity"]
    assert found["value"] == pytest.approx(math.exp(1.5))
    assert found["mean"] == pytest.approx((math.exp(1) + math.exp(3)) / 2)
    assert found["worst"] == pytest.approx(math.exp(3))


def test_one_client_is_itself_and_nobody_is_nothing() -> None:
    one = complete(TWO["a"])
    assert all(figures["value"] == pytest.approx(one[name]) for name, figures in federated({"a": one}).items())
    assert federated({}) == {}


def test_a_client_without_a_measure_does_not_count_for_it() -> None:
    found = federated({**TWO, "c": {"num_eval_examples": 9.0}})
    assert found["eval_loss"]["value"] == 1.5


def test_what_is_not_finite_is_left_out() -> None:
    assert complete({"eval_loss": math.nan, "token_accuracy": 0.5}) == {"token_accuracy": 0.5}
    assert complete({"eval_loss": 1e4}) == {"eval_loss": 1e4}  # whose perplexity no float holds
    assert perplexity(1e4) == math.inf


def test_a_perplexity_that_is_not_the_losss_counts_for_nothing() -> None:
    assert complete({"perplexity": 2.0}) == {}
    assert complete({"perplexity": 2.0, "eval_loss": 0.0})["perplexity"] == 1.0
    assert federated({"a": {"perplexity": 2.0}})["perplexity"]["value"] == 2.0


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_has_a_range(name: str) -> None:
    assert objection({name: 0.5, "num_eval_examples": 3.0}) == ""
    for wrong in (-0.1, math.nan, math.inf):
        assert name in objection({name: wrong})
    assert bool(objection({name: 1.5})) == (MEASURES[name].highest == 1.0)


@pytest.mark.parametrize(
    "measured",
    [
        {"text": 1.0},
        {"num_eval_tokens": 1.5},
        {"num_eval_tokens": -1.0},
        {"also:x": -1.0},
        {"also:" + "x" * 90: 1.0},
        {"num_generated": math.nan},
    ],
)
def test_other_numbers_are_refused(measured: dict[str, float]) -> None:
    assert objection(measured)


def test_every_name_that_a_config_may_use_is_a_measure() -> None:
    assert list(MEASURES) == list(get_args(MeasureName))
