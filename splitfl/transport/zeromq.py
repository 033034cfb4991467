"""The two ends of a link: the server's `Listener` (ROUTER) and a client's `Endpoint` (DEALER).

Both keep order and move whole messages. A socket stays in the thread that made it; only `Listener.wake` may be called
from another. Over `inproc://` the same code runs without a network, for tests and for parts within one process.

Ownership: large buffers are sent without a copy, so whoever hands one over must never write to it again.
"""

import errno
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq

from splitfl.errors import LocalProtocolError, PeerGone, TransportError
from splitfl.protocol.messages import Buffer
from splitfl.transport.address import check_address

# Below this a copy costs less than keeping track of who holds the buffer.
_COPY_BELOW_BYTES = 1 << 16
# What ZMTP 3.1 (https://rfc.zeromq.org/spec/37) puts before each frame: flags and a length of 1 or 8 bytes.
_SMALL_FRAME_BYTES = 255


class Traffic:
    """Bytes that went through one connection or socket, framing included, TCP's own headers not."""

    __slots__ = ("received", "sent")

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0


def framed_bytes(frames: Sequence[Buffer]) -> int:
    """Return what a message takes on a TCP connection, without TCP's headers."""
    return sum(len(frame) + (2 if len(frame) <= _SMALL_FRAME_BYTES else 9) for frame in frames)


class _Socket:
    """What both ends share: options, counting, closing."""

    def __init__(self, kind: int, *, max_frame_bytes: int, heartbeat_interval: float, heartbeat_timeout: float) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
        self._socket.setsockopt(zmq.LINGER, 0)
        # one header and whatever frames the config allows; a longer frame ends its connection
        self._socket.setsockopt(zmq.MAXMSGSIZE, max(max_frame_bytes, 1 << 16))
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, int(heartbeat_interval * 1000))
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(heartbeat_timeout * 1000))
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

    def _receive(self) -> list[memoryview]:
        return [frame.buffer for frame in self._socket.recv_multipart(flags=zmq.NOBLOCK, copy=False)]

    def _send(self, frames: Sequence[Buffer]) -> None:
        last = len(frames) - 1
        for number, frame in enumerate(frames):
            more = zmq.SNDMORE if number < last else 0
            self._socket.send(frame, flags=zmq.NOBLOCK | more, copy=len(frame) < _COPY_BELOW_BYTES)


class Listener(_Socket):
    """The server's end: many peers behind one address."""

    def __init__(
        self, address: str, *, max_frame_bytes: int, heartbeat_interval: float, heartbeat_timeout: float
    ) -> None:
        """Bind; raise `TransportError` when the address is refused, taken or not ours."""
        check_address(address)
        super().__init__(
            zmq.ROUTER,
            max_frame_bytes=max_frame_bytes,
            heartbeat_interval=heartbeat_interval,
            heartbeat_timeout=heartbeat_timeout,
        )
        if address.startswith("ipc://") and _someone_listens(address.removeprefix("ipc://")):
            self.close()
            raise TransportError(_in_use(address))
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a peer that is gone is an error, not silence
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

    def wake(self) -> None:
        """Make `recv` return at once; callable from any thread."""
        try:
            self._wake_out.send(b"w")
        except BlockingIOError:
            pass  # it has been woken so often that it will wake anyhow
        except OSError as error:
            if error.errno != errno.EBADF:  # closed while another thread finished its work
                raise

    def recv(self, timeout_s: float) -> tuple[bytes, list[memoryview]] | None:
        """Return (peer, frames), or None after `timeout_s` or a `wake`."""
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        if self._wake_in.fileno() in ready:
            self._wake_in.recv(4096)
        if self._socket not in ready:
            return None
        peer, *frames = self._receive()
        self.traffic.received += framed_bytes(frames)
        return bytes(peer), frames

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> int:
        """Send to one peer and return the bytes it takes; raise `PeerGone` when it is not there or does not read."""
        try:
            self._send([peer, *frames])
        except zmq.Again:
            raise PeerGone("the peer does not read what it is sent") from None
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise PeerGone("the peer has closed its connection") from None
            raise
        size = framed_bytes(frames)
        self.traffic.sent += size
        return size

    def close(self, *, linger_s: float = 0.0) -> None:
        """Stop listening."""
        super().close(linger_s=linger_s)
        for end in ("_wake_in", "_wake_out"):
            if hasattr(self, end):
                getattr(self, end).close()


class Endpoint(_Socket):
    """A client's end."""

    def __init__(
        self, address: str, *, max_frame_bytes: int, heartbeat_interval: float, heartbeat_timeout: float
    ) -> None:
        """Connect; this succeeds whether or not somebody listens there, so wait for an answer with a deadline."""
        check_address(address)
        if address.startswith("tcp") and address.endswith(":*"):
            raise TransportError(f"address {address!r}: a client needs the server's port")
        super().__init__(
            zmq.DEALER,
            max_frame_bytes=max_frame_bytes,
            heartbeat_interval=heartbeat_interval,
            heartbeat_timeout=heartbeat_timeout,
        )
        self.address = address
        self._thread = threading.get_ident()
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        try:
            self._socket.connect(_for_ipv6(self._socket, address))
        except zmq.ZMQError as error:
            self.close()
            raise TransportError(f"address {address!r}: {error.strerror}") from None

    def send(self, frames: Sequence[Buffer]) -> None:
        """Queue a message; raise `PeerGone` when the queue is full because nobody reads."""
        self._check_thread()
        try:
            self._send(frames)
        except zmq.Again:
            raise PeerGone(f"{self.address} does not read what it is sent") from None
        self.traffic.sent += framed_bytes(frames)

    def recv(self, timeout_s: float) -> list[memoryview] | None:
        """Return the next message's frames, or None after `timeout_s`."""
        self._check_thread()
        if not self._poller.poll(int(timeout_s * 1000)):
            return None
        frames = self._receive()
        self.traffic.received += framed_bytes(frames)
        return frames

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise LocalProtocolError("an endpoint is used outside the thread that made it")


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
