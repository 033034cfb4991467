"""Connections with keys: nobody else comes in, nobody reads along, and nobody takes another's place."""

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
from conftest import free_port
from transport.relay import Cutter, Relay

from benchmarks.proxy import ChaosProxy
from splitfl.errors import PeerGone, Refused, TransportError
from splitfl.transport.keys import AllowList, KeyPair, authorize, keygen, revoke
from splitfl.transport.security import ClientSecurity, Doorkeeper, ServerSecurity
from splitfl.transport.zeromq import Arrived, Endpoint, Listener

OPTIONS: dict[str, Any] = {"max_frame_bytes": 1 << 20, "heartbeat_interval": 60.0, "heartbeat_timeout": 120.0}
SOON_S = 5.0


@dataclass
class Office:
    """A listener with keys, and the clients it lets in."""

    folder: Path
    listener: Listener
    server: KeyPair

    def client(self, name: str, *, admits: bool = True, server_key: str = "") -> ClientSecurity:
        pair = keygen(self.folder / name)
        if admits:
            authorize(self.folder / "server", name, pair.public)
            self.refresh()
        return ClientSecurity(key_pair=pair, server_public_key=server_key or self.server.public)

    def refresh(self) -> None:
        assert self.listener._security is not None
        self.listener._security.allow_list.refresh()

    def endpoint(self, security: ClientSecurity | None, **more: Any) -> Endpoint:
        return Endpoint(more.pop("address", self.listener.address), security=security, **{**OPTIONS, **more})


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    pair = keygen(tmp_path / "server")
    security = ServerSecurity(key_pair=pair, allow_list=AllowList(tmp_path / "server"))
    with Listener(f"tcp://127.0.0.1:{free_port()}", security=security, **OPTIONS) as listener:
        yield Office(tmp_path, listener, pair)


def hears(listener: Listener, timeout_s: float = SOON_S) -> Arrived | None:
    deadline_s = time.monotonic() + timeout_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        if (arrived := listener.recv(left_s)) is not None:
            return arrived
    return None


def told(endpoint: Endpoint, timeout_s: float = 10.0) -> Exception | None:
    """Say something, and return what a client is told that is not let in: when it sends, or while it listens."""
    deadline_s = time.monotonic() + timeout_s
    try:
        endpoint.send([b"x"])
        while time.monotonic() < deadline_s:
            endpoint.recv(0.2)
    except (Refused, PeerGone) as error:
        return error
    return None


def test_who_is_authorised_comes_in_and_is_known_by_its_key(office: Office) -> None:
    security = office.client("clinic-a")
    with office.endpoint(security) as endpoint:
        endpoint.send([b"x"])
        arrived = hears(office.listener)
        assert arrived is not None
        assert (arrived.user_id, list(map(bytes, arrived.frames))) == (security.key_pair.public, [b"x"])
        office.listener.send(arrived.peer, [b"y"])
        assert endpoint.recv(SOON_S) == [b"y"]


def test_an_unknown_key_is_told_what_to_do(office: Office) -> None:
    with office.endpoint(office.client("mallory", admits=False)) as endpoint:
        error = told(endpoint)
        assert isinstance(error, Refused)
        assert "splitfl authorize" in str(error)
        assert hears(office.listener, 0.2) is None


def test_a_wrong_server_key_and_no_keys_at_all_are_told_what_to_do(office: Office) -> None:
    stranger = keygen(office.folder / "other").public
    for security, says in (
        (office.client("clinic-a", server_key=stranger), "server key is not this server's"),
        (None, "may want keys"),
    ):
        with office.endpoint(security) as endpoint:
            error = told(endpoint)
            assert isinstance(error, PeerGone)
            assert says in str(error)
    assert hears(office.listener, 0.2) is None


def test_a_proxy_without_a_server_behind_it_is_no_wrong_key(office: Office) -> None:
    """A server that reboots behind a proxy: the client tries on, and finds it when it is back."""
    port = free_port()
    proxy = ChaosProxy(port)
    with office.endpoint(office.client("clinic-a"), address=f"tcp://127.0.0.1:{proxy.port}") as endpoint:
        deadline_s = time.monotonic() + 30.0
        while "no server answers behind it" not in endpoint.finding():
            assert time.monotonic() < deadline_s, endpoint.finding()
            assert told(endpoint, 1.0) is None
        security = office.listener._security
        with Listener(f"tcp://127.0.0.1:{port}", security=security, **OPTIONS) as listener:
            assert hears(listener) is not None
    proxy.close()


def test_a_revoked_key_is_seen_on_an_open_connection(office: Office) -> None:
    security = office.client("clinic-a")
    assert office.listener._security is not None
    allowed = office.listener._security.allow_list
    with office.endpoint(security) as endpoint:
        endpoint.send([b"before"])
        assert hears(office.listener) is not None
        revoke(office.folder / "server", "clinic-a")
        office.refresh()
        endpoint.send([b"after"])  # libzmq lets it through: the check is at the handshake only
        arrived = hears(office.listener)
        assert arrived is not None
        assert allowed.client_of(arrived.user_id) is None
    with office.endpoint(security) as endpoint:
        assert isinstance(told(endpoint), Refused)


def test_without_its_authenticator_a_server_lets_nobody_in(office: Office) -> None:
    assert office.listener._doorkeeper is not None
    office.listener._doorkeeper.stop()
    with office.endpoint(office.client("clinic-a")) as endpoint:
        endpoint.send([b"x"])
        assert hears(office.listener, 1.0) is None


def test_a_server_that_would_let_strangers_in_refuses_to_serve(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    office.listener.self_test(1.0)
    monkeypatch.setattr(Doorkeeper, "callback", lambda *_: True)
    with pytest.raises(TransportError, match="let in a stranger"):
        office.listener.self_test()


def test_a_server_hears_after_its_test_what_a_client_said_during_it(office: Office) -> None:
    """A client that waits for a server which is started again says hello as soon as it listens."""
    with office.endpoint(office.client("clinic-a")) as endpoint:
        endpoint.send([b"hello"])
        office.listener.self_test(1.0)
        arrived = hears(office.listener)
        assert arrived is not None
        assert bytes(arrived.frames[0]) == b"hello"


def test_nobody_gets_anothers_answers_by_taking_its_routing_id(office: Office) -> None:
    honest, spoofer = office.client("clinic-a"), office.client("clinic-b")
    with office.endpoint(honest) as mine:
        mine.send([b"mine"])
        first = hears(office.listener)
        assert first is not None
        context = zmq.Context()
        thief = context.socket(zmq.DEALER)
        try:
            thief.setsockopt(zmq.LINGER, 0)
            thief.setsockopt(zmq.ROUTING_ID, first.peer)
            thief.curve_serverkey = spoofer.server_public_key.encode()
            thief.curve_publickey = spoofer.key_pair.public.encode()
            thief.curve_secretkey = spoofer.key_pair.secret.encode()
            thief.connect(office.listener.address)
            thief.send(b"give me")
            while (arrived := hears(office.listener, 1.0)) is not None:
                assert arrived.user_id == spoofer.key_pair.public  # never taken for the other
            for number in range(20):
                office.listener.send(first.peer, [b"%d" % number])
            assert [mine.recv(SOON_S) for _ in range(20)] == [[b"%d" % number] for number in range(20)]
            assert not thief.poll(200)
        finally:
            thief.close()
            context.term()


@pytest.mark.parametrize("has_keys", [True, False])
def test_who_reads_along_reads_nothing(office: Office, tmp_path: Path, has_keys: bool) -> None:
    """Without keys the same words are found in the capture: so the test can fail."""
    word, row = b"Forward of clinic-a", os.urandom(4096)
    plain = None if has_keys else Listener(f"tcp://127.0.0.1:{free_port()}", **OPTIONS)
    listener = plain or office.listener
    relay = Relay(int(listener.address.rsplit(":", 1)[1]))
    security = office.client("clinic-a") if has_keys else None
    with office.endpoint(security, address=f"tcp://127.0.0.1:{relay.port}") as endpoint:
        endpoint.send([word, row])
        arrived = hears(listener)
        assert arrived is not None
        listener.send(arrived.peer, [word, row])
        assert endpoint.recv(SOON_S) == [word, row]
    if plain is not None:
        plain.close()
    relay.close()
    for seen in (relay.up, relay.down):
        assert len(seen) > len(row)
        assert (word in seen, row[:64] in seen) == (not has_keys, not has_keys)


def test_what_nobody_has_authenticated_costs_no_memory(office: Office) -> None:
    """Frames of 50 MiB before the handshake, from twenty connections; then a client joins."""
    process = psutil.Process()
    before = process.memory_info().rss
    peers = [socket.create_connection(("127.0.0.1", int(office.listener.address.rsplit(":", 1)[1]))) for _ in range(20)]
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + b"\0" + bytes(31)
    for peer in peers:
        peer.settimeout(0.5)
        peer.sendall(greeting + b"\x06" + struct.pack(">Q", 50 << 20))
        try:
            for _ in range(32):
                peer.sendall(bytes(1 << 16))
        except OSError:
            continue  # it has been ended
    with office.endpoint(office.client("clinic-a")) as endpoint:
        endpoint.send([b"x"])
        assert hears(office.listener) is not None
    assert process.memory_info().rss - before < 64 << 20
    for peer in peers:
        peer.close()


def test_hundreds_of_reconnections_leave_nothing_behind(office: Office) -> None:
    process, security = psutil.Process(), office.client("clinic-a")

    def connect() -> None:
        with office.endpoint(security) as endpoint:
            endpoint.send([b"x"])
            assert hears(office.listener) is not None

    for _ in range(20):
        connect()
    descriptors, threads, rss = process.num_fds(), process.num_threads(), process.memory_info().rss
    for _ in range(300):
        connect()
    _until(lambda: process.num_fds() <= descriptors + 4)
    _until(lambda: process.num_threads() <= threads)
    assert process.memory_info().rss - rss < 16 << 20


def _until(is_true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + SOON_S
    while not is_true():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_client_behind_a_socks_proxy(office: Office) -> None:
    """SOCKS5 (RFC 1928) without authentication; the server's name is the proxy's to look up."""
    asked: list[bytes] = []

    def greet(client: socket.socket) -> None:
        client.recv(client.recv(2)[1])  # version, methods
        client.sendall(b"\x05\x00")
        assert client.recv(4) == b"\x05\x01\x00\x03"  # connect to a name
        asked.append(client.recv(client.recv(1)[0] + 2))
        client.sendall(b"\x05\x00\x00\x01" + bytes(6))

    proxy = Cutter(int(office.listener.address.rsplit(":", 1)[1]), greet=greet)
    far = {"address": "tcp://gpu-box.example:5555", "socks_proxy": f"127.0.0.1:{proxy.port}"}
    with office.endpoint(office.client("clinic-a"), **far) as endpoint:
        endpoint.send([b"x"])
        assert hears(office.listener) is not None
    proxy.close()
    assert asked == [b"gpu-box.example" + struct.pack(">H", 5555)] * 2  # tried once before ZeroMQ may


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        (b"\x05\xff", "it is no SOCKS5 proxy, or wants a password"),
        (b"\x05\x00\x05\x05\x00\x01" + bytes(6), "it does not reach the server: nobody listens there"),
        (b"\x05\x00", "it has hung up"),
    ],
)
def test_a_socks_proxy_that_does_not_help(office: Office, answers: bytes, says: str) -> None:
    def greet(client: socket.socket) -> None:
        client.recv(3)
        client.sendall(answers[:2])
        client.recv(64)
        client.sendall(answers[2:])
        raise ConnectionAbortedError

    proxy = Cutter(int(office.listener.address.rsplit(":", 1)[1]), greet=greet)
    far = {"address": "tcp://gpu-box.example:5555", "socks_proxy": f"127.0.0.1:{proxy.port}"}
    with pytest.raises(PeerGone, match=says):
        office.endpoint(office.client("clinic-a"), **far)
    proxy.close()


@pytest.mark.parametrize("has_keys", [True, False])
def test_a_flipped_bit_is_never_delivered(office: Office, has_keys: bool) -> None:
    """CURVE finds it with keys, the checksum without."""
    plain = None if has_keys else Listener(f"tcp://127.0.0.1:{free_port()}", **OPTIONS)
    listener, security = plain or office.listener, office.client("clinic-a") if has_keys else None
    proxy = ChaosProxy(int(listener.address.rsplit(":", 1)[1]), seed=3)
    sent = [os.urandom(1 << 15) for _ in range(8)]
    with office.endpoint(security, address=f"tcp://127.0.0.1:{proxy.port}") as endpoint:
        endpoint.send([sent[0]])
        assert hears(listener) is not None
        proxy.harm["up"].flips = 1
        with contextlib.suppress(PeerGone):  # the server may have ended the connection already
            for content in sent[1:]:
                endpoint.send([content])
        while (arrived := hears(listener, 1.0)) is not None:
            assert not arrived.intact or bytes(arrived.frames[0]) in sent
    assert proxy.flipped == 1
    proxy.close()
    if plain is not None:
        plain.close()
