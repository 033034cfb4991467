"""Finds out why an address cannot be reached: libzmq tries again and again and says no reason.

A SOCKS proxy is tried from here before libzmq may. When one refuses, libzmq 4.3.5 ends the whole process on closing the
socket, since it takes a descriptor out of its epoll set that it has closed before.
"""

import socket
from collections.abc import Callable

NOBODY_THERE = "nobody listens there"
_PATIENCE_S = 2.0
# SOCKS5 (RFC 1928): version, one method (no authentication); connect to a name.
_GREETING = b"\x05\x01\x00"
_CONNECT_TO_NAME = b"\x05\x01\x00\x03"
_REPLIES = {
    1: "it says that it failed",
    2: "its rules do not allow it",
    3: "the network is unreachable from there",
    4: "the host is unreachable from there",
    5: NOBODY_THERE,
    6: "it took too long",
}


def why_unreachable(address: str, socks_proxy: str = "") -> str:
    """Return a sentence's end that says why no connection can be made, "" if one can; takes two seconds at most."""
    host, port = _split(address.removeprefix("tcp://"))
    if not socks_proxy:
        return _why_not(host, port, lambda _: "")
    refusal = _why_not(*_split(socks_proxy), lambda proxy: _through(proxy, host, port))
    return f"the SOCKS proxy {socks_proxy} cannot be used: {refusal}" if refusal else ""


def greets(address: str) -> bool:
    """Tell whether ZeroMQ answers at an address: a ZMTP greeting begins with FF and 8 bytes more, then 7F (RFC 37)."""
    try:
        with socket.create_connection(_split(address.removeprefix("tcp://")), timeout=_PATIENCE_S / 2) as probe:
            return probe.recv(10, socket.MSG_WAITALL)[9:] == b"\x7f"
    except OSError:
        return False


def _why_not(host: str, port: int, talk: Callable[[socket.socket], str]) -> str:
    try:
        with socket.create_connection((host, port), timeout=_PATIENCE_S) as connection:
            return talk(connection)
    except socket.gaierror:
        return f"the name {host} is not known here"
    except ConnectionRefusedError:
        return NOBODY_THERE
    except TimeoutError:
        return "nothing answers there: it may be another address, or a firewall stands before it"
    except OSError as error:
        return error.strerror or type(error).__name__


def _through(proxy: socket.socket, host: str, port: int) -> str:
    """Have a proxy connect; return why it does not, "" if it does."""
    proxy.sendall(_GREETING)
    if proxy.recv(2, socket.MSG_WAITALL) != b"\x05\x00":
        return "it is no SOCKS5 proxy, or wants a password"
    name = host.encode("idna")
    proxy.sendall(_CONNECT_TO_NAME + bytes([len(name)]) + name + port.to_bytes(2, "big"))
    reply = proxy.recv(4, socket.MSG_WAITALL)
    if len(reply) < 4:
        return "it has hung up"
    return f"it does not reach the server: {_REPLIES.get(reply[1], f'reply {reply[1]}')}" if reply[1] else ""


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
