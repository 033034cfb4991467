"""Cuts off connections that send a message without end, before it fills the memory.

libzmq keeps the frames of a multipart message until the last has come, and counts none of them against any limit. The
application sees nothing of it. So the accepted TCP connections are watched from beside. Linux only: elsewhere the
system does not tell (`TCP_INFO.tcpi_bytes_received`, RFC 4898's tcpEStatsAppHCThruOctetsReceived).

The watch counts the bytes that libzmq has read from a connection since its last whole message was taken from the
socket. That is the bytes received, less the bytes that wait in the kernel. Honest peers exceed a message too: whole
messages wait while the socket's thread is busy. So a connection is cut off when it holds more than a message although
the socket was found empty since. It is also cut off when it holds more than all messages that may wait (ZMQ_RCVHWM),
the arriving one, and one in libzmq's hand. A cut is a lost connection and nothing else.
"""

import ipaddress
import math
import resource
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import parse_monitor_message

from splitfl.transport.tcp_info import borrowed, counters

_INTERVAL_S = 0.03
# How long after the bytes were read their message is in the queue at the latest, if it is a whole one.
SETTLE_S = 0.3
# ZMTP's heartbeats are no messages: a PING and a PONG of at most this for each heartbeat, and a handshake.
HEARTBEAT_BYTES = 128
HANDSHAKE_BYTES = 2048
_CUTS_BEFORE_BAN = 3
_CUTS_WITHIN_S = 600.0
_BAN_S = 60.0
# A client has two connections, and a few that it has lost and this side has not noticed yet.
_MOST_OF_A_KEY = 64
# A client that connects says hello at once.
_SILENT_S = 30.0
_MOST_DESCRIPTORS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A connection that was cut off."""

    address: str
    user_id: str
    """The key of its earlier messages, "" where there were none."""
    num_bytes: int
    num_connections: int = 0
    """Connections that the key had, where it was for those and not for bytes."""


@dataclass(slots=True, kw_only=True)
class _Connection:
    peer: tuple[str, int]
    baseline: int
    """Bytes that libzmq had read when its last whole message was taken."""
    heard_s: float
    user_id: str = ""
    is_silent: bool = True
    too_much_since_s: float | None = None
    is_cut: bool = False


class Watch:
    """A thread that follows a listening socket's connections."""

    def __init__(
        self,
        monitored: "zmq.Socket[bytes]",
        *,
        max_message_bytes: Callable[[], int],
        max_queued: int,
        heartbeat_s: float,
    ) -> None:
        """`max_message_bytes` are those on the wire, framing included; `max_queued` is the socket's ZMQ_RCVHWM."""
        events = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
        self._socket = monitored
        self._monitor = monitored.get_monitor_socket(events)
        self._max_message_bytes = max_message_bytes
        self._max_queued = max_queued
        self._heartbeat_s = heartbeat_s
        self._lock = threading.Lock()
        self._connections: dict[int, _Connection] = {}
        self._emptied_s = 0.0
        self._cuts: list[Cut] = []
        self._cuts_of: dict[str, list[float]] = {}
        self._banned: dict[str, float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def heard(self, descriptor: int, user_id: str) -> None:
        """Take note of a whole message of a connection."""
        with self._lock:
            connection = self._connections.get(descriptor)
            if connection is not None:
                connection.baseline = read_by_zeromq(descriptor) or connection.baseline
                connection.heard_s = time.monotonic()
                connection.too_much_since_s = None
                connection.user_id = user_id
                connection.is_silent = False

    def emptied(self) -> None:
        """Take note that no whole message waits in the socket."""
        self._emptied_s = time.monotonic()

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
            look_at_s = time.monotonic() + _INTERVAL_S
            # a peer that connects again and again must not keep it from looking
            while (left_s := look_at_s - time.monotonic()) > 0 and self._monitor.poll(math.ceil(left_s * 1000)):
                self._follow()
                if self._stopping.is_set():
                    break
            self._look()

    def _follow(self) -> None:
        event = parse_monitor_message(self._monitor.recv_multipart())
        descriptor, now_s = int(event["value"]), time.monotonic()
        with self._lock:
            if event["event"] != zmq.EVENT_ACCEPTED:
                self._connections.pop(descriptor, None)
                return
            peer = peer_of(descriptor)
            # what came before this thread was told has been taken already, or it counts as if it had
            self._connections[descriptor] = _Connection(peer=peer, baseline=read_by_zeromq(descriptor), heard_s=now_s)
            if self._banned.get(peer[0], 0.0) > now_s:
                shut_down(descriptor, peer)

    def _look(self) -> None:
        message_bytes, now_s = self._max_message_bytes(), time.monotonic()
        with self._lock:
            for descriptor, connection in self._connections.items():
                if not connection.is_cut:
                    self._judge(descriptor, connection, message_bytes, now_s)
            self._bound_connections(now_s)

    def _bound_connections(self, now_s: float) -> None:
        """End the oldest connections of a key that has too many, and silent connections."""
        by_key: dict[str, list[int]] = {}
        for descriptor, connection in self._connections.items():
            if connection.is_cut:
                continue
            if connection.user_id:
                by_key.setdefault(connection.user_id, []).append(descriptor)
            # its words may wait while the socket's thread is busy
            elif connection.is_silent and min(now_s, self._emptied_s) - connection.heard_s > _SILENT_S:
                self._end(descriptor)
        for user_id, descriptors in by_key.items():
            too_many = descriptors[: max(0, len(descriptors) - _MOST_OF_A_KEY)]
            if too_many:
                address = self._connections[descriptors[0]].peer[0]
                cut = Cut(address=address, user_id=user_id, num_bytes=0, num_connections=len(descriptors))
                self._cuts.append(cut)
            for descriptor in too_many:
                self._end(descriptor)

    def _end(self, descriptor: int) -> None:
        connection = self._connections[descriptor]
        connection.is_cut = True
        shut_down(descriptor, connection.peer)

    def _judge(self, descriptor: int, connection: _Connection, message_bytes: int, now_s: float) -> None:
        num_bytes = read_by_zeromq(descriptor) - connection.baseline
        beside = HANDSHAKE_BYTES + HEARTBEAT_BYTES * (now_s - connection.heard_s) / self._heartbeat_s
        if num_bytes <= message_bytes + beside:
            connection.too_much_since_s = None
            return
        if connection.too_much_since_s is None:
            connection.too_much_since_s = now_s
        is_of_one_message = self._emptied_s - connection.too_much_since_s > SETTLE_S
        if is_of_one_message or num_bytes > (self._max_queued + 2) * message_bytes + beside:
            connection.is_cut = True
            shut_down(descriptor, connection.peer)
            self._note(connection, num_bytes, now_s)

    def _note(self, connection: _Connection, num_bytes: int, now_s: float) -> None:
        address = connection.peer[0]
        self._cuts.append(Cut(address=address, user_id=connection.user_id, num_bytes=num_bytes))
        if connection.user_id or _is_loopback(address):
            return
        recent = {
            other: [at_s for at_s in times if now_s - at_s < _CUTS_WITHIN_S] for other, times in self._cuts_of.items()
        }
        self._cuts_of = {other: times for other, times in recent.items() if times}
        self._banned = {other: until_s for other, until_s in self._banned.items() if until_s > now_s}
        self._cuts_of.setdefault(address, []).append(now_s)
        if len(self._cuts_of[address]) >= _CUTS_BEFORE_BAN:
            self._banned[address] = now_s + _BAN_S


def allow_many_descriptors() -> None:
    """Raise this process's bound on open descriptors as far as the system lets it: a connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if 0 < soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def read_by_zeromq(descriptor: int) -> int:
    """Return the bytes of a connection that libzmq has, 0 when it is closed; never too many."""
    found = counters(descriptor)
    return found.received - found.unread if found is not None else 0


def shut_down(descriptor: int, peer: tuple[str, int]) -> None:
    """End a connection, unless its descriptor is another's by now."""
    try:
        # a copy, since it must be the same that is looked at and ended
        with socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as connection:
            if connection.getpeername()[:2] == peer:
                connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed meanwhile


def peer_of(descriptor: int) -> tuple[str, int]:
    try:
        with borrowed(descriptor) as connection:
            host, port = connection.getpeername()[:2]
            return str(host), int(port)
    except OSError:
        return "", 0


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.removeprefix("::ffff:")).is_loopback
    except ValueError:
        return True
