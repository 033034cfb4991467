"""When rounds open, close and end: time is an argument, and every wait has a deadline and says what it waits for."""

from collections.abc import Sequence
from typing import Any

import pytest

from server_backbone.deciding.rounds import Decision, End, Judge, LastCall, Merge, Open, Rounds, Stop
from splitfl.config.sections import FederationSection, StrategySection
from splitfl.federation.strategies.fed_avg import FedAvg


def everyone(_round_number: int, clients: Sequence[str]) -> Sequence[str]:
    return clients


def rounds_of(*clients: str, **settings: Any) -> Rounds:
    usual = {"num_rounds": 2, "local_steps": 3, "wait_timeout": 60.0, "round_timeout": 100.0}
    rounds = Rounds(FederationSection(**{**usual, **settings}), everyone, 0.0)
    for client in clients:
        rounds.joined(client)
    return rounds


def ready(rounds: Rounds, *clients: str) -> list[Decision]:
    return [decision for client in clients for decision in rounds.ready(client)]


def uploaded(rounds: Rounds, *clients: str) -> list[Decision]:
    return [decision for client in clients for decision in rounds.uploaded(client)]


def opened(rounds: Rounds, *clients: str, now_s: float = 0.0) -> Open:
    (decision,) = ready(rounds, *clients)
    assert isinstance(decision, Open)
    rounds.opened(now_s)
    return decision


class TestOpening:
    def test_opens_when_all_who_are_here_are_ready(self) -> None:
        rounds = rounds_of("b", "a")
        assert rounds.ready("b") == []
        assert rounds.ready("a") == [
            Open(round_number=1, clients=("a", "b"), trainers=("a", "b"), first_step=1),
        ]

    def test_waits_for_as_many_as_must_be_available(self) -> None:
        rounds = rounds_of("a", min_available_clients=2)
        assert rounds.ready("a") == []
        assert rounds.waiting_for() == "2 clients to begin round 1 (1 ready)"
        rounds.joined("b")
        assert rounds.waiting_for() == "2 clients to begin round 1 (1 ready, b still at work)"
        assert [type(decision) for decision in rounds.ready("b")] == [Open]

    def test_one_that_is_not_ready_and_leaves_holds_nobody_up(self) -> None:
        rounds = rounds_of("a", "b")
        rounds.ready("a")
        (decision,) = rounds.left("b")
        assert isinstance(decision, Open)
        assert decision.clients == ("a",)

    def test_at_the_deadline_those_who_are_ready_begin(self) -> None:
        rounds = rounds_of("a", "b", "slow", min_available_clients=2)
        ready(rounds, "a", "b")
        assert rounds.ticked(59.9) == []
        (decision,) = rounds.ticked(60.0)
        assert isinstance(decision, Open)
        assert decision.clients == ("a", "b")

    def test_too_few_at_the_deadline_end_the_run(self) -> None:
        rounds = rounds_of("a", "b", min_available_clients=3)
        ready(rounds, "b", "a")
        assert rounds.ticked(60.0) == [
            End(reason="waited 60 s (federation.wait_timeout) for 3 clients; ready: a, b"),
        ]
        assert rounds.ticked(1e9) == []

    def test_nobody_at_the_deadline(self) -> None:
        assert rounds_of().ticked(60.0) == [
            End(reason="waited 60 s (federation.wait_timeout) for 1 client; ready: none"),
        ]

    def test_a_share_trains_and_the_others_sit_out(self) -> None:
        federation = FederationSection(fraction_train=0.5, wait_timeout=60.0)
        rounds = Rounds(federation, FedAvg(federation, StrategySection(), seed=3).configure_train, 0.0)
        for client in "abcd":
            rounds.joined(client)
        round_ = opened(rounds, *"abcd")
        assert round_.clients == tuple("abcd")
        assert len(round_.trainers) == 2
        (decision,) = uploaded(rounds, *round_.trainers)
        assert isinstance(decision, Merge)
        assert decision.absent == ()


class TestClosing:
    def test_closes_when_all_have_uploaded(self) -> None:
        rounds = rounds_of("a", "b")
        opened(rounds, "a", "b")
        assert rounds.waiting_for() == ""
        assert rounds.uploaded("b") == []
        assert rounds.waiting_for() == "layers of a"
        assert rounds.uploaded("a") == [Merge(round_number=1, uploaded=("a", "b"), absent=(), reason="")]

    def test_the_clock_starts_when_the_round_is_announced(self) -> None:
        rounds = rounds_of("a")
        ready(rounds, "a")
        assert rounds.ticked(1e6) == []
        rounds.opened(1e6)
        assert rounds.ticked(1e6 + 99.9) == []
        assert rounds.ticked(1e6 + 100) != []

    def test_at_the_deadline_the_absent_are_named(self) -> None:
        rounds = rounds_of("a", "b", "c")
        opened(rounds, "a", "b", "c")
        rounds.uploaded("b")
        assert rounds.ticked(100.0) == [Merge(round_number=1, uploaded=("b",), absent=("a", "c"), reason="")]
        assert rounds.ticked(1e9) == []

    def test_too_few_keep_the_old_layers(self) -> None:
        rounds = rounds_of("a", "b", "c", min_train_clients=2, min_available_clients=2)
        opened(rounds, "a", "b", "c")
        rounds.uploaded("c")
        assert rounds.ticked(100.0) == [
            Merge(
                round_number=1,
                uploaded=("c",),
                absent=("a", "b"),
                reason="1 client finished, min_train_clients = 2",
            )
        ]

    def test_a_leaver_is_absent_and_holds_nobody_up(self) -> None:
        rounds = rounds_of("a", "b")
        opened(rounds, "a", "b")
        rounds.uploaded("a")
        assert rounds.left("b") == [Merge(round_number=1, uploaded=("a",), absent=("b",), reason="")]

    def test_layers_of_one_that_left_afterwards_count(self) -> None:
        rounds = rounds_of("a", "b")
        opened(rounds, "a", "b")
        rounds.uploaded("a")
        assert rounds.left("a") == []
        assert rounds.uploaded("b") == [Merge(round_number=1, uploaded=("a", "b"), absent=(), reason="")]

    def test_all_leave(self) -> None:
        rounds = rounds_of("a", "b", num_rounds=1)
        opened(rounds, "a", "b")
        assert rounds.left("a") == []
        (decision,) = rounds.left("b")
        assert isinstance(decision, Merge)
        assert (decision.uploaded, decision.absent) == ((), ("a", "b"))
        assert decision.reason == "0 clients finished, min_train_clients = 1"
        assert rounds.merged(1.0, decision.reason) == [
            End(reason=f"everybody has left, and the last round was not merged: {decision.reason}")
        ]

    def test_all_leave_while_the_last_layers_are_merged(self) -> None:
        rounds = rounds_of("a", num_rounds=1)
        opened(rounds, "a")
        uploaded(rounds, "a")
        rounds.left("a")
        assert rounds.merged(1.0) == [End(reason="")]

    def test_layers_that_come_too_late_close_nothing_again(self) -> None:
        rounds = rounds_of("a", "b")
        opened(rounds, "a", "b")
        rounds.uploaded("a")
        rounds.ticked(100.0)
        assert rounds.uploaded("b") == []
        rounds.merged(101.0)
        assert rounds.uploaded("b") == []

    def test_leaving_while_layers_are_merged_closes_nothing_again(self) -> None:
        rounds = rounds_of("a", "b")
        opened(rounds, "a", "b")
        uploaded(rounds, "a", "b")
        assert rounds.left("b") == []


class TestPartialWork:
    @pytest.fixture
    def rounds(self) -> Rounds:
        rounds = rounds_of("a", "b", "c", partial_work="accept", step_timeout=10.0)
        opened(rounds, "a", "b", "c")
        rounds.uploaded("b")
        assert rounds.ticked(99.9) == []
        assert rounds.ticked(100.0) == [LastCall(round_number=1, clients=("a", "c"))]
        assert rounds.waiting_for() == "layers of a, c"
        return rounds

    def test_all_answer_the_call(self, rounds: Rounds) -> None:
        assert rounds.uploaded("c") == []
        assert rounds.uploaded("a") == [Merge(round_number=1, uploaded=("a", "b", "c"), absent=(), reason="")]

    def test_the_round_closes_one_steps_time_after_the_call(self, rounds: Rounds) -> None:
        rounds.uploaded("c")
        assert rounds.ticked(109.9) == []
        assert rounds.ticked(110.0) == [Merge(round_number=1, uploaded=("b", "c"), absent=("a",), reason="")]
        assert rounds.uploaded("a") == []

    def test_one_that_has_finished_no_step_is_not_waited_for(self, rounds: Rounds) -> None:
        assert rounds.gave_up("a") == []
        assert rounds.uploaded("c") == [Merge(round_number=1, uploaded=("b", "c"), absent=("a",), reason="")]

    def test_one_that_leaves_or_comes_back_after_the_call_is_not_waited_for(self, rounds: Rounds) -> None:
        assert rounds.left("a") == []
        rounds.joined("a", takes_part=True)
        assert rounds.uploaded("c") == [Merge(round_number=1, uploaded=("b", "c"), absent=("a",), reason="")]


class TestFromRoundToRound:
    def test_steps_are_counted_over_the_run(self) -> None:
        rounds = rounds_of("a", num_rounds=3)
        for number in (1, 2, 3):
            round_ = opened(rounds, "a")
            assert (round_.round_number, round_.first_step) == (number, 3 * number - 2)
            assert rounds.is_last == (number == 3)
            rounds.uploaded("a")
            assert rounds.merged(0.0) == []
            assert rounds.num_merged == number
        assert rounds.is_parting

    def test_a_late_joiner_waits_for_the_next_round(self) -> None:
        rounds = rounds_of("a")
        opened(rounds, "a")
        rounds.joined("late")
        assert rounds.ready("late") == []
        assert rounds.uploaded("a") == [Merge(round_number=1, uploaded=("a",), absent=(), reason="")]
        assert rounds.merged(0.0) == []
        (decision,) = rounds.ready("a")
        assert isinstance(decision, Open)
        assert decision.trainers == ("a", "late")

    def test_a_late_joiner_does_not_wait_for_those_who_left(self) -> None:
        rounds = rounds_of("a")
        opened(rounds, "a")
        rounds.joined("late")
        rounds.ready("late")
        rounds.uploaded("a")
        assert rounds.left("a") == []
        (decision,) = rounds.merged(0.0)
        assert isinstance(decision, Open)
        assert decision.trainers == ("late",)

    def test_the_deadline_for_the_next_round_runs_from_the_merge(self) -> None:
        rounds = rounds_of("a")
        opened(rounds, "a")
        rounds.uploaded("a")
        rounds.merged(1000.0)
        assert rounds.ticked(1059.9) == []
        assert [type(decision) for decision in rounds.ticked(1060.0)] == [End]


class TestParting:
    @pytest.fixture
    def rounds(self) -> Rounds:
        rounds = rounds_of("a", "b", num_rounds=1)
        opened(rounds, "a", "b")
        uploaded(rounds, "a", "b")
        rounds.merged(0.0)
        return rounds

    def test_ends_when_the_last_has_said_goodbye(self, rounds: Rounds) -> None:
        assert rounds.waiting_for() == "last evaluations of a, b"
        assert rounds.left("a") == []
        assert rounds.waiting_for() == "last evaluations of b"
        assert rounds.left("b") == [End(reason="")]

    def test_ends_at_the_deadline_without_complaint(self, rounds: Rounds) -> None:
        assert rounds.ticked(99.9) == []
        assert rounds.ticked(100.0) == [End(reason="")]


class TestComparing:
    def rounds(self, *clients: str, **settings: Any) -> Rounds:
        return rounds_of(*clients, **{"evaluate": "rounds", "early_stopping_patience": 1, **settings})

    def merged(self, *clients: str, **settings: Any) -> Rounds:
        """Return rounds of which one is merged."""
        rounds = self.rounds(*clients, **settings)
        opened(rounds, *clients)
        uploaded(rounds, *clients)
        assert rounds.merged(0.0) == []
        return rounds

    def test_nothing_is_judged_before_the_first_merge(self) -> None:
        assert isinstance(opened(self.rounds("a"), "a"), Open)

    def test_a_round_is_judged_when_all_have_evaluated_and_the_next_opens_after(self) -> None:
        rounds = self.merged("a", "b")
        assert rounds.ready("a") == []
        assert rounds.ready("b") == [Judge(round_number=1)]
        assert rounds.ready("late") == []
        assert rounds.ticked(1e6) == []
        (decision,) = rounds.judged("", 0.0)
        assert isinstance(decision, Open)
        assert (decision.round_number, decision.clients) == (2, ("a", "b", "late"))

    def test_a_reason_stops_the_run_and_clients_part(self) -> None:
        rounds = self.merged("a", "b")
        ready(rounds, "a", "b")
        assert rounds.judged("no better", 5.0) == [Stop(reason="no better")]
        assert rounds.is_parting
        assert rounds.stopped(5.0) == []
        assert rounds.left("a") == []
        assert rounds.left("b") == [End(reason="")]

    def test_the_last_round_is_judged_too(self) -> None:
        rounds = self.merged("a", num_rounds=1)
        assert not rounds.is_parting
        assert rounds.waiting_for() == "the evaluation of round 1 (0 ready, a still at work)"
        assert rounds.ready("a") == [Judge(round_number=1)]
        assert rounds.judged("", 5.0) == [Stop(reason="")]

    def test_the_last_verdict_waits_for_nobody_who_is_gone(self) -> None:
        rounds = self.merged("a", "b", num_rounds=1, min_available_clients=2)
        assert rounds.left("a") == []
        assert rounds.left("b") == [Judge(round_number=1)]
        assert rounds.judged("", 5.0) == [Stop(reason="")]
        assert rounds.stopped(5.0) == [End(reason="")]

    def test_all_who_leave_while_it_is_judged_are_waited_for(self) -> None:
        rounds = self.merged("a")
        ready(rounds, "a")
        assert rounds.left("a") == []
        assert rounds.judged("", 100.0) == []
        assert rounds.ticked(159.9) == []
        assert [type(decision) for decision in rounds.ticked(160.0)] == [End]

    def test_one_that_does_not_finish_its_evaluation_is_not_waited_for_for_ever(self) -> None:
        rounds = self.merged("a", "b")
        rounds.ready("a")
        assert rounds.ticked(60.0) == [Judge(round_number=1)]

    @pytest.mark.parametrize("num_merged", [1, 2])
    def test_an_interrupted_run_asks_for_the_last_verdict_whether_or_not_it_was_given(self, num_merged: int) -> None:
        again = self.rounds("a")
        again.restore(None, (), (), num_merged=num_merged, next_steps={})
        again.resumed(["a"], 0.0)
        assert not again.is_parting
        assert again.ready("a") == [Judge(round_number=num_merged)]
        assert again.judged("no better", 0.0) == [Stop(reason="no better")]

    def test_an_interrupted_run_that_had_stopped_only_parts(self) -> None:
        again = self.rounds("a")
        again.restore(None, (), (), num_merged=1, next_steps={}, has_stopped=True)
        assert again.resumed(["a"], 0.0) == []
        assert again.is_parting
