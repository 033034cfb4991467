"""The two ends of a link: the server's `Listener` (ROUTER) and a client's `Endpoint` (DEALER).

Both keep order and move whole messages. A socket stays in the thread that made it; only `Listener.wake` may be called
from another. Over `inproc://` the same code runs without a network, for tests and for parts within one process.

With keys every connection is encrypted and authenticated (`transport.security`). Without them, over TCP, a message has
one frame more: the CRC-32 of the others, since TCP's own checksum is weak. A connection that was once made and broke is
not mended, since libzmq would make a new one in silence. The messages on their way would be missing.

Ownership: large buffers are sent without a copy, so the caller must never write to one again.
"""

import errno
import os
import re
import socket
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq
from zmq.utils.monitor import parse_monitor_message

from splitfl.errors import LocalProtocolError, PeerGone, Refused, RemoteProtocolError, TransportError
from splitfl.protocol.codec import MAX_HEADER_BYTES
from splitfl.protocol.messages import Buffer, Why
from splitfl.transport.address import check_address
from splitfl.transport.framing import Framing
from splitfl.transport.keys import KeyPair
from splitfl.transport.lookout import Lookout
from splitfl.transport.reach import NOBODY_THERE, greets, why_unreachable
from splitfl.transport.security import ClientSecurity, Doorkeeper, ServerSecurity, secure_client, secure_server
from splitfl.transport.tcp_info import Counters, counters, is_supported
from splitfl.transport.watch import Cut, Watch

# Below this a copy costs less than keeping track of who holds the buffer.
_COPY_BELOW_BYTES = 1 << 16
_CHECKSUM = struct.Struct("<I")
# Bound on a message until the run's own bound is known: nobody has joined before that.
_MESSAGE_BYTES = 1 << 26
# Messages that wait at a client: answers to its questions, and a few words that it has not asked for.
_QUEUED_AT_CLIENT = 64
_HANDSHAKE_MS = 5000
_BACKLOG = 1024
# A server that does not complete this many handshakes in a row, for this long, will not.
_MAX_HANDSHAKES = 3
_HANDSHAKES_S = 4.0
_EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)


# Sockets that libzmq cannot close without ending the process; they try nothing any more.
_left_open: list["zmq.Socket[bytes]"] = []


class Traffic:
    """Bytes that went through one connection or socket, framing included, TCP's own headers not."""

    __slots__ = ("received", "sent")

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0


class ConnectionLost(PeerGone):
    """A connection that was made has broken; make a new one."""


class HandshakeFailed(ConnectionLost):
    """The other side speaks another language; libzmq does not try that connection again."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrived:
    """A message as it came in."""

    peer: bytes
    """Where to answer; says nothing about who it is."""
    user_id: str
    """The public key that its connection is authenticated with, "" without keys."""
    frames: list[memoryview]
    intact: bool = True
    """Whether its checksum fits; if not, there are no frames."""
    num_bytes: int = 0
    """What it took on the connection, framing included."""


class _Socket:
    """What both ends share: options, counting, closing."""

    def __init__(
        self,
        kind: int,
        *,
        context: "zmq.Context[zmq.Socket[bytes]]",
        framing: Framing,
        max_frame_bytes: int,
        heartbeat_timeout: float,
    ) -> None:
        self._socket: zmq.Socket[bytes] = context.socket(kind)
        self._framing = framing
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        # a longer frame ends its connection
        self._socket.setsockopt(zmq.MAXMSGSIZE, framing.largest_frame(max_frame_bytes))
        # The application has heartbeats of its own on a second connection, which no large frame holds up. These ones
        # only clear away what is dead for good: a frame on a slow link must never be taken for death.
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, int(heartbeat_timeout * 1000))
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(6 * heartbeat_timeout * 1000))
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self.traffic = Traffic()

    def close(self, *, linger_s: float = 0.0) -> None:
        """Close, waiting at most `linger_s` for what is still to be sent; closing twice is fine."""
        if not self._socket.closed:
            self._socket.close(linger=int(linger_s * 1000))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _t: TracebackType | None
    ) -> None:
        self.close(linger_s=1.0)

    def _receive(self) -> list["zmq.Frame"]:
        return self._socket.recv_multipart(flags=zmq.NOBLOCK, copy=False)

    def _send(self, frames: Sequence[Buffer]) -> None:
        last = len(frames) - 1
        for number, frame in enumerate(frames):
            more = zmq.SNDMORE if number < last else 0
            self._socket.send(frame, flags=zmq.NOBLOCK | more, copy=len(frame) < _COPY_BELOW_BYTES)

    def _sealed(self, frames: Sequence[Buffer]) -> list[Buffer]:
        return [*frames, _CHECKSUM.pack(_checksum(frames))] if self._framing.has_checksum else list(frames)

    def _unsealed(self, frames: list[memoryview]) -> list[memoryview] | None:
        """Return a message without its checksum, None if that does not fit."""
        if not self._framing.has_checksum:
            return frames
        *content, seal = frames
        if not content or len(seal) != _CHECKSUM.size or _CHECKSUM.unpack(seal)[0] != _checksum(content):
            return None
        return content


def _checksum(frames: Sequence[Buffer]) -> int:
    """Return a CRC-32 that also sees a border between frames move."""
    crc = 0
    for frame in frames:
        crc = zlib.crc32(frame, zlib.crc32(_CHECKSUM.pack(len(frame) & 0xFFFFFFFF), crc))
    return crc


class Listener(_Socket):
    """The server's end: many peers at one address."""

    def __init__(
        self,
        address: str,
        *,
        max_frame_bytes: int,
        heartbeat_interval: float,
        heartbeat_timeout: float,
        max_queued: int = 64,
        security: ServerSecurity | None = None,
    ) -> None:
        """Bind; raise `TransportError` when the address is refused, taken or not ours.

        `max_queued` messages of one peer wait here before it is made to wait; `heartbeat_interval` is the
        application's affair.
        """
        check_address(address, has_keys=security is not None)
        self._security = security
        # of its own: an authenticator serves a whole context, and only the end of one says that the address is free
        self._shares_context = address.startswith("inproc") and security is None
        self._context = zmq.Context.instance() if self._shares_context else zmq.Context()
        self._doorkeeper = Doorkeeper(self._context, security) if security else None
        self._watch: Watch | None = None
        self._early: deque[Arrived] = deque()
        self._max_message_bytes = _MESSAGE_BYTES
        super().__init__(
            zmq.ROUTER,
            context=self._context,
            framing=Framing.of(address, has_keys=security is not None),
            max_frame_bytes=max_frame_bytes,
            heartbeat_timeout=heartbeat_timeout,
        )
        self._socket.setsockopt(zmq.BACKLOG, _BACKLOG)
        self._socket.setsockopt(zmq.RCVHWM, max_queued)
        self._socket.setsockopt(zmq.SNDHWM, max_queued)
        if security is not None and not address.startswith("inproc"):
            secure_server(self._socket, security)
        if address.startswith("ipc://") and _someone_listens(address.removeprefix("ipc://")):
            self.close()
            raise TransportError(_in_use(address))
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a lost peer is an error, not silence
        try:
            self._socket.bind(_for_ipv6(self._socket, address))
        except zmq.ZMQError as error:
            self.close()
            raise TransportError(_why_not_bound(address, error)) from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT) if address.startswith("tcp") else address
        if address.startswith("ipc://"):
            Path(address.removeprefix("ipc://")).chmod(0o600)
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self._poller.register(self._wake_in, zmq.POLLIN)
        if address.startswith("tcp") and is_supported():
            self._watch = Watch(
                self._socket,
                max_message_bytes=lambda: self._max_message_bytes,
                max_queued=max_queued,
                heartbeat_s=heartbeat_timeout,
            )

    def bound_messages(self, *, num_bytes: int, num_frames: int) -> None:
        """Say how large a message may be, once that is known; a longer one is cut off (Linux, TCP)."""
        self._max_message_bytes = self._framing.most_bytes(num_bytes, num_frames)

    def self_test(self, timeout_s: float = 3.0) -> None:
        """Knock with a random key and without one; raise `TransportError` if either is let in.

        An authentication that is not set up completely lets everybody in without a word, so it is tried. What clients
        say meanwhile, who wait for a server that comes back, is kept for `recv`.
        """
        if self._security is None:
            return
        for knocks in (_Stranger.with_random_key, _Stranger.without_keys):
            with knocks(self._security, self.address) as stranger:
                if self._hears(stranger.nonce, timeout_s=timeout_s / 3):
                    raise TransportError(
                        f"{self.address}: the server let in a stranger that it does not know: refusing to serve. This"
                        " is a fault of this installation of pyzmq or libzmq"
                    )

    def _hears(self, nonce: bytes, timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            arrived = self._next(left_s)
            if arrived is None:
                continue
            if any(bytes(frame) == nonce for frame in arrived.frames):
                return True
            # nobody has more to say yet than hello
            if arrived.num_bytes <= MAX_HEADER_BYTES and len(self._early) < _BACKLOG:
                self._early.append(arrived)
        return False

    def sweep(self) -> list[Cut]:
        """Return the connections that were cut off because their message had no end."""
        return self._watch.take_cuts() if self._watch else []

    def wake(self) -> None:
        """Make `recv` return at once; callable from any thread."""
        try:
            self._wake_out.send(b"w")
        except BlockingIOError:
            pass  # it has been woken so often that it will wake anyhow
        except OSError as error:
            if error.errno != errno.EBADF:  # closed while another thread finished its work
                raise

    def recv(self, timeout_s: float) -> Arrived | None:
        """Return the next message, or None after `timeout_s` or a `wake`."""
        return self._early.popleft() if self._early else self._next(timeout_s)

    def _next(self, timeout_s: float) -> Arrived | None:
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        if self._wake_in.fileno() in ready:
            self._wake_in.recv(4096)
        if self._socket not in ready:
            if self._watch is not None:
                self._watch.emptied()
            return None
        peer, *received = self._receive()
        user_id = _property(received[-1], "User-Id") if self._security and received else ""
        if self._watch is not None and received:
            self._watch.heard(received[-1].get(zmq.SRCFD), user_id)
        frames = [frame.buffer for frame in received]
        num_bytes = self._framing.num_bytes(frames)
        self.traffic.received += num_bytes
        content = self._unsealed(frames)
        return Arrived(
            peer=bytes(peer.buffer),
            user_id=user_id,
            frames=content or [],
            intact=content is not None,
            num_bytes=num_bytes,
        )

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> int:
        """Send to one peer and return the bytes it takes; raise `PeerGone` when it is not there or does not read."""
        sealed = self._sealed(frames)
        try:
            self._send([peer, *sealed])
        except zmq.Again:
            raise PeerGone("the peer does not read what it is sent") from None
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise PeerGone("the peer has closed its connection") from None
            raise
        size = self._framing.num_bytes(sealed)
        self.traffic.sent += size
        return size

    def close(self, *, linger_s: float = 0.0) -> None:
        """Stop listening; unless it is inproc, the address is free when this returns."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        super().close(linger_s=linger_s)
        if self._doorkeeper is not None:
            self._doorkeeper.stop()
            self._doorkeeper = None
        if not self._shares_context:
            self._context.term()
        for end in ("_wake_in", "_wake_out"):
            if hasattr(self, end):
                getattr(self, end).close()


class Endpoint(_Socket):
    """A client's end."""

    def __init__(
        self,
        address: str,
        *,
        max_frame_bytes: int,
        heartbeat_interval: float,
        heartbeat_timeout: float,
        security: ClientSecurity | None = None,
        socks_proxy: str = "",
    ) -> None:
        """Connect; this succeeds whether or not somebody listens there, so wait for an answer with a deadline.

        Through a proxy it does not: `ConnectionLost` says what the proxy answers.
        """
        check_address(address, has_keys=security is not None)
        if address.startswith("tcp") and address.endswith(":*"):
            raise TransportError(f"address {address!r}: a client needs the server's port")
        if socks_proxy and (reason := why_unreachable(address, socks_proxy)):
            raise ConnectionLost(f"{address}: {reason}")
        super().__init__(
            zmq.DEALER,
            context=zmq.Context.instance(),
            framing=Framing.of(address, has_keys=security is not None),
            max_frame_bytes=max_frame_bytes,
            heartbeat_timeout=heartbeat_timeout,
        )
        self.address = address
        self._has_keys = security is not None
        self._is_behind_proxy = bool(socks_proxy)
        self._is_direct = address.startswith("tcp") and not socks_proxy
        self._thread = threading.get_ident()
        # through a proxy one try: libzmq may not try again what it could not close (see `reach`)
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1 if socks_proxy else 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        if security is not None and not address.startswith("inproc"):
            secure_client(self._socket, security)
        if socks_proxy:
            self._socket.setsockopt_string(zmq.SOCKS_PROXY, socks_proxy)
        self._socket.setsockopt(zmq.RCVHWM, _QUEUED_AT_CLIENT)
        self._lookout = Lookout(heartbeat_s=heartbeat_timeout) if address.startswith("tcp") and is_supported() else None
        self._most_bytes = self._most_frames = 0
        self.bound_messages(num_bytes=_MESSAGE_BYTES, num_frames=_MESSAGE_BYTES // max_frame_bytes + 2)
        self._is_connected = False
        self._descriptor = -1
        self._is_reached = self._is_refused = self._may_not_close = False
        self._failed_handshakes = 0
        self._first_failure_s = 0.0
        self._finding = NOBODY_THERE
        self._monitor = self._socket.get_monitor_socket(_EVENTS) if not address.startswith("inproc") else None
        if self._monitor is not None:
            self._poller.register(self._monitor, zmq.POLLIN)
        try:
            self._socket.connect(_for_ipv6(self._socket, address))
        except zmq.ZMQError as error:
            self.close()
            raise TransportError(f"address {address!r}: {error.strerror}") from None

    def bound_messages(self, *, num_bytes: int, num_frames: int, num_waiting_bytes: int = 0) -> None:
        """Say how large a message may be, and how much may wait unread; more ends the connection (Linux, TCP)."""
        self._most_bytes, self._most_frames = num_bytes, num_frames
        if self._lookout is not None:
            self._lookout.message_bytes = self._framing.most_bytes(num_bytes, num_frames)
            most_waiting = num_waiting_bytes or _QUEUED_AT_CLIENT * num_bytes
            # however few bytes a frame has, it costs its framing
            self._lookout.waiting_bytes = self._lookout.message_bytes + self._framing.most_bytes(
                most_waiting, _QUEUED_AT_CLIENT * num_frames
            )

    def finding(self) -> str:
        """Say in words what is known of the connection; may take two seconds to find out."""
        if not self._is_reached and self._is_direct:
            return why_unreachable(self.address) or self._finding
        return self._finding

    def on_the_wire(self) -> Counters | None:
        """Return what the kernel has sent and received of this connection, None where it does not say."""
        is_open = self._is_connected and self.address.startswith("tcp")
        return counters(self._descriptor) if is_open else None

    @property
    def is_refused(self) -> bool:
        """Whether the last attempt at a connection has failed, so that trying again is all that is left."""
        self._follow_monitor()
        return self._is_refused

    @property
    def is_reached(self) -> bool:
        """Whether somebody has ever taken the connection."""
        self._follow_monitor()
        return self._is_reached

    def send(self, frames: Sequence[Buffer]) -> None:
        """Queue a message; raise `PeerGone` when the queue is full because nobody reads, or the connection broke."""
        self._check_thread()
        self._follow_monitor()
        sealed = self._sealed(frames)
        try:
            self._send(sealed)
        except zmq.Again:
            raise PeerGone(f"{self.address} does not read what it is sent") from None
        self.traffic.sent += self._framing.num_bytes(sealed)

    def recv(self, timeout_s: float) -> list[memoryview] | None:
        """Return the next message's frames, or None after `timeout_s`.

        Raises `ConnectionLost` when the connection broke or a message was damaged, and `Refused` when the server does
        not let this client's key in.
        """
        self._check_thread()
        deadline_s = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, deadline_s - time.monotonic())
            ready = dict(self._poller.poll(int(left_s * 1000)))
            if self._socket in ready:  # a message that has arrived counts, also when the connection broke after it
                return self._take()
            if self._lookout is not None:
                self._lookout.emptied()
            self._follow_monitor()
            if not left_s:
                return None

    def _take(self) -> list[memoryview]:
        while self._descriptor < 0 and self._monitor is not None and self._monitor.poll(0):
            self._next_event()  # up to the word of the connection, which comes before what came by it
        frames = [frame.buffer for frame in self._receive()]
        if self._lookout is not None:
            self._lookout.heard()
        self.traffic.received += self._framing.num_bytes(frames)
        content = self._unsealed(frames)
        if content is None:
            raise ConnectionLost(f"a message from {self.address} arrived damaged")
        num_bytes = sum(map(len, content))
        if num_bytes > self._most_bytes or len(content) > self._most_frames:
            raise RemoteProtocolError(
                f"{self.address} has sent a message of {num_bytes} bytes in {len(content)} frames, where"
                f" {self._most_bytes} in {self._most_frames} are the most in this run"
            )
        return content

    def _check_excess(self) -> None:
        if self._lookout is not None and self._lookout.excess:
            raise RemoteProtocolError(
                f"{self.address} has sent {self._lookout.excess} bytes without the end of a message, and a message of"
                f" this run takes at most {self._lookout.message_bytes}: the connection is ended"
            )

    def _follow_monitor(self) -> None:
        self._check_excess()
        while self._monitor is not None and self._monitor.poll(0):
            self._next_event()

    def _next_event(self) -> None:
        if self._monitor is None:
            return
        event = parse_monitor_message(self._monitor.recv_multipart())
        if event["event"] == zmq.EVENT_CONNECTED:
            self._descriptor = int(event["value"])
            if self._lookout is not None:
                self._lookout.connected(self._descriptor)
        self._follow(int(event["event"]))

    def _follow(self, event: int) -> None:
        match event:
            case zmq.EVENT_CONNECTED:
                self._is_reached, self._is_refused = True, False
                self._finding = "something takes connections there and has not answered yet"
            case zmq.EVENT_CONNECT_RETRIED if not self._is_reached:
                self._is_refused = True
            case zmq.EVENT_CLOSED if not self._is_reached and self._is_behind_proxy:
                self._may_not_close = True
                raise ConnectionLost(f"{self.address}: the connection through the SOCKS proxy could not be made")
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._is_connected, self._finding = True, "connected, and there is no answer yet"
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise Refused(
                    f"{self.address} does not let this client's key in: it is unknown there, or was revoked; send your"
                    " public.key to the server's operator for `splitfl authorize`",
                    code=Why.REVOKED,
                )
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._fail_handshake()
                raise HandshakeFailed(f"{self.address}: {self._finding}")
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._fail_handshake()
            case zmq.EVENT_DISCONNECTED if self._is_connected:
                raise ConnectionLost(f"the connection to {self.address} broke")

    def _fail_handshake(self) -> None:
        """Take note of a server that was reached and did not agree; give up on it after a few seconds of that."""
        now_s = time.monotonic()
        if not self._failed_handshakes:
            self._first_failure_s = now_s
        self._failed_handshakes += 1
        if self._is_direct and self._failed_handshakes >= _MAX_HANDSHAKES and not greets(self.address):
            self._failed_handshakes = 0
            self._finding = "something takes connections there, such as a proxy, but no server answers behind it"
            return
        keys = (
            "the enrolment file's server key is not this server's, or it runs without keys"
            if self._has_keys
            else "it may want keys (client.keys and client.enrolment), or is no splitfl server"
        )
        self._finding = f"something listens there but does not complete the handshake: {keys}"
        if self._failed_handshakes >= _MAX_HANDSHAKES and now_s - self._first_failure_s > _HANDSHAKES_S:
            raise PeerGone(f"{self.address}: {self._finding}")

    def close(self, *, linger_s: float = 0.0) -> None:
        """Close, waiting at most `linger_s` for what is still to be sent."""
        if getattr(self, "_lookout", None) is not None and self._lookout is not None:
            self._lookout.stop()
        if getattr(self, "_monitor", None) is not None and self._monitor is not None:
            self._poller.unregister(self._monitor)
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._monitor = None
        if getattr(self, "_may_not_close", False):
            _left_open.append(self._socket)
            return
        super().close(linger_s=linger_s)

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise LocalProtocolError("an endpoint is used outside the thread that made it")


class _Stranger:
    """Somebody whom the server must not let in."""

    def __init__(self, address: str) -> None:
        self.nonce = os.urandom(16)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._address = re.sub(r"//(0\.0\.0\.0|\*|\[::\])", "//127.0.0.1", address)

    @classmethod
    def with_random_key(cls, security: ServerSecurity, address: str) -> "_Stranger":
        stranger = cls(address)
        public, secret = (key.decode() for key in zmq.curve_keypair())
        pair = KeyPair(public=public, secret=secret)
        secure_client(stranger._socket, ClientSecurity(key_pair=pair, server_public_key=security.key_pair.public))
        return stranger

    @classmethod
    def without_keys(cls, _security: ServerSecurity, address: str) -> "_Stranger":
        return cls(address)

    def __enter__(self) -> Self:
        self._socket.connect(self._address)
        self._socket.send(self.nonce)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._context.term()


def _property(frame: "zmq.Frame", name: str) -> str:
    """Return a property of the connection that a frame came by, "" where it has none."""
    try:
        return str(frame.get(name))
    except zmq.ZMQError:
        return ""


def _for_ipv6(sock: "zmq.Socket[bytes]", address: str) -> str:
    if address.startswith("tcp://["):
        sock.setsockopt(zmq.IPV6, 1)
    return address.replace("tcp://localhost:", "tcp://127.0.0.1:")


def _someone_listens(path: str) -> bool:
    """Tell whether a socket file has a server: ZeroMQ would take the path away from it without a word."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def _in_use(address: str) -> str:
    return f"address {address} is in use: stop the program that listens there or set server.address to another one"


def _why_not_bound(address: str, error: zmq.ZMQError) -> str:
    if error.errno == zmq.EADDRINUSE:
        return _in_use(address)
    return f"cannot listen on {address}: {os.strerror(error.errno) if error.errno else error.strerror}"
