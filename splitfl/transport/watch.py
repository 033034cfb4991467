"""Cuts off connections that send a message without end, before it fills the memory.

libzmq keeps the frames of a multipart message until the last has come, and counts none of them against any limit; the
application sees nothing of it. So the accepted TCP connections are watched from beside: a connection that has
received more bytes since its last whole message than a message may have is shut down. Linux only: elsewhere the
system does not tell (`TCP_INFO.tcpi_bytes_received`, RFC 4898's tcpEStatsAppHCThruOctetsReceived).
"""

import ipaddress
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import parse_monitor_message

_INTERVAL_S = 0.03
# include/uapi/linux/tcp.h: struct tcp_info, tcpi_bytes_received (Linux 4.1)
_BYTES_RECEIVED = struct.Struct("<Q")
_BYTES_RECEIVED_AT = 128
_CUTS_BEFORE_BAN = 3
_BAN_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A connection that was cut off."""

    address: str
    user_id: str
    """The key it authenticated with, "" where that is not known."""
    num_bytes: int


@dataclass(slots=True, kw_only=True)
class _Connection:
    address: str
    baseline: int = 0
    user_id: str = ""
    is_cut: bool = False


class Watch:
    """A thread that follows a listening socket's connections."""

    def __init__(
        self,
        monitored: "zmq.Socket[bytes]",
        *,
        max_message_bytes: Callable[[], int],
        may_be_behind: Callable[[], bool],
        seen_keys: Callable[[], set[str]],
    ) -> None:
        """`max_message_bytes` are those on the wire, framing included.

        `may_be_behind` tells whether whole messages wait to be taken; then more bytes are no wonder.
        """
        events = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
        self._socket = monitored
        self._monitor = monitored.get_monitor_socket(events)
        self._max_message_bytes = max_message_bytes
        self._may_be_behind = may_be_behind
        self._seen_keys = seen_keys
        self._lock = threading.Lock()
        self._connections: dict[int, _Connection] = {}
        self._cuts: list[Cut] = []
        self._cuts_of: Counter[str] = Counter()
        self._banned: dict[str, float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def heard(self, descriptor: int, user_id: str) -> None:
        """Take note of a whole message of a connection."""
        with self._lock:
            connection = self._connections.get(descriptor)
            if connection is not None:
                connection.baseline = _received(descriptor) or connection.baseline
                connection.user_id = user_id

    def take_cuts(self) -> list[Cut]:
        """Return what was cut off since the last call."""
        with self._lock:
            cuts, self._cuts = self._cuts, []
        return cuts

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join(timeout=5.0)
        # in this order: libzmq waits for ever with an event that nobody can be told of any more
        self._socket.disable_monitor()
        self._monitor.close(linger=0)

    def _run(self) -> None:
        while not self._stopping.is_set():
            while self._monitor.poll(int(_INTERVAL_S * 1000)):
                self._follow()
                if self._stopping.is_set():
                    break
            self._look()

    def _follow(self) -> None:
        event = parse_monitor_message(self._monitor.recv_multipart())
        descriptor = int(event["value"])
        with self._lock:
            if event["event"] != zmq.EVENT_ACCEPTED:
                self._connections.pop(descriptor, None)
                return
            address = _address_of(descriptor)
            self._connections[descriptor] = _Connection(address=address)
            if self._banned.get(address, 0.0) > time.monotonic():
                _shut_down(descriptor)

    def _look(self) -> None:
        limit = self._max_message_bytes()
        with self._lock:
            for descriptor, connection in self._connections.items():
                num_bytes = (_received(descriptor) or 0) - connection.baseline
                # what whole messages wait to be taken is bounded by the queue's length, which the caller knows
                if connection.is_cut or num_bytes <= limit or (self._may_be_behind() and num_bytes <= 8 * limit):
                    continue
                connection.is_cut = True
                _shut_down(descriptor)
                self._note(connection, num_bytes)

    def _note(self, connection: _Connection, num_bytes: int) -> None:
        user_id = connection.user_id or self._only_candidate()
        self._cuts.append(Cut(address=connection.address, user_id=user_id, num_bytes=num_bytes))
        if user_id or _is_loopback(connection.address):
            return
        self._cuts_of[connection.address] += 1
        if self._cuts_of[connection.address] >= _CUTS_BEFORE_BAN:
            self._banned[connection.address] = time.monotonic() + _BAN_S

    def _only_candidate(self) -> str:
        """Return the one key that was let in and has sent no whole message, if there is just one."""
        known = {connection.user_id for connection in self._connections.values()}
        candidates = self._seen_keys() - known
        return candidates.pop() if len(candidates) == 1 else ""


def is_supported() -> bool:
    """Tell whether this system says how much a connection has received."""
    return sys.platform == "linux"


def _received(descriptor: int) -> int | None:
    try:
        with socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as connection:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED_AT + 8)
    except OSError:
        return None  # closed meanwhile
    if len(info) < _BYTES_RECEIVED_AT + 8:
        return None
    return int(_BYTES_RECEIVED.unpack_from(info, _BYTES_RECEIVED_AT)[0])


def _shut_down(descriptor: int) -> None:
    try:
        with socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as connection:
            connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed meanwhile


def _address_of(descriptor: int) -> str:
    try:
        with socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as connection:
            return str(connection.getpeername()[0])
    except OSError:
        return ""


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.removeprefix("::ffff:")).is_loopback
    except ValueError:
        return True
