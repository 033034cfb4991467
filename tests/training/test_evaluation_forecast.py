"""What `splitfl check` says an evaluation will take."""

from typing import Any

import pytest

from splitfl.config.trees import RunConfig
from splitfl.training.forecast import EvaluationWork, evaluations_of


def run_with(**sections: Any) -> RunConfig:
    tree = {"federation": {"num_rounds": 4, "per_device_eval_batch_size": 8, **sections.pop("federation", {})}}
    return RunConfig.from_tree({**tree, **sections}, source="test")


@pytest.mark.parametrize(
    ("federation", "times"),
    [
        ({}, 2),
        ({"evaluate": "rounds"}, 5),
        ({"evaluate": "rounds", "early_stopping_patience": 1}, 6),
        ({"evaluate": "rounds", "num_rounds": 1}, 2),
        ({"num_rounds": 0, "server_mode": "frozen"}, 0),
    ],
)
def test_how_often(federation: dict[str, Any], times: int) -> None:
    assert evaluations_of(run_with(federation=federation)).numbers["evaluations"] == times


def test_what_one_takes() -> None:
    run = run_with(evaluation={"measures": ["rouge_l", "accuracy"], "max_new_tokens": 10})
    found = evaluations_of(run, EvaluationWork(examples=20, classified=20, labels=3, answered=17))
    assert found.numbers["forward_passes"] == 3 + 8
    assert found.numbers["generated_tokens"] == 170
    assert found.sentences == (
        "Each client with held-out text is evaluated before and after the run, 2 times: loss, perplexity, token"
        " accuracy, ROUGE-L, accuracy.",
        "Each takes 11 forward passes of up to 8 rows, among them 20 prompts with each of 3 label words, and"
        " at most 170 generated tokens: 17 prompts in about 3 batches, up to 30 round trips.",
    )


def test_without_held_out_text_it_says_so() -> None:
    found = evaluations_of(run_with(), EvaluationWork(examples=0))
    assert found.sentences == ("Nothing is evaluated: no text is held out.",)


def test_what_follows_from_comparing_is_said() -> None:
    federation = {"evaluate": "rounds", "early_stopping_patience": 2, "load_best_model_at_end": True}
    assert evaluations_of(run_with(federation=federation)).sentences[-1] == (
        "Rounds are compared by the loss over all clients' text; the run ends after 2 in a row without improvement;"
        " clients, backbone and exported model end with the best round's."
    )
