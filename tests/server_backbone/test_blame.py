"""Who cannot go on from merged layers is compared with the others that hold the same."""

from collections.abc import Sequence
from itertools import permutations

import pytest

from server_backbone.deciding.blame import Blame, Fault, Stage

EVALUATION, TRAINING = Stage.EVALUATION, Stage.TRAINING
OPEN, OWN, MERGE = Fault.OPEN, Fault.ITS_OWN, Fault.THE_MERGES


def stuck(blame: Blame, client_id: str, stage: Stage, clients: Sequence[str]) -> Fault:
    blame.stuck(client_id, stage)
    return blame.fault(client_id, stage, clients)


@pytest.mark.parametrize(
    ("sound", "stuck_", "out_of", "fault"),
    [
        (0, 1, 1, MERGE),  # whom it would be compared with is not there
        (0, 1, 2, OPEN),
        (1, 1, 2, OWN),
        (0, 2, 2, MERGE),
        (0, 1, 3, OPEN),
        (1, 1, 3, OPEN),
        (2, 1, 3, OWN),
        (0, 2, 3, MERGE),
        (1, 2, 3, MERGE),
        (1, 2, 4, OPEN),
        (2, 2, 4, OWN),
        (1, 3, 4, MERGE),
        (4, 1, 8, OWN),
        (4, 4, 8, OWN),
        (3, 5, 8, MERGE),
    ],
)
def test_the_majority_is_believed(sound: int, stuck_: int, out_of: int, fault: Fault) -> None:
    clients = [str(number) for number in range(out_of)]
    blame = Blame()
    for client in clients[stuck_ : stuck_ + sound]:
        blame.went_on(client, TRAINING)
    assert [stuck(blame, client, TRAINING, clients) for client in clients[:stuck_]][-1] is fault


def test_a_poisoner_that_pretends_to_go_on_gets_nobody_else_punished() -> None:
    for order in permutations(("ash", "birch", "mallory")):
        blame, faults = Blame(), []
        for client in order:
            if client == "mallory":
                blame.went_on(client, TRAINING)
            else:
                faults.append(stuck(blame, client, TRAINING, order))
        assert faults == [OPEN, MERGE]


def test_one_that_makes_it_up_is_found_as_soon_as_half_have_gone_on_however_often_it_tries() -> None:
    clients = ["ash", "birch", "cedar", "mallory"]
    blame = Blame()
    assert [stuck(blame, "mallory", TRAINING, clients) for _ in range(9)] == [OPEN] * 9
    blame.went_on("ash", TRAINING)
    assert stuck(blame, "mallory", TRAINING, clients) is OPEN
    blame.went_on("cedar", TRAINING)
    assert stuck(blame, "mallory", TRAINING, clients) is OWN
    assert [client for client in clients if blame.is_stuck(client)] == ["mallory"]


def test_an_evaluation_says_nothing_of_training() -> None:
    """The upper layers may be spoilt where the lower ones are sound."""
    clients = ["ash", "birch", "cedar"]
    blame = Blame()
    for client in clients:
        blame.went_on(client, EVALUATION)
    assert stuck(blame, "ash", TRAINING, clients) is OPEN
    assert stuck(blame, "birch", TRAINING, clients) is MERGE


def test_those_that_have_gone_do_not_count() -> None:
    blame = Blame()
    blame.went_on("ash", TRAINING)
    blame.went_on("birch", TRAINING)
    assert stuck(blame, "cedar", TRAINING, ["cedar", "dill"]) is OPEN
    assert stuck(blame, "dill", TRAINING, ["cedar", "dill"]) is MERGE


def test_new_layers_begin_anew() -> None:
    blame = Blame()
    blame.stuck("ash", TRAINING)
    blame.went_on("birch", TRAINING)
    blame.merged()
    assert not blame.is_stuck("ash")
    assert stuck(blame, "birch", TRAINING, ["ash", "birch"]) is OPEN


def test_one_that_goes_on_after_all_is_not_stuck() -> None:
    blame = Blame()
    blame.stuck("ash", TRAINING)
    blame.went_on("ash", TRAINING)
    assert not blame.is_stuck("ash")
