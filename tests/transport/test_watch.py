"""A message without end is cut off; a peer that keeps the rules is not, however late the server is."""

import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port
from transport.keyed import keyed

from benchmarks.proxy import ChaosProxy
from splitfl.errors import PeerGone
from splitfl.transport.keys import AllowList, KeyPair, authorize, keygen
from splitfl.transport.security import ClientSecurity, ServerSecurity
from splitfl.transport.tcp_info import counters, is_supported
from splitfl.transport.zeromq import Arrived, Cut, Endpoint, Listener

pytestmark = pytest.mark.skipif(not is_supported(), reason="only Linux tells what a connection has received")

FRAME_BYTES = 1 << 18
OPTIONS: dict[str, Any] = {"max_frame_bytes": FRAME_BYTES, "heartbeat_interval": 60.0, "heartbeat_timeout": 120.0}
MAX_QUEUED = 10
# a micro-batch of 8 x 512 positions, 576 wide, float32, and its header
ACTIVATIONS = [bytes(300), *[bytes(FRAME_BYTES)] * 36]
STALL_S = 2.0


@pytest.fixture(params=["tcp", "tcp with keys"])
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Listener, dict[str, Any]]]:
    server, client = keyed(tmp_path) if request.param == "tcp with keys" else (None, None)
    address = f"tcp://127.0.0.1:{free_port()}"
    with Listener(address, security=server, max_queued=MAX_QUEUED, **OPTIONS) as listener:
        listener.bound_messages(num_bytes=sum(map(len, ACTIVATIONS)), num_frames=len(ACTIVATIONS))
        yield listener, {"security": client, **OPTIONS}


def next_of(listener: Listener, timeout_s: float = 20.0) -> Arrived:
    deadline_s = time.monotonic() + timeout_s
    while (found := listener.recv(0.2)) is None:
        assert time.monotonic() < deadline_s, "nothing came"
    assert found.intact
    return found


def cuts_within(listener: Listener, seconds: float) -> list[Cut]:
    """Run the server's loop for a while."""
    cuts: list[Cut] = []
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s and not cuts:
        listener.recv(0.05)
        cuts += listener.sweep()
    return cuts


@pytest.mark.parametrize("num_messages", [2, MAX_QUEUED + 4])
def test_a_stalled_loop_cuts_nobody(ends: tuple[Listener, dict[str, Any]], num_messages: int) -> None:
    """Two micro-batches in flight, and more than the queue takes, while the socket's thread does something else."""
    listener, options = ends
    with Endpoint(listener.address, **options) as endpoint:
        endpoint.send([b"hello"])
        next_of(listener)
        for _ in range(2):
            assert listener.recv(0.05) is None  # not late, as far as it knows
            for _ in range(num_messages):
                endpoint.send(ACTIVATIONS)
            time.sleep(STALL_S / 2)
            for _ in range(num_messages):
                assert next_of(listener).frames == ACTIVATIONS
        assert cuts_within(listener, 0.5) == []


def test_a_loop_that_is_always_late_cuts_nobody(ends: tuple[Listener, dict[str, Any]]) -> None:
    """A server that takes a message every 50 ms, as one under load does."""
    listener, options = ends
    with Endpoint(listener.address, **options) as endpoint:
        for _ in range(20):
            endpoint.send(ACTIVATIONS)
        for _ in range(20):
            time.sleep(0.05)
            assert next_of(listener).frames == ACTIVATIONS
        assert listener.sweep() == []


def test_framing_of_small_frames_is_no_excess(ends: tuple[Listener, dict[str, Any]]) -> None:
    """A message of 10 MB in frames of 4 KiB, slow enough to be looked at on its way."""
    listener, options = ends
    frames = [bytes(1 << 12)] * 2_500
    listener.bound_messages(num_bytes=sum(map(len, frames)), num_frames=len(frames))
    proxy = ChaosProxy(int(listener.address.rsplit(":", 1)[1]))
    proxy.harm["up"].bytes_per_second = 5e6
    with Endpoint(f"tcp://127.0.0.1:{proxy.port}", **options) as endpoint:
        endpoint.send(frames)
        assert len(next_of(listener).frames) == len(frames)
    assert listener.sweep() == []
    proxy.close()


@pytest.mark.slow
def test_a_large_upload_over_a_slow_link_is_not_cut(ends: tuple[Listener, dict[str, Any]]) -> None:
    """The embedding of SmolLM2, 113 MB, at 10 MB/s."""
    listener, options = ends
    frames = [bytes(300), *[bytes(FRAME_BYTES)] * 432]
    listener.bound_messages(num_bytes=sum(map(len, frames)), num_frames=len(frames))
    proxy = ChaosProxy(int(listener.address.rsplit(":", 1)[1]))
    proxy.harm["up"].bytes_per_second = 1e7
    with Endpoint(f"tcp://127.0.0.1:{proxy.port}", **options) as endpoint:
        endpoint.send(frames)
        assert len(next_of(listener, 50.0).frames) == len(frames)
    assert listener.sweep() == []
    proxy.close()


@pytest.mark.parametrize("is_stalled", [False, True])
def test_a_message_without_end_is_cut_off(is_stalled: bool) -> None:
    """Soon while the loop runs; while it stands still, at what could be waiting by right."""
    with Listener(f"tcp://127.0.0.1:{free_port()}", max_queued=MAX_QUEUED, **OPTIONS) as listener:
        listener.bound_messages(num_bytes=1 << 20, num_frames=8)
        pouring = _Pouring(int(listener.address.rsplit(":", 1)[1]))
        cuts = [] if is_stalled else cuts_within(listener, 10.0)
        pouring.join(10.0)
        assert not pouring.is_alive()
        cuts += cuts_within(listener, 1.0)
        assert [cut.address for cut in cuts] == ["127.0.0.1"]
        assert (1 << 20) < cuts[0].num_bytes < (MAX_QUEUED + 3) << 20
        with Endpoint(listener.address, **OPTIONS) as endpoint:
            endpoint.send([b"still here"])
            assert next_of(listener).frames == [b"still here"]


class _Pouring(threading.Thread):
    """Sends frames that all say that more will come (ZMTP 3.1), 20 MB a second, until it is cut off or 200 MB went."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self.start()

    def run(self) -> None:
        frame = b"\x03" + struct.pack(">Q", 1 << 17) + bytes(1 << 17)
        ready = b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
        with socket.create_connection(("127.0.0.1", self._port), timeout=10) as connection:
            connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31))
            connection.recv(64)
            connection.sendall(b"\x04" + bytes([len(ready)]) + ready)
            try:
                for _ in range(1600):
                    connection.sendall(frame)
                    time.sleep(0.006)
            except OSError:
                return


def test_one_key_does_not_take_all_connections(tmp_path: Path) -> None:
    """Its oldest are ended when it has more than any client needs; another client's stay."""
    pair, own, other = (keygen(tmp_path / name) for name in ("server", "mallory", "clinic"))
    for name, key in (("mallory", own), ("clinic-a", other)):
        authorize(tmp_path / "server", name, key.public)
    server = ServerSecurity(key_pair=pair, allow_list=AllowList(tmp_path / "server"))
    address = f"tcp://127.0.0.1:{free_port()}"

    def connect(key: KeyPair) -> Endpoint:
        return Endpoint(address, security=ClientSecurity(key_pair=key, server_public_key=pair.public), **OPTIONS)

    with Listener(address, security=server, max_queued=MAX_QUEUED, **OPTIONS) as listener, ExitStack() as stack:
        honest = stack.enter_context(connect(other))
        honest.send([b"hello"])
        next_of(listener)
        many = [stack.enter_context(connect(own)) for _ in range(80)]
        cuts: list[Cut] = []
        for endpoint in many:
            endpoint.send([b"hello"])
            next_of(listener)
            cuts += listener.sweep()
        cuts += cuts_within(listener, 1.0)
        assert {cut.user_id for cut in cuts if cut.num_connections > 64} == {own.public}
        lost = 0
        for endpoint in many:
            with suppress(PeerGone):
                endpoint.recv(0.02)
                continue
            lost += 1
        assert lost == 16
        honest.send([b"still here"])
        assert next_of(listener).frames == [b"still here"]


def test_a_look_at_a_descriptor_that_is_anothers_by_now_keeps_no_lock(tmp_path: Path) -> None:
    """A connection that is closed gives its number to the next file, which may be a lock that is given back."""
    stopping = threading.Event()
    path = tmp_path / "lock"
    number = os.open(path, os.O_RDWR | os.O_CREAT)
    os.close(number)

    def look() -> None:
        while not stopping.is_set():
            counters(number)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(500):
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.close(descriptor)
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
