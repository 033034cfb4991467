"""What a server sends without end, or ahead of what it was asked for, fills no memory of a client."""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port
from transport.keyed import keyed

from splitfl.errors import PeerGone, RemoteProtocolError
from splitfl.transport.tcp_info import is_supported
from splitfl.transport.zeromq import Endpoint, Listener

pytestmark = pytest.mark.skipif(not is_supported(), reason="only Linux tells what a connection has received")

FRAME = bytes(1 << 18)
OPTIONS: dict[str, Any] = {"max_frame_bytes": len(FRAME), "heartbeat_interval": 60.0, "heartbeat_timeout": 120.0}
MESSAGE_BYTES, WAITING_BYTES = 4 << 20, 16 << 20
ENDLESS = 4000
"""Frames of a message of a gigabyte."""


class Liar:
    """A server that says what a test says, to the client that has said something."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def hears(self) -> None:
        arrived = self._listener.recv(5.0)
        assert arrived is not None
        self._peer = arrived.peer

    def says(self, num_frames: int) -> None:
        self._listener.send(self._peer, [FRAME] * num_frames)


@pytest.fixture(params=["tcp", "tcp with keys"])
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Liar, Endpoint]]:
    server, client = keyed(tmp_path) if request.param == "tcp with keys" else (None, None)
    address = f"tcp://127.0.0.1:{free_port()}"
    with (
        Listener(address, security=server, max_queued=1000, **OPTIONS) as listener,
        Endpoint(address, security=client, **OPTIONS) as endpoint,
    ):
        endpoint.bound_messages(
            num_bytes=MESSAGE_BYTES, num_frames=MESSAGE_BYTES // len(FRAME) + 1, num_waiting_bytes=WAITING_BYTES
        )
        endpoint.send([b"hello"])
        liar = Liar(listener)
        liar.hears()
        yield liar, endpoint


def received(endpoint: Endpoint) -> int:
    found = endpoint.on_the_wire()
    return found.received if found is not None else 0


def take_all(endpoint: Endpoint) -> None:
    while endpoint.recv(5.0) is not None:
        pass


def test_a_message_without_end_ends_the_connection(ends: tuple[Liar, Endpoint]) -> None:
    liar, endpoint = ends
    liar.says(ENDLESS)
    with pytest.raises(RemoteProtocolError, match="without the end of a message, and"):
        endpoint.recv(10.0)
    assert received(endpoint) < ENDLESS * len(FRAME) * 0.8


def test_so_does_one_that_comes_while_nobody_reads(ends: tuple[Liar, Endpoint]) -> None:
    liar, endpoint = ends
    liar.says(1)
    while endpoint.recv(0.05) is None:
        pass
    liar.says(ENDLESS)
    time.sleep(1.0)
    assert received(endpoint) < WAITING_BYTES + (200 << 20)
    with pytest.raises(RemoteProtocolError, match="without the end of a message, and"):
        endpoint.recv(1.0)


def test_and_more_messages_than_may_wait(ends: tuple[Liar, Endpoint]) -> None:
    liar, endpoint = ends
    liar.says(1)
    while endpoint.recv(0.05) is None:
        pass
    with suppress(PeerGone):  # it is cut off before it has said all
        for _ in range(300):
            liar.says(12)
    time.sleep(1.0)
    assert received(endpoint) < WAITING_BYTES + (200 << 20)
    with pytest.raises(RemoteProtocolError):
        take_all(endpoint)


def test_a_whole_message_that_is_too_large_is_refused(ends: tuple[Liar, Endpoint]) -> None:
    liar, endpoint = ends
    liar.says(MESSAGE_BYTES // len(FRAME) + 4)
    with pytest.raises(RemoteProtocolError, match="a message of"):
        take_all(endpoint)


def test_what_may_wait_waits(ends: tuple[Liar, Endpoint]) -> None:
    """Several legal messages, while the client computes for longer than any settling takes."""
    liar, endpoint = ends
    for _ in range(2):
        for _ in range(3):
            liar.says(15)
        time.sleep(0.8)
        for _ in range(3):
            got = endpoint.recv(5.0)
            assert got is not None
            assert len(got) == 15
        assert endpoint.recv(0.05) is None
