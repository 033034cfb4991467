"""The last words between a client and the server may be lost: a client that has done everything ends with 0."""

import signal
import time
from collections.abc import Callable

import pytest
from faults.town import HEARTBEAT_TIMEOUT_S, Town

from client_edge.link.link import Link
from client_edge.part import run as client_run
from splitfl.config.trees import ClientConfig
from splitfl.errors import PeerGone
from splitfl.protocol.messages import Goodbye
from splitfl.telemetry.metrics import read_events

pytestmark = pytest.mark.slow

SHORT = {"federation__num_rounds": 1, "federation__local_steps": 4}


def loses_the_farewell(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None] = lambda: None) -> None:
    """Have the first farewell of this process's client arrive nowhere, and the connection with it."""
    goodbye, lost = Link.goodbye, []

    def losing(self: Link, metrics: dict[str, float]) -> None:
        if lost:
            goodbye(self, metrics)
            return
        lost.append(True)
        self.connection.send(Goodbye(metrics=metrics))
        then()
        raise PeerGone("the farewell was lost")

    monkeypatch.setattr(Link, "goodbye", losing)


def test_a_farewell_that_is_lost_is_said_again(town: Callable[..., Town], monkeypatch: pytest.MonkeyPatch) -> None:
    run = town(2, starts=False, **SHORT)
    loses_the_farewell(monkeypatch)
    run.start("server")
    run.start("clinic-1")
    client_run.take_part(ClientConfig.load(run.config("clinic-0")), accept=True)
    assert [run.end_of(name)[0] for name in ("server", "clinic-1")] == [0, 0]
    assert [event["client_id"] for event in run.events("client_done")].count("clinic-0") == 1
    assert run.events("violation") == []
    assert run.verdict().problems == []


def test_the_server_has_ended_the_run_meanwhile(town: Callable[..., Town], monkeypatch: pytest.MonkeyPatch) -> None:
    run = town(1, starts=False, own={"client.reconnect_timeout": 60}, **SHORT)
    loses_the_farewell(monkeypatch, then=lambda: run.processes["server"].wait(30) and None)
    run.start("server")
    begun = time.monotonic()
    folder = client_run.take_part(ClientConfig.load(run.config("clinic-0")), accept=True)
    assert time.monotonic() - begun < 3 * HEARTBEAT_TIMEOUT_S + 20
    notes = [event["text"] for event in read_events(folder / "metrics.jsonl") if event["event"] == "note"]
    assert any("took leave" in note for note in notes)
    assert run.end_of("server")[0] == 0


def test_the_server_dies_before_its_farewell(town: Callable[..., Town]) -> None:
    """It is started again: the client says goodbye to that one, and both end with 0."""
    run = town(1, crash={"server": "goodbye-before-farewell:1"}, **SHORT)
    assert run.end_of("server")[0] in (137, -9)
    run.start("server")
    assert run.end_of("clinic-0")[0] == run.end_of("server")[0] == 0
    assert run.report()["complete"]


def test_a_client_that_was_killed_at_its_goodbye_and_comes_back_to_a_run_that_ends(town: Callable[..., Town]) -> None:
    """The server ends before it could resume: everything was done, so it ends soon, and with 0."""
    run = town(2, pause={"server": "goodbye-before-farewell:1:20"}, **SHORT)
    run.wait_until_it_says("server", "paused at")
    time.sleep(0.5)  # it has written by then that this client has finished
    run.processes["server"].kill()
    (done,) = [event["client_id"] for event in run.events("client_done")]
    (other,) = set(run.names) - {done}
    run.processes[other].send_signal(signal.SIGSTOP)
    run.processes[done].kill()
    run.processes[done].wait(10)
    run.start("server")
    run.start(done)
    run.wait_until_it_says(done, "joined run")
    run.processes[done].send_signal(signal.SIGSTOP)
    run.processes[other].send_signal(signal.SIGCONT)
    assert [run.end_of(name)[0] for name in (other, "server")] == [0, 0]
    run.processes[done].send_signal(signal.SIGCONT)
    assert run.end_of(done)[0] == 0, run.processes[done].said()
    assert run.verdict().problems == []
