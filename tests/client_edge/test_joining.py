"""A server that is not there: the check says so at once, and the client says what it is trying."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port

from client_edge.connection.connection import Connection
from client_edge.consent.gate import OpenGate
from splitfl.command_line import main
from splitfl.config.own import ClientSection, PolicySection
from splitfl.errors import PeerGone
from splitfl.transport.keys import Enrolment, keygen, write_enrolment


def client(folder: Path, **more: Any) -> ClientSection:
    return ClientSection(client_id="clinic", output_dir=folder, **more)


def nobody(folder: Path) -> tuple[ClientSection, str]:
    address = f"tcp://127.0.0.1:{free_port()}"
    return client(folder, server_address=address), "nobody listens there"


def no_such_name(folder: Path) -> tuple[ClientSection, str]:
    own, server = keygen(folder / "keys"), keygen(folder / "server")
    enrolment = Enrolment(
        server_address="tcp://gpu-box.invalid:5555",
        server_public_key=server.public,
        client_id="clinic",
        client_public_key=own.public,
        pinned={},
    )
    write_enrolment(folder / "clinic.toml", enrolment)
    named = client(folder, keys=folder / "keys", enrolment=folder / "clinic.toml")
    return named, "the name gpu-box.invalid is not known here"


def no_proxy(folder: Path) -> tuple[ClientSection, str]:
    proxy = f"127.0.0.1:{free_port()}"
    return client(folder, server_address="tcp://127.0.0.1:5555", socks_proxy=proxy), f"the SOCKS proxy {proxy} cannot"


def gate(section: ClientSection) -> OpenGate:
    return OpenGate(section, PolicySection())


CASES = [nobody, no_such_name, no_proxy]


@pytest.mark.parametrize("case", CASES)
def test_a_check_says_it_at_once(tmp_path: Path, case: Callable[[Path], tuple[ClientSection, str]]) -> None:
    section, says = case(tmp_path)
    begun_s = time.monotonic()
    with pytest.raises(PeerGone, match=says) as caught:
        Connection(section, gate(section), is_patient=False)
    assert time.monotonic() - begun_s < 10.0  # and not client.connect_timeout, a minute
    assert caught.value.exit_code == 7
    assert "is the server running, and is this its address?" in str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_a_client_says_what_it_is_trying(tmp_path: Path, case: Callable[[Path], tuple[ClientSection, str]]) -> None:
    section, says = case(tmp_path)
    said: list[tuple[float, str]] = []
    begun_s = time.monotonic()
    patient = section.model_copy(update={"connect_timeout": 2.0})
    with pytest.raises(PeerGone, match=says):
        Connection(patient, gate(patient), tell=lambda text: said.append((time.monotonic() - begun_s, text)))
    assert 1.5 < time.monotonic() - begun_s < 15.0
    ((at_s, text),) = said  # and again after ten seconds
    assert 0.9 < at_s < 2.0
    assert "trying for up to 2 s" in text
    assert says.replace("there", f"at {section.server_address} yet") in text


def test_the_command_ends_with_7(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "text.txt"
    data.write_text("abc\n" * 20, encoding="utf-8")
    config = tmp_path / "client.toml"
    address = f"tcp://127.0.0.1:{free_port()}"
    config.write_text(
        f"[client]\nclient_id = 'clinic'\nserver_address = '{address}'\n[data]\npath = '{data}'\n", encoding="utf-8"
    )
    begun_s = time.monotonic()
    assert main(["check", "--config", str(config)]) == 7
    assert time.monotonic() - begun_s < 20.0
    assert f"no answer from {address} (nobody listens there)" in capsys.readouterr().err


def test_a_proxy_that_is_not_there_does_not_kill_the_process() -> None:
    """ZeroMQ ends a process with an assertion when it closes a socket whose proxy refused (4.3.5, epoll.cpp)."""
    program = (
        "from splitfl.errors import PeerGone\n"
        "from splitfl.transport.zeromq import Endpoint\n"
        "for _ in range(5):\n"
        "    try:\n"
        "        Endpoint('tcp://127.0.0.1:5555', max_frame_bytes=1 << 16, heartbeat_interval=1.0,\n"
        f"                 heartbeat_timeout=2.0, socks_proxy='127.0.0.1:{free_port()}').close()\n"
        "    except PeerGone as gone:\n"
        "        print(gone)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("nobody listens there") == 5


def test_a_server_that_comes_later_is_found(tmp_path: Path) -> None:
    """It is bound and not yet serving, as one that loads its model: the client waits, and says what for."""
    from splitfl.transport.zeromq import Listener

    address = f"tcp://127.0.0.1:{free_port()}"
    said: list[str] = []
    ended: list[str] = []

    def join() -> None:
        try:
            section = client(tmp_path, server_address=address, connect_timeout=2.0)
            Connection(section, gate(section), tell=said.append)
        except PeerGone as gone:
            ended.append(str(gone))

    with Listener(address, max_frame_bytes=1 << 16, heartbeat_interval=1.0, heartbeat_timeout=2.0):
        thread = threading.Thread(target=join)
        thread.start()
        thread.join(10.0)
    assert len(said) == len(ended) == 1
    assert "has not answered yet" in said[0] or "connected" in said[0]
    assert "nobody listens" not in ended[0]
