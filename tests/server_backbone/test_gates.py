"""When a step is applied, per `server_mode`: time is an argument, so a straggler takes microseconds to test."""

import itertools

import pytest

from server_backbone.deciding.gates import (
    Action,
    Apply,
    Begin,
    CloseStep,
    FrozenGate,
    Gate,
    PatientGate,
    PerClientGate,
    SequentialGate,
    SharedGate,
    gate_for,
)

TIMEOUT = 10.0


def told(actions: list[Action]) -> list[tuple[object, ...]]:
    """Say what is to be done in a form that compares."""
    found: list[tuple[object, ...]] = []
    for action in actions:
        match action:
            case Begin(client_id=client_id):
                found.append(("begin", client_id))
            case Apply(client_ids=client_ids):
                found.append(("apply", *client_ids))
            case CloseStep(client_id=client_id, next_step=next_step):
                found.append(("close", client_id, next_step))
    return found


def shared(*trainers: str, first_step: int = 1) -> SharedGate:
    gate = SharedGate(TIMEOUT)
    gate.round_opened(trainers, first_step)
    return gate


def sequential(*trainers: str) -> SequentialGate:
    gate = SequentialGate(TIMEOUT)
    gate.round_opened(trainers, 1)
    return gate


class TestShared:
    def test_forwards_never_wait(self) -> None:
        gate = shared("a", "b")
        assert told(gate.forward("b", 1, 0.0)) == [("begin", "b")]
        assert told(gate.forward("a", 1, 0.0)) == [("begin", "a")]

    @pytest.mark.parametrize("order", [*itertools.permutations("abc")], ids="".join)
    def test_waits_for_all_and_orders_them_by_id(self, order: tuple[str, ...]) -> None:
        gate = shared(*"cab")
        assert gate.commit(order[0], 0.0) == []
        assert gate.commit(order[1], 1.0) == []
        assert gate.waiting_for() == [order[2]]
        assert told(gate.commit(order[2], 2.0)) == [("apply", "a", "b", "c")]
        assert gate.waiting_for() == []

    def test_step_after_step(self) -> None:
        gate = shared("a", "b")
        for step in (1, 2, 3):
            assert gate.commit("a", float(step)) == []
            assert told(gate.commit("b", float(step))) == [("apply", "a", "b")]

    def test_the_deadline_runs_from_the_first_commit(self) -> None:
        gate = shared("a", "b", "c", "d")
        assert gate.ticked(1000.0) == []
        gate.commit("c", 1000.0)
        gate.commit("a", 1009.0)
        assert gate.ticked(1009.9) == []
        actions = gate.ticked(1010.0)
        assert told(actions) == [("close", "b", 2), ("close", "d", 2), ("apply", "a", "c")]
        assert isinstance(actions[0], CloseStep)
        assert actions[0].reason == "the step went on after 10 s without this client"
        assert gate.ticked(5000.0) == []

    def test_late_ones_are_back_in_the_next_step(self) -> None:
        gate = shared("a", "b", first_step=5)
        gate.commit("a", 0.0)
        assert told(gate.ticked(TIMEOUT))[0] == ("close", "b", 6)
        assert gate.commit("a", 20.0) == []
        assert told(gate.commit("b", 21.0)) == [("apply", "a", "b")]

    def test_a_leaver_frees_those_who_wait(self) -> None:
        gate = shared("a", "b")
        gate.commit("b", 0.0)
        assert told(gate.finished("a", 1.0)) == [("apply", "b")]
        assert told(gate.commit("b", 2.0)) == [("apply", "b")]

    def test_a_leaver_takes_its_commit_along(self) -> None:
        gate = shared("a", "b", "c")
        gate.commit("a", 0.0)
        gate.commit("b", 0.0)
        assert gate.finished("a", 1.0) == []
        assert told(gate.commit("c", 2.0)) == [("apply", "b", "c")]

    def test_when_all_leave_nothing_is_applied(self) -> None:
        gate = shared("a", "b")
        gate.commit("a", 0.0)
        assert gate.finished("a", 1.0) == []
        assert gate.finished("b", 1.0) == []
        assert gate.ticked(100.0) == []

    def test_the_deadline_of_a_leaver_is_not_the_next_ones(self) -> None:
        gate = shared("a", "b")
        gate.commit("a", 0.0)
        gate.finished("a", 5.0)
        gate.round_opened(["b", "c"], 1)
        gate.commit("b", 9.0)
        assert gate.ticked(11.0) == []

    def test_one_that_is_done_with_its_steps_holds_nobody_up(self) -> None:
        gate = shared("a", "b")
        gate.commit("a", 0.0)
        gate.commit("b", 0.0)
        assert gate.finished("a", 0.0) == []
        assert gate.finished("b", 0.0) == []
        assert gate.waiting_for() == []

    def test_a_late_joiner_counts_from_the_next_round(self) -> None:
        gate = shared("a")
        assert told(gate.commit("a", 0.0)) == [("apply", "a")]
        gate.round_closed()
        gate.round_opened(["a", "late"], 2)
        assert gate.commit("a", 0.0) == []
        assert told(gate.commit("late", 0.0)) == [("apply", "a", "late")]

    def test_a_closed_round_leaves_nothing_behind(self) -> None:
        gate = shared("a", "b", "c")
        gate.commit("a", 0.0)
        gate.round_closed()
        # what was on its way must be applied on neither side: the merge has closed those clients' steps
        assert gate.commit("b", 1.0) == []
        assert gate.ticked(100.0) == []
        gate.round_opened(["b", "c"], 4)
        assert gate.commit("b", 101.0) == []
        assert told(gate.commit("c", 101.0)) == [("apply", "b", "c")]


class TestSequential:
    def test_one_at_a_time_and_held_forwards_come_out_in_order(self) -> None:
        gate = sequential("a", "b", "c")
        assert told(gate.forward("b", 1, 0.0)) == [("begin", "b")]
        assert gate.forward("a", 1, 0.0) == []
        assert gate.forward("c", 1, 0.0) == []
        assert gate.forward("a", 1, 0.0) == []
        assert told(gate.forward("b", 1, 0.0)) == [("begin", "b")]
        assert gate.waiting_for() == ["b"]
        assert told(gate.commit("b", 1.0)) == [
            ("apply", "b"),
            ("begin", "a"),
        ]
        assert gate.forward("b", 2, 1.0) == []
        assert told(gate.commit("a", 2.0)) == [("apply", "a"), ("begin", "c")]
        assert told(gate.commit("c", 3.0)) == [("apply", "c"), ("begin", "b")]
        assert gate.waiting_for() == []

    def test_the_owner_leaves(self) -> None:
        gate = sequential("a", "b")
        gate.forward("a", 1, 0.0)
        gate.forward("b", 1, 0.0)
        assert told(gate.finished("a", 1.0)) == [("begin", "b")]

    def test_one_that_waits_leaves(self) -> None:
        gate = sequential("a", "b", "c")
        gate.forward("a", 1, 0.0)
        gate.forward("b", 1, 0.0)
        gate.forward("c", 1, 0.0)
        assert gate.finished("b", 1.0) == []
        assert told(gate.commit("a", 1.0)) == [("apply", "a"), ("begin", "c")]

    def test_a_turn_ends_at_its_deadline(self) -> None:
        gate = sequential("a", "b")
        gate.forward("a", 3, 100.0)
        gate.forward("b", 1, 105.0)
        assert gate.ticked(109.9) == []
        actions = gate.ticked(110.0)
        assert told(actions) == [("close", "a", 4), ("begin", "b")]
        assert isinstance(actions[0], CloseStep)
        assert actions[0].reason == "its turn ended after 10 s without a commit"
        # the next turn has its own clock
        assert gate.ticked(119.9) == []
        assert told(gate.ticked(120.0)) == [("close", "b", 2)]

    def test_a_patient_gates_turn_ends_only_when_somebody_waits(self) -> None:
        gate = gate_for("sequential", TIMEOUT, in_turn=PatientGate)
        gate.round_opened((), 1)
        gate.forward("a", 3, 100.0)
        assert gate.ticked(500.0) == []
        gate.forward("b", 1, 500.0)
        assert told(gate.ticked(500.0)) == [("close", "a", 4), ("begin", "b")]

    def test_nobody_at_work_means_no_deadline(self) -> None:
        gate = sequential("a")
        gate.forward("a", 1, 0.0)
        gate.commit("a", 1.0)
        assert gate.ticked(1000.0) == []

    def test_a_turn_does_not_outlive_its_round(self) -> None:
        gate = sequential("a", "b")
        gate.forward("a", 1, 0.0)
        gate.forward("b", 1, 0.0)
        gate.round_closed()
        assert gate.commit("a", 1.0) == []
        assert gate.forward("b", 1, 1.0) == []
        gate.round_opened(["a", "b"], 5)
        assert told(gate.forward("b", 5, 2.0)) == [("begin", "b")]
        assert gate.ticked(11.0) == []
        assert told(gate.ticked(12.0)) == [("close", "b", 6)]


class TestPerClient:
    def test_nobody_waits_while_a_round_is_open(self) -> None:
        gate = PerClientGate()
        gate.round_opened(["a", "b"], 1)
        assert told(gate.forward("a", 1, 0.0)) == [("begin", "a")]
        assert told(gate.forward("b", 1, 0.0)) == [("begin", "b")]
        assert told(gate.commit("a", 0.0)) == [("apply", "a")]
        assert told(gate.forward("a", 2, 0.0)) == [("begin", "a")]
        assert gate.ticked(1e9) == []
        assert gate.waiting_for() == []

    def test_no_step_outlives_its_round(self) -> None:
        """It was computed with weights that the merge replaces."""
        gate = PerClientGate()
        gate.round_opened(["a", "b"], 1)
        gate.forward("a", 1, 0.0)
        gate.round_closed()
        assert gate.commit("a", 0.0) == []


class TestFrozen:
    def test_nobody_waits(self) -> None:
        gate = FrozenGate()
        gate.round_opened(["a", "b"], 1)
        assert told(gate.forward("a", 1, 0.0)) == [("begin", "a")]
        assert told(gate.commit("a", 0.0)) == [("apply", "a")]
        assert gate.finished("a", 0.0) == []
        assert gate.ticked(1e9) == []
        assert gate.waiting_for() == []

    def test_a_commit_that_comes_after_the_round_is_applied_nowhere(self) -> None:
        gate = FrozenGate()
        gate.round_opened(["a"], 1)
        gate.round_closed()
        assert gate.commit("a", 0.0) == []


@pytest.mark.parametrize(
    "gate", [shared("a", "b"), sequential("a", "b"), FrozenGate()], ids=lambda gate: type(gate).__name__
)
def test_whoever_comes_back_after_the_round_has_closed_applies_nothing(gate: Gate) -> None:
    gate.round_closed()
    gate.returned("a")
    assert gate.commit("a", 0.0) == []


@pytest.mark.parametrize(
    ("server_mode", "kind"),
    [
        ("shared", SharedGate),
        ("sequential", SequentialGate),
        ("per_client", PerClientGate),
        ("frozen", FrozenGate),
    ],
)
def test_each_mode_has_its_gate(server_mode: str, kind: type[Gate]) -> None:
    assert type(gate_for(server_mode, TIMEOUT)) is kind
