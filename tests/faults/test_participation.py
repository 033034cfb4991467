"""Who takes part in a round, with real processes: late joiners, leavers, stragglers, and who is drawn to train."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from faults.town import Town

from server_backbone.replay import rollback
from splitfl.telemetry.metrics import read_events

pytestmark = pytest.mark.slow

# Nobody counts as lost while it is frozen by a signal.
PATIENT = {"link__heartbeat_timeout": 120, "federation__step_timeout": 60}


AT_STEP_4 = {"clinic-1": "step-before-record:4:60"}


def freeze(run: Town, name: str) -> None:
    """Freeze a process at its point."""
    run.wait_until_it_pauses(name)
    os.kill(run.processes[name].pid, signal.SIGSTOP)


def thaw(run: Town, name: str) -> None:
    run.go_on(name)
    os.kill(run.processes[name].pid, signal.SIGCONT)


def wait_for_steps(run: Town, name: str, step: int) -> None:
    count = 1
    while not any(event["client_id"] == name and event["step"] >= step for event in run.events("step")):
        run.wait_for("step", count)
        count = len(run.events("step")) + 1


def assert_all_end_well(run: Town) -> None:
    assert {name: run.end_of(name, timeout_s=120)[0] for name in run.processes} == dict.fromkeys(run.processes, 0)
    assert all(merge["equal"] for merge in run.report()["merges"])


def trainers(run: Town) -> list[list[str]]:
    return [event["trainers"] for event in run.events("round_opened")]


def steps_of(run: Town, name: str) -> list[int]:
    return [event["step"] for event in run.events("step") if event["client_id"] == name]


def test_a_late_joiner_gets_the_merged_layers_and_trains_from_the_next_round_on(town: Callable[..., Town]) -> None:
    settings = {"federation__num_rounds": 3, "federation__local_steps": 8, "federation__min_available_clients": 1}
    in_the_second_round = {"clinic-0": "step-before-record:11:60"}
    run = town(2, starts=False, pause=in_the_second_round, **settings, **PATIENT)
    for name in ("server", "clinic-0"):
        run.start(name)
    run.wait_until_it_pauses("clinic-0")
    run.start("clinic-1")
    run.wait_for("client_joined", 2)
    run.go_on("clinic-0")
    assert_all_end_well(run)
    assert trainers(run) == [["clinic-0"], ["clinic-0"], ["clinic-0", "clinic-1"]]
    assert steps_of(run, "clinic-1") == list(range(17, 25))  # of the run's schedule
    loaded = [event["round"] for event in run.events("loaded") if event["client_id"] == "clinic-1"]
    assert loaded == [1, 2, 3]  # when it joined, when its first round opened, and at that round's end
    assert run.verdict().problems == []
    assert run.differs_from_replay() == []


def test_one_that_comes_in_the_last_round_gets_its_merge_and_ends(town: Callable[..., Town]) -> None:
    settings = {"federation__num_rounds": 1, "federation__local_steps": 8, "federation__min_available_clients": 1}
    run = town(2, starts=False, pause={"clinic-0": "step-before-record:3:60"}, **settings, **PATIENT)
    for name in ("server", "clinic-0"):
        run.start(name)
    run.wait_until_it_pauses("clinic-0")
    run.start("clinic-1")
    run.wait_for("client_joined", 2)
    run.go_on("clinic-0")
    assert_all_end_well(run)
    assert trainers(run) == [["clinic-0"]]
    assert sorted(run.report()["merges"][0]["client_digests"]) == ["clinic-0", "clinic-1"]


def test_what_a_leaver_has_done_in_the_round_is_not_merged(town: Callable[..., Town]) -> None:
    run = town(3, federation__num_rounds=1, federation__local_steps=60)
    wait_for_steps(run, "clinic-1", 5)
    run.processes["clinic-1"].send_signal(signal.SIGINT)
    assert run.end_of("clinic-1", timeout_s=20)[0] == 130
    assert [run.end_of(name)[0] for name in ("server", "clinic-0", "clinic-2")] == [0, 0, 0]
    (merge,) = run.report()["merges"]
    assert merge["absent"] == ["clinic-1"]
    assert merge["clients"] == {"clinic-0": 30, "clinic-2": 30}
    assert merge["equal"]
    assert run.differs_from_replay() == []  # which weighs the two alone


def straggling(town: Callable[..., Town], **settings: Any) -> Town:
    """Two clients that need not wait for each other, of which one stops in the middle of the first round."""
    independent = {"federation__server_mode": "frozen", "federation__num_rounds": 2, "federation__local_steps": 8}
    run = town(2, **{**independent, **PATIENT, **settings}, pause=AT_STEP_4, federation__round_timeout=10)
    freeze(run, "clinic-1")
    return run


@pytest.mark.parametrize("server_mode", ["frozen", "per_client"])
def test_a_straggler_is_left_out_at_round_timeout_and_goes_on_in_the_next_round(
    town: Callable[..., Town], server_mode: str
) -> None:
    run = straggling(town, federation__server_mode=server_mode)
    run.wait_for("merged", 1)
    thaw(run, "clinic-1")
    assert_all_end_well(run)
    first, second = run.report()["merges"]
    assert (first["absent"], first["clients"]) == (["clinic-1"], {"clinic-0": 30})
    assert (second["absent"], second["clients"]) == ([], {"clinic-0": 30, "clinic-1": 30})
    assert run.events("last_call") == []


@pytest.mark.parametrize("server_mode", ["frozen", "per_client"])
def test_a_stragglers_finished_steps_are_merged_by_their_share(town: Callable[..., Town], server_mode: str) -> None:
    run = straggling(town, federation__partial_work="accept", federation__server_mode=server_mode)
    run.wait_for("last_call", 1)
    thaw(run, "clinic-1")
    assert_all_end_well(run)
    first, second = run.report()["merges"]
    done = [step for step in steps_of(run, "clinic-1") if step <= 8]
    assert 2 <= len(done) < 8
    assert (first["absent"], second["absent"]) == ([], [])
    assert first["clients"] == {"clinic-0": 30, "clinic-1": 30 * len(done) / 8}
    assert second["clients"] == {"clinic-0": 30, "clinic-1": 30}
    assert run.verdict().problems == []
    assert run.differs_from_replay() == []


def test_a_step_that_all_share_is_given_up_at_the_last_call(town: Callable[..., Town]) -> None:
    """One client waits for the acknowledgement of a step that the other has stopped in."""
    run = straggling(town, federation__partial_work="accept", federation__server_mode="shared")
    run.wait_for("last_call", 1)
    thaw(run, "clinic-1")
    assert_all_end_well(run)
    first, second = run.report()["merges"]
    done = [step for step in steps_of(run, "clinic-1") if step <= 8]
    assert done == [step for step in steps_of(run, "clinic-0") if step <= 8]
    assert first["clients"] == {"clinic-0": 30 * len(done) / 8, "clinic-1": 30 * len(done) / 8}
    assert second["clients"] == {"clinic-0": 30, "clinic-1": 30}
    assert run.verdict().problems == []
    assert run.differs_from_replay() == []


def test_a_server_that_dies_after_the_last_call_merges_the_same_work(town: Callable[..., Town]) -> None:
    run = straggling(town, federation__partial_work="accept", crash={"server": "upload-after-record:2"})
    run.wait_for("last_call", 1)
    thaw(run, "clinic-1")
    assert run.end_of("server")[0] == 137
    run.start("server")
    assert_all_end_well(run)
    first, _ = run.report()["merges"]
    done = [step for step in steps_of(run, "clinic-1") if step <= 8]
    assert first["clients"] == {"clinic-0": 30, "clinic-1": 30 * len(done) / 8}
    assert run.verdict().problems == []
    assert run.differs_from_replay() == []


BUFFERED = {
    "federation__strategy": "FedBuff",
    "federation__server_mode": "sequential",
    "optimizer__lr_scheduler_type": "constant",
    "federation__local_steps": 4,
    "strategy__buffer_size": 2,
}


def uploads(run: Town) -> list[list[tuple[str, int]]]:
    """Return who is in each merge, and how stale."""
    return [[(each["client_id"], each["staleness"]) for each in event["uploads"]] for event in run.events("merged")]


def with_a_slow_client(town: Callable[..., Town], num_merges: int, **settings: Any) -> Town:
    """FedBuff with a client that stops in its first turn while the other goes on, on a backbone that does not learn."""
    independent = {**BUFFERED, "federation__server_mode": "frozen", "federation__num_rounds": num_merges}
    # the other is in its seventh turn, after three merges, when the slow one goes on
    pause = {"clinic-1": "step-before-record:3:60", "clinic-0": "step-before-record:26:60"}
    run = town(2, **{**independent, **PATIENT, **settings}, pause=pause)
    freeze(run, "clinic-1")
    run.wait_until_it_pauses("clinic-0")
    run.wait_for("merged", 3)
    thaw(run, "clinic-1")
    run.go_on("clinic-0")
    return run


def test_fed_buff_does_not_wait_for_a_slow_client_and_counts_it_less(town: Callable[..., Town]) -> None:
    run = with_a_slow_client(town, 14)
    assert_all_end_well(run)
    found = uploads(run)
    assert found[:3] == [[("clinic-0", 0), ("clinic-0", 0)]] * 3
    assert len(found) == 14
    stale = [staleness for merge in found for name, staleness in merge if name == "clinic-1"]
    assert stale[0] >= 3
    shares = [sum(name == client for merge in found for name, _ in merge) for client in ("clinic-0", "clinic-1")]
    assert shares[0] > shares[1] > 0
    assert run.verdict().problems == []
    assert run.differs_from_replay() == []  # which scales each change by its staleness


def test_fed_buff_drops_what_is_too_stale_and_says_so(town: Callable[..., Town]) -> None:
    run = with_a_slow_client(town, 14, strategy__max_staleness=1)
    assert_all_end_well(run)
    dropped = run.events("upload_dropped")[0]
    assert dropped["client_id"] == "clinic-1"
    assert dropped["reason"].endswith("merges ago, strategy.max_staleness = 1")
    told = [event for event in read_events(run.client_dir("clinic-1") / "metrics.jsonl") if event["event"] == "loaded"]
    assert (told[0]["accepted"], told[0]["reason"]) == (False, dropped["reason"])
    assert any(name == "clinic-1" for merge in uploads(run) for name, _ in merge)  # its next ones are in time
    assert run.differs_from_replay() == []


@pytest.mark.parametrize(
    "crash",
    [
        {"server": "upload-after-record:1"},  # between two uploads
        {"server": "upload-after-record:2"},  # the merge is due
        {"server": "merge-before-record:2"},
        {"server": "merge-after-record:1"},
        {"clinic-1": "step-acknowledged:6"},
    ],
    ids=lambda crash: ":".join(*crash.items()),
)
def test_fed_buff_goes_on_after_a_crash_with_the_same_bits(town: Callable[..., Town], crash: dict[str, str]) -> None:
    run = town(2, **BUFFERED, federation__num_rounds=6, crash=crash)
    run.keep_alive(timeout_s=150)
    assert all(merge["equal"] for merge in run.report()["merges"])
    assert {event["round"] for event in run.events("merged")} >= {2, 3, 4, 5, 6}  # one is made before it can be told of
    assert {len(merge) for merge in uploads(run)} == {2}
    assert run.verdict().problems == []
    assert run.differs_from_replay() == []


@pytest.mark.parametrize("buffer_size", [2, 3])  # 3: uploads wait in the buffer when a merge is made
def test_fed_buff_goes_on_after_a_rollback(town: Callable[..., Town], buffer_size: int) -> None:
    after_the_fourth = {"server": "merge-before-record:5:60"}
    buffered = {**BUFFERED, "strategy__buffer_size": buffer_size}
    run = town(2, **buffered, pause=after_the_fourth, federation__num_rounds=8)
    run.wait_until_it_pauses("server")
    run.stop("server")
    assert run.end_of("server")[0] == 0
    (first, *_) = run.events("merged")
    rollback(run.run_dir, first["round"])
    run.start("server")
    assert_all_end_well(run)
    assert [event["round"] for event in run.events("merged")][-7:] == [2, 3, 4, 5, 6, 7, 8]
    assert run.differs_from_replay() == []


def test_fed_buff_goes_on_when_a_client_leaves(town: Callable[..., Town]) -> None:
    run = town(2, **BUFFERED, federation__num_rounds=12)
    run.wait_for("merged", 2)
    run.processes["clinic-1"].send_signal(signal.SIGINT)
    assert run.end_of("clinic-1", timeout_s=20)[0] == 130
    assert [run.end_of(name)[0] for name in ("server", "clinic-0")] == [0, 0]
    assert len(run.events("merged")) == 12
    assert run.differs_from_replay() == []
