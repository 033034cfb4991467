"""For whom a step still waits: misses in a row, what they cost, and the way back."""

from hypothesis import given
from hypothesis import strategies as st

from server_backbone.deciding.patience import Patience


def test_misses_in_a_row_are_counted_and_a_step_in_time_ends_the_row() -> None:
    patience = Patience(3, 10.0)
    patience.begin(0.0)
    assert [patience.missed("a", now) for now in (10, 20)] == [False, False]
    assert not patience.made("a", 25.0)
    assert [patience.missed("a", now) for now in (1030, 1040, 1050)] == [False, False, True]
    assert patience.is_out("a")
    assert patience.made("a", 1051.0)
    assert not patience.is_out("a")


def test_it_is_waited_for_again_at_once_and_then_when_it_has_cost_less_than_a_fifth() -> None:
    patience = Patience(3, 10.0)
    patience.begin(0.0)
    for now in (10, 20, 30):
        patience.missed("a", now)
    assert patience.may_return("a", 31.0)
    assert patience.missed("a", 41.0)  # once more is enough
    assert not patience.may_return("a", 42.0)
    assert patience.may_return("a", 51.0)


@given(st.lists(st.sampled_from(["miss", "make", "come back", "wait"]), max_size=300))
def test_nobody_costs_the_others_more_than_the_first_misses_and_a_fifth(acts: list[str]) -> None:
    """Whatever it does: `miss` takes a step's time-out, everything else a hundredth of it."""
    patience, now_s, lost_s = Patience(3, 10.0), 0.0, 0.0
    patience.begin(0.0)
    for act in acts:
        is_waited_for = not patience.is_out("liar")
        now_s += 10.0 if act == "miss" and is_waited_for else 0.1
        if act == "miss" and is_waited_for:
            lost_s += 10.0
            patience.missed("liar", now_s)
        elif act == "make":
            patience.made("liar", now_s)
        elif act == "come back" and not is_waited_for:
            patience.may_return("liar", now_s)
        assert lost_s <= 3 * 10.0 + 0.2 * now_s + 10.0


def test_ending_every_other_step_holds_nobody_up_for_ever() -> None:
    patience = Patience(3, 10.0)
    patience.begin(0.0)
    for now in (10, 20, 30):
        patience.missed("a", now)
    assert patience.may_return("a", 30.1)
    assert patience.missed("a", 40.1)
    assert not patience.made("a", 40.2)
    assert patience.is_out("a")
    assert patience.made("a", 60.0)
