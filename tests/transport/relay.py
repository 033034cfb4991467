"""Forwards one TCP connection and keeps what went each way: for captures, counts and a SOCKS server."""

import contextlib
import socket
import threading
from collections.abc import Callable

_SOON_S = 10.0


class Relay:
    """Stands before a port of loopback."""

    def __init__(self, port: int, *, greet: Callable[[socket.socket], None] = lambda _: None) -> None:
        """`greet` talks to whoever connects before the rest is forwarded."""
        self._target = port
        self._greet = greet
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self.up, self.down = bytearray(), bytearray()
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._thread.start()

    def _forward(self) -> None:
        client, _ = self._server.accept()
        with client:
            self._greet(client)
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                back = threading.Thread(target=self._pump, args=(server, client, self.down), daemon=True)
                back.start()
                self._pump(client, server, self.up)
                back.join(_SOON_S)

    def _pump(self, source: socket.socket, target: socket.socket, seen: bytearray) -> None:
        with contextlib.suppress(OSError):  # whoever closes first ends both ways
            while chunk := source.recv(1 << 16):
                seen += chunk
                target.sendall(chunk)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Wait until both sides have hung up."""
        self._thread.join(_SOON_S)
        self._server.close()
