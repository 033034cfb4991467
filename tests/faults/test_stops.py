"""Ctrl-C and SIGTERM on each side in every phase, also inside an optimizer step, and twice: as good as a kill (R36)."""

import shutil
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from faults.town import Town

from splitfl.telemetry.history import HISTORY_FILE

pytestmark = pytest.mark.slow

SMALL = {"federation__num_rounds": 2, "federation__local_steps": 8, "storage__snapshot_steps": 5}
STOPS = [signal.SIGINT, signal.SIGTERM]
EXIT = {signal.SIGINT: 130, signal.SIGTERM: 0}
AT_ONCE = 137
SOON_S = 5.0
MICRO_BATCHES = 2
MODES = {
    "shared": {},
    "sequential": {"federation__server_mode": "sequential"},
    "per_client": {"federation__server_mode": "per_client"},
    "frozen": {"federation__server_mode": "frozen", "train__backbone": "none"},
}


def stop_there(run: Town, name: str, number: signal.Signals) -> str:
    """Stop a process that pauses; return what it has said."""
    run.stop(name, number)
    return ended(run, name, number)


def stop(run: Town, name: str, number: signal.Signals, *, within_s: float = 15.0) -> str:
    """Stop a process in order; return what it has said."""
    run.processes[name].send_signal(number)
    return ended(run, name, number, within_s=within_s)


def ended(run: Town, name: str, number: signal.Signals, *, within_s: float = 15.0) -> str:
    code = run.processes[name].wait(within_s)
    said = run.processes[name].said()
    assert code == EXIT[number], said
    return said


def of(run: Town, kind: str, name: str) -> list[dict[str, Any]]:
    return [event for event in run.events(kind) if event["client_id"] == name]


def settle(run: Town, *, steps: int = 16) -> None:
    """All ends well: nothing is lost or twice, every step has all its members, and every bit agrees."""
    run.keep_alive()
    verdict = run.verdict()
    assert verdict.problems == []
    assert (verdict.steps_lost, verdict.steps_twice) == (0, 0)
    assert verdict.steps_acknowledged == steps * len(run.names)
    assert all(sorted(merge["clients"]) == run.names for merge in run.events("merged"))
    assert run.events("client_left") == [] or {e["reason"] for e in run.events("client_left")} == {"done"}
    assert run.differs_from_replay() == []


@pytest.mark.parametrize(
    ("server_mode", "durability"),
    [*((mode, "redo") for mode in MODES), ("shared", "snapshot"), ("per_client", "snapshot")],
)
def test_a_stopped_client_is_waited_for_and_so_is_a_stopped_server(
    town: Callable[..., Town], server_mode: str, durability: str
) -> None:
    in_a_round = 8 * len(("clinic-0", "clinic-1")) * MICRO_BATCHES
    run = town(
        2,
        **{**SMALL, "federation__num_rounds": 3},
        **MODES[server_mode],
        storage__durability=durability,
        pause={
            "clinic-0": "step-acknowledged:3:60",
            "server": f"forward:{in_a_round + 3}:60",  # in the second round
            "clinic-1": "step-acknowledged:13:60",
        },
    )
    in_the_third = f"forward:{in_a_round + 12}:60"  # counted from that start on, and some are sent again
    victims = [("clinic-0", ""), ("server", in_the_third), ("clinic-1", ""), ("server", "")]
    for number, (victim, pause) in zip(STOPS * 2, victims, strict=True):
        run.wait_until_it_pauses(victim)
        lost, returned = (len(of(run, kind, victim)) for kind in ("client_lost", "client_returned"))
        said = stop_there(run, victim, number)
        if victim != "server":
            place = said.partition("to resume at step ")[2].partition(".")[0]
            assert "Its place in the round is kept for 20 s (federation.step_timeout)" in said
            run.wait_for_client(victim, "client_lost", lost + 1)
            assert of(run, "client_lost", victim)[-1]["reason"] == "stopped by its operator"
            run.start(victim)
            run.wait_for_client(victim, "client_returned", returned + 1)
            back = of(run, "client_returned", victim)[-1]
            assert back["step"] + 1 in (int(place), int(place) + 1)  # what was asked for may have been applied
        else:
            run.pauses_next(victim, pause)
            run.start(victim)
    settle(run, steps=24)


CLIENT_POINTS = [
    ("redo", "step-after-record:3"),
    ("redo", "optimizer-tensor:21"),
    ("redo", "merge-heard:1"),  # and evaluates next
    ("redo", "merge-heard:2"),  # the last
    ("snapshot", "optimizer-tensor:21"),
    ("snapshot", "step-acknowledged:3"),
]


@pytest.mark.parametrize(("durability", "point"), CLIENT_POINTS)
def test_a_client_that_is_stopped_in_the_middle_of_something(
    town: Callable[..., Town], durability: str, point: str
) -> None:
    """Its present work, such as an optimizer step of many tensors, is finished first, and nothing half done is kept."""
    number = STOPS[len(point) % 2]
    evaluates = {"data.eval_fraction": 0.2}
    run = town(2, **SMALL, storage__durability=durability, own=evaluates, pause={"clinic-1": f"{point}:60"})
    run.wait_until_it_pauses("clinic-1")
    assert "to resume at step" in stop_there(run, "clinic-1", number)
    run.start("clinic-1")
    settle(run)


def test_a_client_that_is_stopped_while_it_waits_for_a_step_of_others(town: Callable[..., Town]) -> None:
    """With snapshots alone it keeps the step that it has asked for, which the server applies when the other asks."""
    run = town(2, **SMALL, storage__durability="snapshot", pause={"clinic-0": "optimizer-tensor:40:60"})
    run.wait_until_it_pauses("clinic-0")
    run.wait_for_client("clinic-1", "step", 2)
    begun = time.monotonic()
    stop(run, "clinic-1", signal.SIGINT)
    assert time.monotonic() - begun < SOON_S
    run.start("clinic-1")
    run.go_on("clinic-0")
    settle(run)


def test_clients_that_are_stopped_while_their_layers_are_merged(town: Callable[..., Town]) -> None:
    run = town(2, **SMALL, pause={"server": "merge-before-record:1:60"})
    run.wait_until_it_pauses("server")
    begun = time.monotonic()
    for name, number in zip(run.names, STOPS, strict=True):
        stop(run, name, number)
    assert time.monotonic() - begun < 2 * SOON_S
    run.go_on("server")
    for name in run.names:
        run.start(name)
    settle(run)


SERVER_POINTS = [
    ("redo", "forward:9"),
    ("redo", "commit-after-record:4"),
    ("redo", "optimizer-tensor:17"),
    ("redo", "merge-before-record:1"),
    ("redo", "snapshot-before-rename:2"),
    ("snapshot", "forward:20"),
    ("snapshot", "merge-after-record:1"),
]


@pytest.mark.parametrize(("durability", "point"), SERVER_POINTS)
def test_a_server_that_is_stopped_in_the_middle_of_something(
    town: Callable[..., Town], durability: str, point: str
) -> None:
    number = STOPS[len(point) % 2]
    run = town(2, **SMALL, storage__durability=durability, pause={"server": f"{point}:60"})
    run.wait_until_it_pauses("server")
    said = stop_there(run, "server", number)
    assert "stopping where nothing is half done" in said
    report = run.report()
    assert report["complete"] is False
    assert report["stopped"].startswith("stopped by its operator after commit ")
    assert "This run did not finish. It was stopped by its operator" in (run.run_dir / "report.html").read_text()
    steps = len(run.events("step"))
    run.start("server")
    settle(run)
    after = run.report()
    assert (after["complete"], after["stopped"], after["steps"]) == (True, None, 16)
    assert steps < 32
    assert after["wall_seconds"] > report["wall_seconds"]
    assert after["server"]["bytes_received"] > report["server"]["bytes_received"]
    assert run.events("client_rewinds") == []  # nothing was lost, with snapshots alone either


@pytest.mark.parametrize(
    ("name", "point"),
    [("clinic-1", "optimizer-tensor:21"), ("server", "forward:9"), ("server", "merge-after-record:1")],
)
def test_a_second_signal_ends_it_at_once(town: Callable[..., Town], name: str, point: str) -> None:
    run = town(2, **SMALL, pause={name: f"{point}:60"})
    run.wait_until_it_pauses(name)
    run.processes[name].send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert run.processes[name].poll() is None
    begun = time.monotonic()
    run.processes[name].send_signal(signal.SIGINT)
    assert run.processes[name].wait(10) == AT_ONCE
    assert time.monotonic() - begun < SOON_S
    assert "ended at once by a second signal" in run.processes[name].said()
    run.start(name)
    settle(run)


def test_a_client_goes_back_to_the_first_layers_where_its_records_do_not_reach(town: Callable[..., Town]) -> None:
    """The server's folder was restored from before the first step; the client's oldest snapshot is later."""
    once = {"federation__num_rounds": 1, "federation__local_steps": 30, "storage__keep_snapshots": 2}
    run = town(1, starts=False, storage__snapshot_steps=4, **once)
    run.start("server")
    run.wait_for("waiting", 1)
    stop(run, "server", signal.SIGTERM)
    shutil.copytree(run.run_dir / "state", run.folder / "backup")
    for name in ("server", "clinic-0"):
        run.start(name)
    assert [run.end_of(name)[0] for name in ("server", "clinic-0")] == [0, 0]
    undisturbed = run.events("merged")[-1]["digest"]

    shutil.rmtree(run.client_dir("clinic-0"))
    restore(run)
    run.pauses_next("server", "commit-after-apply:17:60")
    for name in ("server", "clinic-0"):
        run.start(name)
    run.wait_until_it_pauses("server")
    stop_there(run, "server", signal.SIGTERM)
    restore(run)
    run.start("server")
    run.wait_for("client_rewinds", 1)
    assert [run.end_of(name)[0] for name in ("server", "clinic-0")] == [0, 0]
    assert "its records do not reach back that far" in (run.client_dir("clinic-0") / HISTORY_FILE).read_text()
    assert run.events("merged")[-1]["digest"] == undisturbed


def restore(run: Town) -> None:
    shutil.rmtree(run.run_dir / "state")
    shutil.copytree(run.folder / "backup", run.run_dir / "state")
    (run.run_dir / "finished").unlink(missing_ok=True)


def test_a_server_that_is_stopped_while_it_exports(town: Callable[..., Town]) -> None:
    exports = {"server__export_model": "true", "federation__num_rounds": 1, "federation__local_steps": 3}
    run = town(1, **exports, pause={"server": "export-before:1:60"})
    run.wait_until_it_pauses("server")
    assert run.end_of("clinic-0")[0] == 0
    stop(run, "server", signal.SIGTERM)
    assert run.report()["complete"] is False
    run.start("server")
    assert run.end_of("server")[0] == 0
    assert (run.report()["complete"], run.report()["steps"]) == (True, 3)
    assert (run.run_dir / "model" / "config.json").is_file()


def test_stops_in_a_run_that_merges_as_uploads_come_in(town: Callable[..., Town]) -> None:
    buffered = {
        "federation__strategy": "FedBuff",
        "federation__server_mode": "sequential",
        "optimizer__lr_scheduler_type": "constant",
        "federation__local_steps": 4,
        "strategy__buffer_size": 2,
    }
    run = town(2, **buffered, federation__num_rounds=12)
    for number, (victim, at) in zip(
        STOPS * 2, [("clinic-1", 6), ("server", 14), ("clinic-0", 22), ("server", 30)], strict=True
    ):
        run.wait_for("step", at)
        stop(run, victim, number)
        run.start(victim)
    run.keep_alive()
    assert {event["round"] for event in run.events("merged")} == set(range(1, 13))
    assert {event["reason"] for event in run.events("client_left")} == {"done"}
    verdict = run.verdict()
    assert (verdict.problems, verdict.steps_lost, verdict.steps_twice) == ([], 0, 0)
    assert run.differs_from_replay() == []
