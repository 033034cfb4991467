"""Rounds of each client's own and merges as uploads come in: who goes on when, and with what."""

from typing import Any

import pytest

from server_backbone.deciding.rounds import Decision, End, Merge, Open, Release
from server_backbone.deciding.turns import Turns
from splitfl.config.sections import FederationSection


def turns_of(*clients: str, buffer_size: int = 2, **settings: Any) -> Turns:
    usual = {"num_rounds": 3, "local_steps": 5, "wait_timeout": 60.0, "round_timeout": 100.0}
    turns = Turns(FederationSection(**{**usual, **settings}), buffer_size, 0.0)
    for client in clients:
        turns.joined(client)
    return turns


def turn(client: str, number: int, first_step: int) -> Open:
    return Open(round_number=number, clients=(client,), trainers=(client,), first_step=first_step)


def merge(number: int, *uploads: str, closes: bool = False, reason: str = "") -> Merge:
    return Merge(round_number=number, uploaded=uploads, absent=(), reason=reason, closes=closes)


def begun(*clients: str, **settings: Any) -> Turns:
    """Return turns in which each of these clients has begun its first."""
    turns = turns_of(*clients, **settings)
    for client in clients:
        assert turns.ready(client) == [turn(client, 1, 1)]
        turns.opened(0.0)
    return turns


def uploaded(turns: Turns, client: str, first_step: int) -> list[Decision]:
    return turns.uploaded(client, f"{client}@{first_step}")


class TestBeginning:
    def test_waits_for_as_many_as_must_be_available_and_for_nobody_else(self) -> None:
        turns = turns_of("a", "b", "slow", min_available_clients=2)
        assert turns.ready("b") == []
        assert turns.waiting_for() == "2 clients to begin round 1 (1 ready, a, slow still at work)"
        assert turns.ready("a") == [turn("a", 1, 1), turn("b", 1, 1)]
        assert turns.ready("slow") == [turn("slow", 1, 1)]

    def test_too_few_end_the_run(self) -> None:
        turns = turns_of("a", min_available_clients=2)
        turns.ready("a")
        assert turns.ticked(60.0) == [
            End(reason="waited 60 s (federation.wait_timeout) for 2 clients; ready: a"),
        ]

    def test_a_late_joiner_begins_at_once_with_the_newest_layers(self) -> None:
        turns = begun("a", buffer_size=1)
        uploaded(turns, "a", 1)
        turns.merged(1.0)
        turns.joined("late")
        assert turns.ready("late") == [turn("late", 2, 1)]


class TestGoingOn:
    def test_one_that_has_uploaded_goes_on_at_once(self) -> None:
        turns = begun("fast", "slow")
        assert uploaded(turns, "fast", 1) == [Release(client_id="fast")]
        assert turns.ready("fast") == [turn("fast", 1, 6)]  # from the same layers: nothing is merged yet

    def test_a_full_buffer_is_merged_whoever_filled_it(self) -> None:
        turns = begun("fast", "slow")
        uploaded(turns, "fast", 1)
        turns.ready("fast")
        assert uploaded(turns, "fast", 6) == [merge(1, "fast@1", "fast@6")]
        assert turns.merged(1.0) == [Release(client_id="fast")]
        assert turns.ready("fast") == [turn("fast", 2, 11)]
        assert uploaded(turns, "slow", 1) == [
            Release(client_id="slow")
        ]  # begun before the merge, and taken all the same
        assert turns.ready("slow") == [turn("slow", 2, 6)]

    def test_the_uploads_of_a_merge_are_in_the_order_of_their_names(self) -> None:
        turns = begun("a", "b")
        uploaded(turns, "b", 1)
        assert uploaded(turns, "a", 1) == [merge(1, "a@1", "b@1")]

    def test_what_comes_during_a_merge_is_in_the_next_and_goes_on_with_this_one(self) -> None:
        turns = begun("a", "b", "c", "d")
        uploaded(turns, "a", 1)
        assert uploaded(turns, "b", 1) == [merge(1, "a@1", "b@1")]
        assert uploaded(turns, "c", 1) == []
        assert turns.ready("a") == []  # the layers it would begin with are about to be old
        assert uploaded(turns, "d", 1) == []
        assert turns.merged(1.0) == [
            Release(client_id="b"),
            Release(client_id="c"),
            Release(client_id="d"),
            turn("a", 2, 6),
            merge(2, "c@1", "d@1"),
        ]

    def test_one_that_leaves_holds_nobody_up_and_what_it_uploaded_counts(self) -> None:
        turns = begun("a", "b")
        uploaded(turns, "b", 1)
        assert turns.left("b") == []
        assert uploaded(turns, "a", 1) == [merge(1, "a@1", "b@1")]


class TestDeadlines:
    def test_a_merge_takes_what_there_is_after_round_timeout(self) -> None:
        turns = begun("a", "b")
        uploaded(turns, "a", 1)
        turns.ready("a")
        turns.opened(50.0)  # a turn that begins does not put the merge off
        assert turns.ticked(99.9) == []
        assert turns.ticked(100.0) == [merge(1, "a@1")]
        turns.merged(100.0)
        assert turns.ticked(199.9) == []
        assert turns.ticked(200.0) == [
            merge(2, reason="no layers came in for 100 s (federation.round_timeout)"),
        ]

    def test_all_leave_and_none_comes_back(self) -> None:
        turns = begun("a")
        turns.left("a")
        assert turns.waiting_for() == "a client to come back"
        assert turns.ticked(1.0) == []
        assert turns.ticked(60.9) == []
        assert turns.ticked(61.0) == [End(reason="waited 60 s (federation.wait_timeout) for a client to come back")]

    def test_or_one_does(self) -> None:
        turns = begun("a")
        turns.left("a")
        turns.ticked(1.0)
        turns.joined("a", takes_part=True)
        assert turns.ticked(61.0) == []


class TestTheEnd:
    @pytest.fixture
    def turns(self) -> Turns:
        turns = begun("a", "b", num_rounds=1, buffer_size=1)
        assert uploaded(turns, "a", 1) == [merge(1, "a@1", closes=True)]
        assert turns.is_last
        return turns

    def test_the_last_merge_closes_everybodys_round(self, turns: Turns) -> None:
        assert turns.merged(1.0) == []
        assert turns.is_parting
        assert uploaded(turns, "b", 1) == []
        assert turns.ready("b") == []
        assert turns.left("a") == []
        assert turns.left("b") == [End(reason="")]

    def test_all_have_left_before(self, turns: Turns) -> None:
        turns.left("a")
        turns.left("b")
        assert turns.merged(1.0) == [End(reason="")]


class TestGoingOnAfterAnInterruption:
    def restored(self, *buffer: str, num_merged: int = 1, **next_steps: int) -> tuple[Turns, list[Decision]]:
        turns = turns_of()
        turns.restore(None, buffer, (), num_merged=num_merged, next_steps=next_steps)
        return turns, turns.resumed(next_steps, 0.0)

    def test_the_buffer_is_as_it_was(self) -> None:
        turns, decisions = self.restored("a@1", a=6, b=6)
        assert decisions == []
        assert uploaded(turns, "b", 1) == [merge(2, "a@1", "b@1")]

    def test_a_merge_that_was_due_is_made(self) -> None:
        _, decisions = self.restored("a@1", "b@1", "a@6", a=11, b=6)
        assert decisions == [merge(2, "a@1", "b@1")]

    def test_steps_go_on_counting(self) -> None:
        turns, _ = self.restored(a=11)
        assert turns.ready("a") == [turn("a", 2, 11)]

    def test_before_the_first_turn_it_gathers(self) -> None:
        turns, _ = self.restored(num_merged=0, a=0)
        assert turns.waiting_for().startswith("1 client to begin round 1")
        assert turns.ready("a") == [turn("a", 1, 1)]

    def test_after_the_last_merge_it_parts(self) -> None:
        turns, decisions = self.restored(num_merged=3, a=31)
        assert decisions == []
        assert turns.is_parting
