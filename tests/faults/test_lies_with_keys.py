"""An authorised client that lies, with keys as between two machines: a row each in docs/reliability.md."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import pytest
import zmq
from faults.lying_client import Liar
from faults.test_keys import Office
from faults.town import Town

from splitfl.errors import PeerGone
from splitfl.protocol import codec
from splitfl.protocol.messages import (
    WIRE_VERSION,
    Attach,
    Backward,
    Goodbye,
    Hello,
    Leave,
    Message,
    Ready,
    Refusal,
    Report,
    Resume,
)
from splitfl.transport.keys import authorize, keygen, read_enrolment, read_key_pair
from splitfl.transport.security import ClientSecurity, secure_client

pytestmark = pytest.mark.slow

LONG: dict[str, Any] = {
    "federation__min_available_clients": 1,
    "federation__num_rounds": 1,
    "federation__local_steps": 30_000,
}
STEPS = 150
CONNECTIONS = 300
MARKUP = "[/bold][red]{x}%s\x1b[2J\u202e<script>"


Guarded: TypeAlias = tuple[Town, Callable[..., Liar]]


@pytest.fixture
def guarded(town: Callable[..., Town], tmp_path: Path) -> Iterator[Callable[..., Guarded]]:
    """Start a server with keys and one honest clinic; the second value connects a liar with a key of its own."""
    office = Office(tmp_path)
    with ExitStack() as stack:

        def start(**settings: Any) -> Guarded:
            run = town(1, starts=False, server__keys=office.server, **{**LONG, **settings})
            office.enrol(run, "clinic-0")
            public = keygen(tmp_path / "keys-mallory").public
            authorize(office.server, "mallory", public)
            enrolment = tmp_path / "clinic-0.enrolment.toml"  # the server's key is what is read of it

            def connect(name: str = "mallory") -> Liar:
                return stack.enter_context(
                    Liar(run.port, name, run.model, keys=tmp_path / "keys-mallory", enrolment=enrolment)
                )

            for name in ("server", "clinic-0"):
                run.start(name)
            run.wait_for("step", 3)
            return run, connect

        yield start


def honest_ends_well(run: Town) -> None:
    for name in ("server", "clinic-0"):
        code, said = run.end_of(name)
        assert code == 0, f"{name}: {said}"
        assert "Traceback" not in run.processes[name].said()
    steps = [event["step"] for event in run.events("step") if event["client_id"] == "clinic-0"]
    assert steps == list(range(1, STEPS + 1))
    assert {event["client_id"] for event in run.events("violation")} <= {"mallory"}
    assert run.verdict().problems == []


def goes_on(run: Town) -> None:
    """The honest one trains, nobody but the liar was struck, and the server has said nothing but sentences."""
    count = len(run.events("step"))
    run.wait_for("step", count + 5, timeout_s=20)
    assert {event["client_id"] for event in run.events("violation")} <= {"mallory"}
    assert "clinic-0" not in {event["client_id"] for event in run.events("client_lost")}
    assert "Traceback" not in run.processes["server"].said()


def test_connections_without_number(guarded: Callable[..., Guarded], tmp_path: Path) -> None:
    """Each says something that is refused, and would stay open."""
    run, _ = guarded()
    server = psutil.Process(run.processes["server"].pid)
    before = server.num_fds()
    own, enrolment = read_key_pair(tmp_path / "keys-mallory"), read_enrolment(tmp_path / "clinic-0.enrolment.toml")
    security = ClientSecurity(key_pair=own, server_public_key=enrolment.server_public_key)
    word = codec.encode(Goodbye(metrics={}))
    with zmq.Context() as context, ExitStack() as stack:
        for _ in range(CONNECTIONS):
            each = stack.enter_context(context.socket(zmq.DEALER))
            each.setsockopt(zmq.LINGER, 0)
            each.setsockopt(zmq.RECONNECT_IVL, -1)
            secure_client(each, security)
            each.connect(f"tcp://127.0.0.1:{run.port}")
            each.send_multipart(word)
        deadline = time.monotonic() + 45  # one whose handshake came to nothing counts as silent, for 30 s
        while not run.events("note") or server.num_fds() - before > 70:
            assert time.monotonic() < deadline, f"{server.num_fds() - before} descriptors more than before"
            time.sleep(0.1)
        assert "mallory has" in run.events("note")[0]["text"]
        goes_on(run)
        run.processes["clinic-0"].kill()
        run.processes["clinic-0"].wait(10)
        run.start("clinic-0")  # it finds a place
        run.wait_for("client_returned", 1, timeout_s=30)


def test_what_is_another_clients_or_nobodys(guarded: Callable[..., Guarded]) -> None:
    """Before joining, in another's name, with another's token; nobody is struck for a message without a session."""
    run, connect = guarded()
    before_hello: list[Message] = [
        Goodbye(metrics={}),
        Leave(reason=MARKUP, comes_back=False),
        Ready(round_number=0, num_examples=1 << 62),
        Resume(held_round=1, step=1, commit_number=1, pending_step=0),
        Attach(session=MARKUP),
    ]
    for message in before_hello:
        liar = connect()
        liar.say(message)
        assert liar.refusal().code == "NO_SESSION"
    liar = connect("clinic-0")
    liar.say(Hello(wire_version=WIRE_VERSION, software=MARKUP, client_id="clinic-0"))
    assert liar.refusal().code == "KEY_MISMATCH"
    liar = connect()
    liar.say(Hello(wire_version=WIRE_VERSION + 1, software=MARKUP, client_id="mallory"))
    assert liar.refusal().code == "VERSION_MISMATCH"
    assert run.events("violation") == []
    goes_on(run)


def test_words_that_steer_a_terminal_a_log_or_a_page(
    guarded: Callable[..., Guarded],
) -> None:
    run, connect = guarded(federation__local_steps=STEPS, federation__step_timeout=4)
    usual: dict[str, Any] = {"phase": "before", "round_number": 0, "metrics": {}, "digest": ""}
    liar = connect().join()
    liar.resume()
    liar.say(Report(**{**usual, "topic": MARKUP}))
    assert liar.refusal().code == "VIOLATION"
    liar = connect().join()
    liar.say_on_control(Leave(reason=MARKUP * 100, comes_back=False))
    liar.resume()
    liar = connect().join()
    liar.resume()
    liar.say(Report(**{**usual, "topic": "evaluated", "metrics": {MARKUP: 1.0}}))
    assert liar.refusal().code == "VIOLATION"
    honest_ends_well(run)
    said = run.processes["server"].said() + run.processes["server"].printed()
    assert "\x1b[2J" not in said
    assert "\u202e" not in said
    assert "<script>" not in (run.run_dir / "report.html").read_text()


def test_who_is_kept_out_fills_no_log(guarded: Callable[..., Guarded]) -> None:
    run, connect = guarded()
    for number in range(3):
        liar = connect().join()
        liar.resume()
        liar.say(Backward(request_id=number, gradient_BSD=liar.forward(1).hidden_BSD))
        assert liar.refusal().code == ("QUARANTINED" if number == 2 else "VIOLATION")
    liar = connect()
    liar.say(Hello(wire_version=WIRE_VERSION, software="liar", client_id="mallory"))
    assert liar.refusal().code == "QUARANTINED"
    before = len(run.processes["server"].said())
    for _ in range(300):
        with suppress(PeerGone):
            liar.endpoint.send([b"\xc1 no header"])
            liar.hear(0.0)
    while isinstance(liar.hear(1.0), Refusal):
        pass
    goes_on(run)
    assert len(run.events("violation")) == 3
    said = run.processes["server"].said()[before:]
    assert len([line for line in said.splitlines() if "broke a rule" in line]) == 0
