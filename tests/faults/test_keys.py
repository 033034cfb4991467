"""Keys between real processes: who is let in trains, who is not is told why within ten seconds, and never trains."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.town import Town

from splitfl.transport.keys import AllowList, Enrolment, authorize, keygen, read_key_pair, revoke, write_enrolment

pytestmark = pytest.mark.slow

SOON_S = 50.0  # ten seconds, and a Python that has to start beside others


class Office:
    """Keys of a server and its clients."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = folder / "keys-server"
        keygen(self.server)

    def enrol(self, town: Town, name: str, *, admits: bool = True, server_key: str = "", client_id: str = "") -> None:
        keys = self.folder / f"keys-{name}"
        public = keygen(keys).public
        if admits:
            authorize(self.server, name, public)
        enrolment = self.folder / f"{name}.enrolment.toml"
        write_enrolment(
            enrolment,
            Enrolment(
                server_address=f"tcp://127.0.0.1:{town.port}",
                server_public_key=server_key or read_key_pair(self.server).public,
                client_id=client_id or name,
                client_public_key=public,
                pinned=AllowList(self.server).keys(),
            ),
        )
        lines = (
            town.config(name)
            .read_text()
            .replace("[client]\n", f"[client]\nkeys = '{keys}'\nenrolment = '{enrolment}'\n")
        )
        town.config(name).write_text(lines)


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


@pytest.fixture
def locked_town(town: Callable[..., Town], office: Office) -> Callable[..., Town]:
    def make(clients: int, **settings: Any) -> Town:
        return town(clients, starts=False, server__keys=office.server, **settings)

    return make


def test_with_keys_they_train(locked_town: Callable[..., Town], office: Office) -> None:
    run = locked_town(2, federation__num_rounds=1, federation__local_steps=4)
    for name in run.names:
        office.enrol(run, name)
    for name in ("server", *run.names):
        run.start(name)
    assert [run.end_of(name)[0] for name in ("server", *run.names)] == [0, 0, 0]
    assert run.verdict().problems == []


def test_whoever_is_not_let_in_is_told_why(locked_town: Callable[..., Town], office: Office) -> None:
    run = locked_town(5, federation__min_available_clients=1, federation__local_steps=40_000)
    stranger = keygen(office.folder / "keys-other").public
    office.enrol(run, "clinic-0")
    office.enrol(run, "clinic-1", admits=False)
    office.enrol(run, "clinic-2", server_key=stranger)
    office.enrol(run, "clinic-3")
    plain = run.config("clinic-3").read_text().replace("keys = ", "# keys = ").replace("enrolment = ", "# enrolment = ")
    run.config("clinic-3").write_text(plain)
    run.start("server")
    run.start("clinic-0")
    run.wait_for("step", 3)
    for name, code, says in (
        ("clinic-1", 8, "does not let this client's key in"),
        ("clinic-2", 7, "server key is not this server's"),
        ("clinic-3", 7, "may want keys"),
    ):
        begun = time.monotonic()
        run.start(name)
        ended, said = run.end_of(name, timeout_s=SOON_S)
        assert (ended, says in said) == (code, True), said
        assert time.monotonic() - begun < SOON_S
    assert {event["client_id"] for event in run.events("step")} == {"clinic-0"}


def test_a_client_that_is_revoked_in_the_middle(locked_town: Callable[..., Town], office: Office) -> None:
    run = locked_town(
        2, federation__num_rounds=1, federation__local_steps=20, pause={"clinic-0": "step-before-record:10:60"}
    )
    for name in run.names:
        office.enrol(run, name)
    for name in ("server", *run.names):
        run.start(name)
    run.wait_until_it_pauses("clinic-0")  # so that the run is not over meanwhile
    revoke(office.server, "clinic-1")
    begun = time.monotonic()
    code, said = run.end_of("clinic-1", timeout_s=10)
    assert (code, "splitfl authorize" in said) == (8, True), said
    assert time.monotonic() - begun < 10
    (left,) = [event for event in run.events("client_left") if event["client_id"] == "clinic-1"]
    assert left["reason"] == "its key was revoked"
    run.go_on("clinic-0")
    assert [run.end_of(name)[0] for name in ("server", "clinic-0")] == [0, 0]


def test_another_name_than_the_keys(locked_town: Callable[..., Town], office: Office) -> None:
    run = locked_town(2, federation__min_available_clients=1, federation__local_steps=200)
    for name in run.names:
        office.enrol(run, name)
    run.config("clinic-1").write_text(run.config("clinic-1").read_text().replace("'clinic-1'", "'clinic-0'"))
    run.start("server")
    run.start("clinic-1")
    code, said = run.end_of("clinic-1", timeout_s=SOON_S)
    assert (code, "client.client_id is clinic-0, but" in said) == (2, True), said
    enrolment = office.folder / "clinic-1.enrolment.toml"
    enrolment.write_text(enrolment.read_text().replace('"clinic-1"', '"clinic-0"', 1))
    run.start("clinic-1")
    code, said = run.end_of("clinic-1", timeout_s=SOON_S)
    assert (code, "KEY_MISMATCH" in said) == (8, True), said
