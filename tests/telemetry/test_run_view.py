from dataclasses import asdict
from functools import reduce

import pytest

from splitfl.reporting.view import RunView, Traffic
from splitfl.reporting.whole_run import whole_run


def view_of(events):
    return reduce(RunView.after, events, RunView())


def leaves(tree):
    return sum(map(leaves, tree.values())) if isinstance(tree, dict) else 1


def of_kind(events, name):
    return next(event for event in events if event["event"] == name)


def test_an_event_changes_no_view_that_was_there_before(events):
    views = [RunView()]
    for event in events:
        views.append(views[-1].after(event))
    assert [view_of(events[:length]) for length in range(len(views))] == views
    assert view_of(events).complete
    assert not views[-2].complete


def test_a_view_does_not_grow_with_the_run(events):
    step, opened = of_kind(events, "step"), of_kind(events, "round_opened")
    evaluated, merged = of_kind(events, "evaluated"), of_kind(events, "merged")
    a_round = [opened, *[step | {"step": number} for number in range(9)], merged, evaluated]
    grown = [leaves(asdict(view_of([*events[:8], *a_round * times]))) for times in (1, 50)]
    assert grown[0] == grown[1] > 20


def test_an_event_of_another_kind_changes_the_time_only(events):
    before = view_of(events[:9])
    after = before.after({"event": "sung", "time": before.lives[0].last_s, "elapsed_s": 99.0, "client_id": "zoe"})
    assert after.elapsed_s == 99.0
    assert (after.clients, after.round, after.lives) == (before.clients, before.round, before.lives)


def test_what_a_restarted_server_tells_again_counts_once(events):
    steps = [event for event in events if event["event"] == "step"]
    whole = whole_run([*events[:-1], events[0], *[step | {"loss": 9.0} for step in steps[-2:]], events[-1]])
    assert {len(each) for each in whole.steps.values()} == {4}
    assert [whole.steps[name][4].loss for name in whole.client_ids] == [9.0, 9.0]
    assert whole.num_commits == 4


def test_a_count_of_bytes_begins_anew_with_each_life_of_the_server(events):
    """Also where the second life's first count is higher than the last of the first."""
    started, step = events[0], of_kind(events, "step")
    told = [started, step | {"bytes_sent": 10}, started, step | {"bytes_sent": 25}, step | {"bytes_sent": 30}]
    view = view_of(told)
    assert view.client("clinic-a").bytes_sent == 10 + 30
    assert [life.traffic.sent for life in view.lives] == [10, 30]
    assert [life.bytes_received for life in view.lives] == [
        10,
        30,
    ]  # both were killed: it is what the clients have sent


@pytest.mark.parametrize(("earlier", "now", "added"), [(0, 5, 5), (5, 5, 0), (5, 8, 3), (8, 3, 3)])
def test_traffic_since_an_earlier_count(earlier, now, added):
    since = Traffic(sent=now, received=7).since(Traffic(sent=earlier, received=7))
    assert since == Traffic(sent=added, received=0)


def test_losses_lie_over_rounds_from_before_to_after(events):
    by_round = [event | {"phase": "round", "round": 1} for event in events if event["event"] == "evaluated"][:1]
    unknown = [
        of_kind(events, "evaluated") | {"phase": "round", "round": 2, "eval_loss": None, "client_id": "clinic-b"}
    ]
    whole = whole_run([*events, *by_round, *unknown])
    assert whole.held_out("clinic-a") == [(0, 3.0), (1, 3.0), (2, 2.0)]
    assert whole.held_out("clinic-b") == [(0, 3.5), (2, 2.5)]  # after the run replaces the last round's own


def test_a_message_without_end_from_nobody_known_is_no_client(events):
    cut_off = {"event": "cut_off", "time": 0.0, "elapsed_s": 9.0, "client_id": "", "address": "x", "num_bytes": 9}
    assert whole_run([*events, cut_off]).client_ids == ("clinic-a", "clinic-b")
