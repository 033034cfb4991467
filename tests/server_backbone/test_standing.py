"""How rounds are compared: as transformers' EarlyStoppingCallback and Trainer do."""

import math
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from server_backbone.deciding.standing import Standing, value_of
from splitfl.config.sections import FederationSection


def federation(**settings: Any) -> FederationSection:
    return FederationSection(**{"evaluate": "rounds", "early_stopping_patience": 2, **settings})


def standings(values: list[float | None], **settings: Any) -> list[Standing]:
    found = [Standing()]
    for number, value in enumerate(values, start=1):
        found.append(found[-1].after(number, value, federation(**settings)))
    return found[1:]


def test_the_first_round_is_the_best_so_far() -> None:
    (first,) = standings([7.0])
    assert first == Standing(judged_round=1, value=7.0, best_round=1, best_value=7.0)


def test_patience_counts_rounds_in_a_row() -> None:
    found = standings([3.0, 2.0, 2.5, 2.2, 1.0, 1.5, 1.0])
    assert [each.rounds_without_improvement for each in found] == [0, 0, 1, 2, 0, 1, 2]
    assert [each.best_round for each in found] == [1, 2, 2, 2, 5, 5, 5]  # an equal one is not better
    assert [bool(each.reason_to_stop(federation())) for each in found] == [
        False,
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    assert found[3].reason_to_stop(federation()) == (
        "eval_loss has not improved for 2 rounds (early_stopping_patience = 2); the best was 2.0000 after round 2"
    )


def test_a_hair_better_is_the_best_and_no_improvement() -> None:
    found = standings([3.0, 2.95, 2.91], early_stopping_threshold=0.1)
    assert [each.best_round for each in found] == [1, 2, 3]
    assert [each.rounds_without_improvement for each in found] == [0, 1, 2]


def test_more_accuracy_is_better() -> None:
    found = standings([0.1, 0.3, 0.2], metric_for_best_model="token_accuracy")
    assert [each.best_round for each in found] == [1, 2, 2]


def test_a_round_that_nobody_measured_changes_nothing() -> None:
    found = standings([3.0, None, 2.0])
    assert found[1] == Standing(judged_round=2, best_round=1, best_value=3.0)
    assert found[2].best_round == 3


def test_without_patience_nothing_stops() -> None:
    settings = {"early_stopping_patience": 0, "load_best_model_at_end": True}
    assert all(not each.reason_to_stop(federation(**settings)) for each in standings([1.0, 2.0, 3.0, 4.0], **settings))


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize(
    "values", [[3.0, 2.0, 2.5, 2.2, 1.0], [1.0, 1.1, 1.2, 0.5], [2.0, 1.9, 1.8, 1.7, 1.0], [5.0, 5.0, 5.0]]
)
def test_stops_where_transformers_does(tmp_path: Any, values: list[float], threshold: float) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path),
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        eval_strategy="epoch",
        use_cpu=True,
    )
    callback, state, theirs = EarlyStoppingCallback(2, threshold), TrainerState(), []
    for value in values:
        control = TrainerControl()
        callback.on_evaluate(args, state, control, metrics={"eval_loss": value})
        if state.best_metric is None or value < state.best_metric:  # as Trainer does after the callback
            state.best_metric = value
        theirs.append(control.should_training_stop)
    settings = {"early_stopping_threshold": threshold}
    ours = [bool(each.reason_to_stop(federation(**settings))) for each in standings(list(values), **settings)]
    assert ours == theirs


def test_the_value_is_over_all_clients_weighted() -> None:
    measured = {"a": {"eval_loss": 1.0, "num_eval_tokens": 300.0}, "b": {"eval_loss": 3.0, "num_eval_tokens": 100.0}}
    assert value_of(measured, federation()) == 1.5
    assert value_of(measured, federation(metric_for_best_model="perplexity")) == pytest.approx(math.exp(1.5))
    assert value_of(measured, federation(metric_for_best_model="token_accuracy")) is None
    assert value_of({}, federation()) is None
