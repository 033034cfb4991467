"""One contract for every transport: order, whole messages, deadlines, and errors that say what to do."""

import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port
from transport.keyed import keyed
from transport.relay import Relay

from benchmarks.proxy import ChaosProxy
from splitfl.errors import LocalProtocolError, PeerGone, TransportError
from splitfl.transport.address import check_address
from splitfl.transport.security import ClientSecurity, ServerSecurity
from splitfl.transport.zeromq import Endpoint, Listener

# Heartbeats would be counted by the proxy and by nobody else, so none falls into a test.
OPTIONS: dict[str, Any] = {"max_frame_bytes": 1 << 20, "heartbeat_interval": 60.0, "heartbeat_timeout": 120.0}
SOON_S = 5.0
ON_TCP = ["tcp", "tcp with keys"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the two ends of a contract meet, and the keys that they bring."""

    address: str
    server: ServerSecurity | None = None
    client: ClientSecurity | None = None

    @property
    def is_on_tcp(self) -> bool:
        return self.address.startswith("tcp")

    def listen(self, **more: Any) -> Listener:
        return Listener(self.address, security=self.server, **{**OPTIONS, **more})

    def connect(self, address: str = "") -> Endpoint:
        return Endpoint(address or self.address, security=self.client, **OPTIONS)


@pytest.fixture(params=["inproc", *ON_TCP, "ipc"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    match request.param:
        case "inproc":
            return Place(address=f"inproc://{tmp_path}")
        case "ipc":
            return Place(address=f"ipc://{tmp_path}/socket")
        case "tcp":
            return Place(address=f"tcp://127.0.0.1:{free_port()}")
    server, client = keyed(tmp_path)
    return Place(address=f"tcp://127.0.0.1:{free_port()}", server=server, client=client)


@pytest.fixture
def listener(place: Place) -> Iterator[Listener]:
    with place.listen(max_queued=1000) as listener:
        yield listener


@pytest.fixture
def endpoint(place: Place, listener: Listener) -> Iterator[Endpoint]:
    with place.connect() as endpoint:
        yield endpoint


def arrived(listener: Listener) -> tuple[bytes, list[bytes]]:
    found = listener.recv(SOON_S)
    assert found is not None, "nothing came"
    assert found.intact
    return found.peer, [bytes(frame) for frame in found.frames]


def answered(endpoint: Endpoint) -> list[bytes]:
    frames = endpoint.recv(SOON_S)
    assert frames is not None, "nothing came"
    return [bytes(frame) for frame in frames]


def soon_bound(place: Place) -> Listener:
    """Bind, waiting a moment for a socket that was just closed: ZeroMQ does that in a thread of its own."""
    deadline = time.monotonic() + SOON_S
    while True:
        try:
            return place.listen()
        except TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def keep_sending(listener: Listener, peer: bytes, frames: list[bytes], *, pause_s: float = 0.0) -> None:
    deadline = time.monotonic() + SOON_S
    while time.monotonic() < deadline:
        listener.send(peer, frames)
        if pause_s:
            time.sleep(pause_s)


class TestContract:
    def test_messages_keep_their_order_both_ways(self, listener: Listener, endpoint: Endpoint) -> None:
        for number in range(200):
            endpoint.send([b"%d" % number, b"x" * number])
        peer = b""
        for number in range(200):
            peer, frames = arrived(listener)
            assert frames == [b"%d" % number, b"x" * number]
        for number in range(200):
            listener.send(peer, [b"%d" % number])
        assert [answered(endpoint) for _ in range(200)] == [[b"%d" % number] for number in range(200)]

    @pytest.mark.parametrize("num_bytes", [OPTIONS["max_frame_bytes"] - 33, OPTIONS["max_frame_bytes"]])
    def test_the_largest_frame_passes_both_ways(self, listener: Listener, endpoint: Endpoint, num_bytes: int) -> None:
        """Keys add 33 bytes to a frame, and ZeroMQ counts them: a limit without them cut every full frame off."""
        frames = [b"header", os.urandom(num_bytes)]
        for _ in range(3):
            endpoint.send(frames)
            peer, got = arrived(listener)
            assert got == frames
            listener.send(peer, frames)
            assert answered(endpoint) == frames

    @pytest.mark.parametrize("place", ON_TCP, indirect=True)
    def test_a_frame_beyond_the_limit_ends_the_connection(self, place: Place, listener: Listener) -> None:
        with place.connect() as endpoint:
            endpoint.send([bytes(OPTIONS["max_frame_bytes"] + 1)])
            assert listener.recv(0.5) is None
        with place.connect() as other:
            other.send([b"still here"])
            assert arrived(listener)[1] == [b"still here"]

    def test_large_messages_come_whole(self, listener: Listener, endpoint: Endpoint) -> None:
        frames = [b"header", *(os.urandom(OPTIONS["max_frame_bytes"]) for _ in range(3)), b"end"]
        endpoint.send(frames)
        peer, got = arrived(listener)
        assert got == frames
        listener.send(peer, frames)
        assert answered(endpoint) == frames

    def test_empty_frames_stay(self, listener: Listener, endpoint: Endpoint) -> None:
        endpoint.send([b"", b"a", b""])
        peer, frames = arrived(listener)
        assert frames == [b"", b"a", b""]
        listener.send(peer, [b""])
        assert answered(endpoint) == [b""]

    def test_buffers_of_any_kind(self, listener: Listener, endpoint: Endpoint) -> None:
        large = memoryview(bytes(100_000) + b"end")
        endpoint.send([b"x", memoryview(b"yz")[1:], large])
        assert arrived(listener)[1] == [b"x", b"z", bytes(large)]

    def test_many_peers_get_their_own_answers(self, place: Place, listener: Listener, endpoint: Endpoint) -> None:
        with place.connect() as other:
            endpoint.send([b"one"])
            other.send([b"two"])
            peers = {frames[0]: peer for peer, frames in (arrived(listener), arrived(listener))}
            for name, peer in peers.items():
                listener.send(peer, [b"for " + name])
            assert answered(endpoint) == [b"for one"]
            assert answered(other) == [b"for two"]

    def test_a_wait_ends(self, listener: Listener, endpoint: Endpoint) -> None:
        for wait in (endpoint.recv, listener.recv):
            begun = time.monotonic()
            assert wait(0.05) is None
            assert 0.04 <= time.monotonic() - begun < SOON_S

    def test_another_thread_can_wake_the_listener(self, listener: Listener) -> None:
        waker = threading.Timer(0.1, listener.wake)
        waker.start()
        begun = time.monotonic()
        assert listener.recv(60.0) is None
        assert time.monotonic() - begun < SOON_S
        waker.join()

    def test_being_woken_loses_no_message(self, listener: Listener, endpoint: Endpoint) -> None:
        for _ in range(10_000):
            listener.wake()
        endpoint.send([b"x"])
        deadline = time.monotonic() + SOON_S
        while (found := listener.recv(0.1)) is None and time.monotonic() < deadline:
            pass
        assert found is not None
        assert bytes(found.frames[0]) == b"x"

    def test_closing_twice_and_waking_afterwards(self, listener: Listener, endpoint: Endpoint) -> None:
        for end in (endpoint, listener):
            end.close()
            end.close()
        listener.wake()

    def test_both_sides_count_the_same_bytes(self, place: Place, listener: Listener, endpoint: Endpoint) -> None:
        endpoint.send([b"", b"x" * 222, b"y" * 255, b"z" * 256, b"z" * 70_000])
        peer, _ = arrived(listener)
        if place.client is not None:  # 33 bytes more in each frame (RFC 26), and no checksum
            many, one = 35 + 257 + 297 + 298 + 70_042, 38
        else:
            checksum = 6 if place.is_on_tcp else 0
            many, one = 2 + 224 + 257 + 265 + 70_009 + checksum, 5 + checksum
        assert endpoint.traffic.sent == listener.traffic.received == many
        assert listener.send(peer, [b"abc"]) == one
        answered(endpoint)
        assert listener.traffic.sent == endpoint.traffic.received == one

    def test_an_endpoint_stays_in_its_thread(self, endpoint: Endpoint) -> None:
        errors: list[Exception] = []

        def use() -> None:
            for call in (lambda: endpoint.send([b"x"]), lambda: endpoint.recv(0.0)):
                try:
                    call()
                except LocalProtocolError as error:
                    errors.append(error)

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        assert [str(error) for error in errors] == ["an endpoint is used outside the thread that made it"] * 2

    def test_a_peer_that_is_not_there(self, listener: Listener) -> None:
        with pytest.raises(PeerGone, match="closed its connection"):
            listener.send(b"nobody", [b"x"])

    def test_a_peer_that_has_left(self, place: Place, listener: Listener) -> None:
        with place.connect() as short:
            short.send([b"x"])
            peer, _ = arrived(listener)
        with pytest.raises(PeerGone, match="closed its connection"):
            keep_sending(listener, peer, [b"x"], pause_s=0.01)

    def test_an_address_in_use(self, place: Place, listener: Listener) -> None:
        with pytest.raises(
            TransportError, match=r"is in use: stop the program that listens there or set server.address"
        ):
            place.listen()

    def test_an_address_is_free_again(self, place: Place) -> None:
        """At once, with answers still on their way: a server that is stopped is often started again."""
        bind = soon_bound if place.address.startswith("inproc") else Place.listen  # its context is everybody's
        for _ in range(30):
            with bind(place) as listener, place.connect() as endpoint:
                endpoint.send([b"question"])
                peer, frames = arrived(listener)
                assert frames == [b"question"]
                listener.send(peer, [b"answer" * 30_000])


class TestAddresses:
    @pytest.mark.parametrize(
        ("address", "reason"),
        [
            ("tcp://0.0.0.0:5555", "not on this machine, and there are no keys"),
            ("tcp://[::]:5555", "not on this machine"),
            ("tcp://*:5555", "not on this machine"),
            ("tcp://8.8.8.8:5555", "not on this machine"),
            ("tcp://192.168.0.1:5555", "not on this machine"),
            ("tcp://example.org:5555", "not on this machine"),
            ("tcp://localhost.example.org:5555", "not on this machine"),
            ("tcp://127.0.0.1", "a port from 1 to 65535"),
            ("tcp://127.0.0.1:0", "a port from 1 to 65535"),
            ("tcp://127.0.0.1:65536", "a port from 1 to 65535"),
            ("tcp://127.0.0.1:-1", "a port from 1 to 65535"),
            ("tcp://127.0.0.1:http", "a port from 1 to 65535"),
            ("tcp://127.0.0.1:5555/x", "a port from 1 to 65535"),
            ("tcp://::1:5555", "a port from 1 to 65535"),
            ("http://127.0.0.1:80", "write one of tcp://, ipc://, inproc://"),
            ("127.0.0.1:5555", "write one of tcp://, ipc://, inproc://"),
            ("ipc://", "write one of tcp://, ipc://, inproc://"),
            ("ipc://@name", "the path of a file"),
            ("ipc://*", "the path of a file"),
            ("", "write one of tcp://, ipc://, inproc://"),
        ],
    )
    def test_refused_with_the_reason(self, address: str, reason: str) -> None:
        for use in (
            check_address,
            lambda address: Listener(address, **OPTIONS),
            lambda address: Endpoint(address, **OPTIONS),
        ):
            with pytest.raises(TransportError, match=reason) as caught:
                use(address)
            assert repr(address) in str(caught.value)

    @pytest.mark.parametrize(
        "address",
        ["tcp://127.0.0.1:1", "tcp://127.1.2.3:65535", "tcp://localhost:80", "tcp://[::1]:80", "tcp://127.0.0.1:*"],
    )
    def test_loopback_is_allowed(self, address: str) -> None:
        check_address(address)

    def test_a_port_may_be_left_to_the_system(self) -> None:
        with Listener("tcp://127.0.0.1:*", **OPTIONS) as listener:
            check_address(listener.address)
            with Endpoint(listener.address, **OPTIONS) as endpoint:
                endpoint.send([b"x"])
                assert arrived(listener)[1] == [b"x"]
        with pytest.raises(TransportError, match="a client needs the server's port"):
            Endpoint("tcp://127.0.0.1:*", **OPTIONS)

    def test_localhost_is_loopback_here_too(self) -> None:
        address = f"tcp://localhost:{free_port()}"
        with Listener(address, **OPTIONS) as listener, Endpoint(address, **OPTIONS) as endpoint:
            endpoint.send([b"x"])
            assert arrived(listener)[1] == [b"x"]

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(TransportError, match="cannot listen on ipc://"):
            Listener(f"ipc://{tmp_path}/missing/socket", **OPTIONS)

    def test_only_the_owner_may_use_a_socket_file(self, tmp_path: Path) -> None:
        with Listener(f"ipc://{tmp_path}/socket", **OPTIONS):
            assert stat.S_IMODE((tmp_path / "socket").stat().st_mode) == 0o600

    def test_a_socket_file_left_behind_is_no_server(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as left_behind:
            left_behind.bind(str(tmp_path / "socket"))
        with Listener(f"ipc://{tmp_path}/socket", **OPTIONS) as listener:
            assert listener.recv(0.0) is None


# ZMTP 3.1: a greeting of 64 bytes, then one READY command with the socket type and an identity, whose names and values
# take less than 64 bytes more. No heartbeat falls into the test.
GREETING_BYTES = 64
HANDSHAKE_BYTES = 64
# CurveZMQ (RFC 26): HELLO of 200 and INITIATE of 257 bytes and more one way, WELCOME of 168 and READY the other way.
CURVE_HANDSHAKE_BYTES = 560


@pytest.mark.parametrize("place", ON_TCP, indirect=True)
def test_traffic_is_what_a_wire_carries(place: Place) -> None:
    messages: list[list[bytes]] = [[b"h", bytes(n)] for n in (0, 1, 222, 223, 255, 256, 65_535, 1 << 20)]
    with place.listen() as listener:
        relay = Relay(int(listener.address.rsplit(":", 1)[1]))
        with place.connect(f"tcp://127.0.0.1:{relay.port}") as endpoint:
            for frames in messages:
                endpoint.send(frames)
                peer, _ = arrived(listener)
                for _ in range(2):
                    listener.send(peer, frames)
                    answered(endpoint)
        relay.close()
    most = GREETING_BYTES + (CURVE_HANDSHAKE_BYTES if place.client else HANDSHAKE_BYTES)
    assert endpoint.traffic.received == 2 * endpoint.traffic.sent
    assert GREETING_BYTES < len(relay.up) - endpoint.traffic.sent <= most
    assert GREETING_BYTES < len(relay.down) - endpoint.traffic.received <= most


def test_a_reader_that_never_reads_is_found_out(place: Place) -> None:
    with place.listen() as listener, place.connect() as endpoint:
        endpoint.send([b"x"])
        peer, _ = arrived(listener)
        with pytest.raises(PeerGone, match="does not read"):
            keep_sending(listener, peer, [bytes(1 << 12)] * 4)


@pytest.mark.parametrize("place", ON_TCP, indirect=True)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_how_much_of_a_message_has_left_is_known(place: Place, listener: Listener) -> None:
    proxy = ChaosProxy(int(listener.address.rsplit(":", 1)[1]))
    frames = [bytes(OPTIONS["max_frame_bytes"])] * 40
    with place.connect(f"tcp://127.0.0.1:{proxy.port}") as endpoint:
        endpoint.send([b"x"])
        assert arrived(listener)[1] == [b"x"]
        endpoint.recv(0.05)
        before = endpoint.on_the_wire()
        assert before is not None
        proxy.harm["up"].bytes_per_second = 2e7
        endpoint.send(frames)
        seen: list[int] = []
        deadline = time.monotonic() + 30
        while not seen or seen[-1] < sum(map(len, frames)):
            assert time.monotonic() < deadline
            endpoint.recv(0.1)
            wire = endpoint.on_the_wire()
            assert wire is not None
            seen.append(wire.acknowledged - before.acknowledged)
        assert seen == sorted(seen)
        assert seen[0] < sum(map(len, frames)) / 2
    proxy.close()
