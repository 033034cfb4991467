"""For whom a step still waits: misses in a row, what they cost, and the way back."""

from hypothesis import given
from hypothesis import strategies as st

from server_backbone.deciding.gates import Apply, Begin, CloseStep, SequentialGate, SharedGate, SitOut, TakeBack
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


def shared() -> SharedGate:
    gate = SharedGate(10.0, 2)
    gate.round_opened(["a", "b"], 1)
    return gate


def missed(gate: SharedGate, step: int, now_s: float) -> list[object]:
    gate.commit("a", now_s)
    return list(gate.ticked(now_s + 10.0))


def test_shared_goes_on_without_whom_it_has_waited_for_in_vain() -> None:
    gate = shared()
    first = missed(gate, 1, 0.0)
    assert [type(action) for action in first] == [CloseStep, Apply]
    second = missed(gate, 2, 10.0)
    assert [type(action) for action in second] == [CloseStep, SitOut, Apply]
    assert [type(action) for action in gate.commit("a", 20.0)] == [Apply]  # nobody waits
    assert gate.returned("b") == 4  # a new connection alone shows nothing
    assert [type(action) for action in gate.commit("a", 21.0)] == [Apply]


def test_shared_waits_again_for_who_begins_a_step_and_tells_it_where_the_others_are() -> None:
    gate = shared()
    missed(gate, 1, 0.0)
    missed(gate, 2, 10.0)
    gate.commit("a", 20.0)
    back, where = gate.forward("b", 3, 21.0)
    assert back == TakeBack(client_id="b")
    assert isinstance(where, CloseStep)
    assert where.next_step == 4
    (compute,) = gate.forward("b", 4, 22.0)
    assert isinstance(compute, Begin)
    assert gate.commit("a", 23.0) == []
    (apply,) = gate.commit("b", 24.0)
    assert isinstance(apply, Apply)
    assert list(apply.client_ids) == ["a", "b"]


def test_shared_takes_a_guests_step_that_is_in_time_and_no_other() -> None:
    """Whoever has cost too much may still make steps: nobody waits for them, until it has cost less than a fifth."""
    gate = shared()
    missed(gate, 1, 0.0)
    missed(gate, 2, 10.0)
    gate.forward("b", 3, 20.5)  # waited for again
    assert [type(action) for action in missed(gate, 3, 21.0)] == [CloseStep, SitOut, Apply]
    (compute,) = gate.forward("b", 4, 31.5)  # not again so soon
    assert isinstance(compute, Begin)
    closed, apply = gate.commit("a", 32.0)
    assert isinstance(closed, CloseStep)
    assert (closed.client_id, closed.next_step) == ("b", 5)
    gate.forward("b", 5, 32.5)
    assert gate.commit("b", 32.6) == []
    (apply,) = gate.commit("a", 32.7)
    assert isinstance(apply, Apply)
    assert len(apply.client_ids) == 2
    assert gate.sits_out("b")
    gate.commit("a", 52.0)
    back, _ = gate.forward("b", 7, 52.1)
    assert back == TakeBack(client_id="b")


def test_a_turn_that_is_never_used_comes_last() -> None:
    gate = SequentialGate(10.0, 2)
    gate.round_opened(["a", "b"], 1)
    for number, now_s in enumerate((0.0, 11.0)):
        gate.forward("b", number + 1, now_s)
        gate.forward("a", number + 1, now_s + 0.5)
        ended = gate.ticked(now_s + 10.0)
        gate.commit("a", now_s + 10.5)
    assert [type(action) for action in ended] == [CloseStep, SitOut, Begin]
    assert [type(action) for action in gate.forward("b", 3, 22.0)] == [TakeBack, Begin]
    gate.forward("a", 3, 22.5)
    assert [type(action) for action in gate.ticked(32.0)] == [CloseStep, SitOut, Begin]
    gate.commit("a", 32.1)
    assert [type(action) for action in gate.forward("b", 4, 32.2)] == [Begin]  # nobody wants the turn
    closed, compute = gate.forward("a", 4, 32.3)  # now somebody does
    assert isinstance(closed, CloseStep)
    assert isinstance(compute, Begin)
    assert (closed.client_id, compute.client_id) == ("b", "a")


def test_whoever_sits_out_is_passed_over_by_one_that_came_later() -> None:
    gate = SequentialGate(10.0, 1)
    gate.round_opened(["a", "b", "c"], 1)
    gate.forward("a", 1, 0.0)
    gate.forward("b", 1, 0.5)
    gate.ticked(10.0)
    assert [type(action) for action in gate.forward("a", 1, 10.5)] == [TakeBack]
    assert gate.commit("b", 11.0)[-1] == Begin(client_id="a")
    gate.forward("b", 2, 11.5)
    assert [type(action) for action in gate.ticked(21.0)] == [CloseStep, SitOut, Begin]
    assert gate.forward("a", 1, 21.5) == []  # not taken back so soon
    assert gate.forward("c", 1, 22.0) == []
    assert gate.commit("b", 23.0)[-1] == Begin(client_id="c")
    assert gate.commit("c", 24.0)[-1] == Begin(client_id="a")
