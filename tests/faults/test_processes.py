"""Processes that die, freeze or are stopped: everyone else goes on or says what happened, and nobody hangs."""

import os
import re
import signal
import time
from collections.abc import Callable

import pytest
from faults.town import HEARTBEAT_TIMEOUT_S, Town

pytestmark = pytest.mark.slow


def test_a_killed_client_is_noticed_and_the_others_finish(town: Callable[..., Town]) -> None:
    run = town(3, federation__num_rounds=1, federation__local_steps=100, federation__step_timeout=4)
    run.wait_for("step", 30)
    run.processes["clinic-1"].kill()
    killed_at = time.time()
    run.wait_for("client_lost", 1)
    (lost,) = run.events("client_lost")
    assert lost["client_id"] == "clinic-1"
    # by its silence, unless the server had something to tell it before that
    assert re.search("fell silent|has closed its connection", lost["reason"])
    assert lost["time"] - killed_at <= HEARTBEAT_TIMEOUT_S + 5  # and a machine that others use
    run.wait_for("client_left", 1)
    assert run.events("client_left")[0]["reason"] == "was away for more than step_timeout = 4 s"
    assert run.end_of("server")[0] == 0
    assert run.end_of("clinic-0")[0] == run.end_of("clinic-2")[0] == 0
    (merge,) = run.report()["merges"]
    assert (merge["absent"], sorted(merge["clients"])) == (["clinic-1"], ["clinic-0", "clinic-2"])


def test_too_few_clients_left_keep_the_old_layers_and_say_so(town: Callable[..., Town]) -> None:
    run = town(2, federation__min_train_clients=2, federation__wait_timeout=10, federation__step_timeout=3)
    run.wait_for("step", 20)
    run.processes["clinic-1"].kill()
    run.wait_for("merged", 1)
    (merged,) = run.events("merged")
    assert merged["accepted"] is False
    assert "min_train_clients = 2" in merged["reason"]
    code, said = run.end_of("server")
    assert code == 9
    assert "waited 10 s (federation.wait_timeout) for 2 clients; ready: clinic-0" in said
    code, said = run.end_of("clinic-0")
    assert (code, "wait_timeout" in said) == (8, True)


def test_nobody_is_left_in_the_last_round(town: Callable[..., Town]) -> None:
    in_the_last = dict.fromkeys(("clinic-0", "clinic-1"), "step-before-record:7:60")
    run = town(2, pause=in_the_last, federation__num_rounds=2, federation__local_steps=5, federation__step_timeout=3)
    for name in in_the_last:
        run.wait_until_it_pauses(name)
    for name in in_the_last:
        run.processes[name].kill()
    code, text = run.end_of("server")
    assert code == 9
    assert "everybody has left, and the last round was not merged: 0 clients finished" in text
    assert [merge["accepted"] for merge in run.report()["merges"]] == [True, False]
    run.start("server")
    assert run.end_of("server")[0] == 0  # with what the first round has merged
    assert run.report()["complete"]


def test_a_server_that_never_comes_back_is_given_up(town: Callable[..., Town]) -> None:
    run = town(1, own={"client.reconnect_timeout": 3})
    run.wait_for("step", 10)
    run.processes["server"].kill()
    code, said = run.end_of("clinic-0", timeout_s=HEARTBEAT_TIMEOUT_S + 20)
    assert code == 7
    assert "gave up on" in said
    assert "start the same command again to resume at step" in said


def test_a_stopped_server_has_saved_everything(town: Callable[..., Town]) -> None:
    run = town(2, own={"client.reconnect_timeout": 2})
    run.wait_for("step", 10)
    run.processes["server"].send_signal(signal.SIGTERM)
    assert run.end_of("server", timeout_s=15)[0] == 0
    for name in ("clinic-0", "clinic-1"):
        assert run.end_of(name, timeout_s=20)[0] == 7
    assert not (run.run_dir / "finished").exists()


def test_a_stopped_client_that_does_not_come_back_is_waited_for_and_then_left_behind(
    town: Callable[..., Town],
) -> None:
    run = town(2, federation__num_rounds=1, federation__step_timeout=4)
    run.wait_for("step", 10)
    run.processes["clinic-0"].send_signal(signal.SIGINT)
    assert run.end_of("clinic-0", timeout_s=10)[0] == 130
    run.wait_for("client_lost", 1)
    assert run.events("client_lost")[0]["reason"] == "stopped by its operator"  # it says so, nobody has to miss it
    run.wait_for("client_left", 1)
    assert run.events("client_left")[0]["reason"] == "was away for more than step_timeout = 4 s"
    assert run.end_of("server")[0] == run.end_of("clinic-1")[0] == 0


def test_a_frozen_client_misses_steps_and_comes_back(town: Callable[..., Town]) -> None:
    """Its step is closed without it, applied on neither side; thawed, it goes on with the others' next one."""
    patient = {"link__heartbeat_timeout": 60, "federation__step_timeout": 2.0, "federation__local_steps": 60}
    run = town(2, **patient)
    run.wait_for("step", 10)
    os.kill(run.processes["clinic-0"].pid, signal.SIGSTOP)
    run.wait_for("step_refused", 1)
    os.kill(run.processes["clinic-0"].pid, signal.SIGCONT)
    assert run.end_of("server")[0] == run.end_of("clinic-0")[0] == run.end_of("clinic-1")[0] == 0
    steps = run.events("step")
    refused = {event["step"] for event in run.events("step_refused") if event["client_id"] == "clinic-0"}
    mine = [event["step"] for event in steps if event["client_id"] == "clinic-0"]
    assert mine == sorted(set(mine))  # each at most once, in order
    assert not refused & set(mine)
    assert max(mine) > max(refused)
    assert [merge["equal"] for merge in run.report()["merges"]] == [True, True]


def test_ctrl_c_ends_every_wait_within_five_seconds(town: Callable[..., Town]) -> None:
    """A client that reaches nobody, one that waits for others, one whose server is frozen, and the server itself."""
    run = town(3, starts=False, federation__min_available_clients=3)
    nowhere = run.config("clinic-2").read_text().replace(f":{run.port}", ":9")
    run.config("clinic-2").write_text(nowhere)
    for name in ("server", *run.names):
        run.start(name)
    run.wait_for("client_joined", 2)
    run.wait_for("waiting", 2)
    interrupted(run, "clinic-2", "clinic-0")
    os.kill(run.processes["server"].pid, signal.SIGSTOP)
    interrupted(run, "clinic-1")
    os.kill(run.processes["server"].pid, signal.SIGCONT)
    interrupted(run, "server")


def interrupted(run: Town, *names: str) -> None:
    begun = time.monotonic()
    for name in names:
        run.processes[name].send_signal(signal.SIGINT)
    for name in names:
        code, said = run.end_of(name, timeout_s=10)
        assert (code, said.endswith("interrupted")) == (130, True), said
    assert time.monotonic() - begun < 5 + 2  # and what a Python needs to end beside others
