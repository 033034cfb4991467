"""What the kernel knows of a TCP connection that libzmq holds: bytes that came, wait, and are acknowledged. Linux only.

A descriptor may be closed and another's at any time. So the figures may be another connection's, and nothing is done to
it.
"""

import fcntl
import socket
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# include/uapi/linux/tcp.h: struct tcp_info, tcpi_bytes_acked and tcpi_bytes_received (Linux 4.1; RFC 4898's
# tcpEStatsAppHCThruOctetsAcked and tcpEStatsAppHCThruOctetsReceived)
_COUNTERS = struct.Struct("<QQ")
_COUNTERS_AT = 120
_UNREAD = struct.Struct("i")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Bytes of one connection so far."""

    acknowledged: int
    """Sent, and arrived at the other machine."""
    received: int
    unread: int
    """Received, and not yet taken by the holder of the connection."""


def is_supported() -> bool:
    """Tell whether this system says how much a connection has received."""
    return sys.platform == "linux"


@contextmanager
def borrowed(descriptor: int) -> Iterator[socket.socket]:
    """Lend a descriptor as a socket, without a copy of it.

    By now it may be a file's that is a lock: a copy would hold the lock after its owner has given it back.
    """
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=descriptor)
    try:
        yield connection
    finally:
        connection.detach()


def counters(descriptor: int) -> Counters | None:
    """Return a connection's counters, None when it is closed or the system does not tell."""
    if not is_supported():
        return None
    try:
        with borrowed(descriptor) as connection:
            # in this order: what is taken between the two only makes the bytes taken look fewer
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _COUNTERS_AT + _COUNTERS.size)
            (unread,) = _UNREAD.unpack(fcntl.ioctl(connection, termios.FIONREAD, bytes(_UNREAD.size)))
    except OSError:
        return None  # closed meanwhile
    if len(info) < _COUNTERS_AT + _COUNTERS.size:
        return None
    acknowledged, received = _COUNTERS.unpack_from(info, _COUNTERS_AT)
    return Counters(acknowledged=acknowledged, received=received, unread=unread)
