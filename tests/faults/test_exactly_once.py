"""Kills where they hurt most, and at random: no acknowledged step is lost or counted twice, and every bit agrees.

After each case the history checker and a quiet replay decide (benchmarks/history.py, benchmarks/replay.py).
"""

import random
import signal
import time
from collections.abc import Callable

import pytest
from faults.town import Town

pytestmark = pytest.mark.slow

PER_CLIENT = {"federation__server_mode": "per_client"}
SMALL = {"federation__num_rounds": 2, "federation__local_steps": 8, "storage__snapshot_steps": 5}


def settle(run: Town, *, all_steps: bool = True) -> None:
    run.keep_alive()
    verdict = run.verdict()
    assert verdict.problems == []
    assert (verdict.steps_lost, verdict.steps_twice) == (0, 0)
    if all_steps:  # outages shorter than step_timeout change nothing
        assert verdict.steps_acknowledged == 16 * len(run.names)
        # and the report tells of all, also of what a server had written down and not told of when it died
        report = run.report()
        assert [client["steps"] for client in report["clients"]] == [16] * len(run.names)
        assert report["num_rounds"] == 2
    assert run.differs_from_replay() == []


def test_an_undisturbed_run(town: Callable[..., Town]) -> None:
    settle(town(2, **SMALL))


@pytest.mark.parametrize(
    "point",
    [
        "commit-before-record:3",
        "append-torn:9",
        "commit-after-record:4",
        "commit-after-apply:4",
        "commit-acknowledged:5",
        "snapshot-after-rename:2",
        "upload-after-record:1",
        "merge-after-record:1",
        "merge-after-record:2",
    ],
)
def test_a_server_that_dies_at_a_point(town: Callable[..., Town], point: str) -> None:
    run = town(1, crash={"server": point}, **SMALL)
    settle(run)
    assert len(run.events("resumed")) == 1


@pytest.mark.parametrize(
    ("point", "train"),
    [
        ("commit-after-record:4", "lora"),
        ("upload-after-record:1", "full"),
        ("merge-before-record:1", "full"),
        ("merge-after-record:1", "lora"),
        ("snapshot-after-rename:3", "lora"),
    ],
)
def test_a_server_with_a_copy_for_each_client_that_dies_at_a_point(
    town: Callable[..., Town], point: str, train: str
) -> None:
    run = town(2, crash={"server": point}, **SMALL, **PER_CLIENT, train__backbone=train)
    settle(run)
    assert len(run.events("resumed")) == 1


def test_nobody_waits_for_a_client_with_a_copy_of_its_own(town: Callable[..., Town]) -> None:
    """One is frozen in the middle of a round; the other goes on to the round's end, and the merge has both."""
    run = town(2, **SMALL, **PER_CLIENT, pause={"clinic-1": "step-before-record:4:60"})
    run.wait_until_it_pauses("clinic-1")
    run.processes["clinic-1"].send_signal(signal.SIGSTOP)
    run.wait_for_client("clinic-1", "step", 3)
    run.wait_for_client("clinic-0", "step", 8)
    assert [event["client_id"] for event in run.events("step")].count("clinic-1") == 3
    run.go_on("clinic-1")
    run.processes["clinic-1"].send_signal(signal.SIGCONT)
    settle(run)
    assert [sorted(merge["clients"]) for merge in run.events("merged")] == [run.names] * 2


@pytest.mark.parametrize(
    "point",
    [
        "step-before-record:3",
        "step-after-record:3",
        "step-acknowledged:3",
        "step-applied:3",
        "snapshot-after-rename:3",
    ],
)
def test_a_client_that_dies_at_a_point(town: Callable[..., Town], point: str) -> None:
    run = town(2, crash={"clinic-1": point}, **SMALL)
    settle(run)
    assert len(run.events("client_returned")) >= 1


@pytest.mark.parametrize("server_mode", ["shared", "sequential", "per_client"])
def test_kills_at_random(town: Callable[..., Town], server_mode: str) -> None:
    draw = random.Random(server_mode)
    run = town(2, **SMALL, federation__server_mode=server_mode)
    for _ in range(3):
        time.sleep(draw.uniform(0.2, 1.5))
        victim = draw.choice(["server", *run.names])
        if run.processes[victim].poll() is None:
            run.processes[victim].kill()
            run.processes[victim].wait()
            time.sleep(draw.uniform(0.0, 0.5))
            run.start(victim)
    settle(run)


@pytest.mark.parametrize(
    ("settings", "crash"),
    [
        ({"federation__strategy": "FedAdam", "strategy__eta": 0.01}, {"server": "merge-after-record:1"}),
        ({"federation__strategy": "FedProx", "strategy__proximal_mu": 0.5}, {"clinic-0": "step-applied:7"}),
        (
            {"federation__strategy": "FedAvgM", "federation__server_mode": "per_client"},
            {"server": "merge-after-record:1"},
        ),
    ],
)
def test_what_a_strategy_remembers_outlives_a_crash(
    town: Callable[..., Town], settings: dict[str, object], crash: dict[str, str]
) -> None:
    settle(town(2, crash=crash, **SMALL, **settings))


@pytest.mark.parametrize(
    "crash",
    [
        {"server": "upload-after-record:2"},
        {"server": "merge-before-record:1"},
        {"server": "merge-after-record:1"},
        {"clinic-0": "merge-heard:1"},  # its layers are merged, and it does not know
        {"clinic-0": "step-applied:8"},
        {"server": "commit-after-record:18"},
    ],
)
def test_controls_on_both_sides_outlive_a_crash(town: Callable[..., Town], crash: dict[str, str]) -> None:
    scaffold = {
        "federation__strategy": "SCAFFOLD",
        "federation__weight_by": "uniform",
        "federation__num_rounds": 2,
        "federation__local_steps": 6,
        "federation__server_mode": "sequential",
        "storage__snapshot_steps": 5,
        "optimizer__optim": "sgd",
        "optimizer__learning_rate": 0.1,
    }
    run = town(2, crash=crash, **scaffold)
    settle(run, all_steps=False)
    assert run.verdict().steps_acknowledged == 12 * 2
