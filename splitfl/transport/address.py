"""Which addresses may be used."""

import ipaddress
import re

from splitfl.errors import TransportError

SCHEMES = ("tcp", "ipc", "inproc")


def check_address(address: str, *, has_keys: bool = False) -> None:
    """Raise `TransportError` unless the address is of a known scheme, and stays on this machine or `has_keys`."""
    scheme, found, rest = address.partition("://")
    if not found or scheme not in SCHEMES or not rest:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise TransportError(f"address {address!r}: write one of {known} followed by where, e.g. tcp://127.0.0.1:5555")
    if scheme == "ipc" and rest.startswith(("@", "*")):
        raise TransportError(
            f"address {address!r}: write ipc://PATH with the path of a file, whose rights say who may join"
        )
    if scheme != "tcp":
        return
    match = re.fullmatch(r"(\[[^\]]+\]|[^:\[\]]+):(\d{1,5}|\*)", rest)
    if match is None or (match[2] != "*" and not 0 < int(match[2]) < 1 << 16):
        raise TransportError(f"address {address!r}: write tcp://HOST:PORT with a port from 1 to 65535")
    if not has_keys and not _is_loopback(match[1].strip("[]")):
        raise TransportError(
            f"address {address!r} is not on this machine, and there are no keys: without them anyone could join and"
            " read along. Make keys with `splitfl keygen` and name their folder (server.keys; client.keys and"
            " client.enrolment), or use tcp://127.0.0.1:PORT or ipc://PATH"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
