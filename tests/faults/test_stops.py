"""Ctrl-C and SIGTERM on each side in every phase, also inside an optimizer step, and twice: as good as a kill (R36)."""

import signal
from collections.abc import Callable
from typing import Any

import pytest
from faults.town import Town

pytestmark = pytest.mark.slow

SMALL = {"federation__num_rounds": 2, "federation__local_steps": 8, "storage__snapshot_steps": 5}
STOPS = [signal.SIGINT, signal.SIGTERM]
EXIT = {signal.SIGINT: 130, signal.SIGTERM: 0}
AT_ONCE = 137
MODES = {
    "shared": {},
    "sequential": {"federation__server_mode": "sequential"},
    "per_client": {"federation__server_mode": "per_client"},
    "frozen": {"federation__server_mode": "frozen", "train__backbone": "none"},
}


def stop(run: Town, name: str, number: signal.Signals, *, within_s: float = 15.0) -> str:
    """Stop a process in order; return what it has said."""
    run.processes[name].send_signal(number)
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


@pytest.mark.parametrize("durability", ["redo", "snapshot"])
@pytest.mark.parametrize("server_mode", list(MODES))
def test_a_stopped_client_is_waited_for_and_so_is_a_stopped_server(
    town: Callable[..., Town], server_mode: str, durability: str
) -> None:
    run = town(2, **SMALL, **MODES[server_mode], storage__durability=durability)
    victims = [("clinic-0", 4), ("server", 9), ("clinic-1", 14), ("server", 20)]
    for number, (victim, at) in zip(STOPS * 2, victims, strict=True):
        run.wait_for("step", at)
        lost, returned = (len(of(run, kind, victim)) for kind in ("client_lost", "client_returned"))
        said = stop(run, victim, number)
        if victim != "server":
            place = said.partition("to resume at step ")[2].partition(".")[0]
            assert "The others wait for it for 20 s (federation.step_timeout)" in said
            run.wait_for_client(victim, "client_lost", lost + 1)
            assert of(run, "client_lost", victim)[-1]["reason"] == "stopped by its operator"
            run.start(victim)
            run.wait_for_client(victim, "client_returned", returned + 1)
            back = of(run, "client_returned", victim)[-1]
            assert back["step"] + 1 in (int(place), int(place) + 1)  # what was asked for may have been applied
        else:
            run.start(victim)
    settle(run)
