"""Forwards one TCP connection and keeps what went each way: for captures, counts and a SOCKS server."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

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
        with contextlib.suppress(OSError):  # the peer that closes first ends both ways
            while chunk := source.recv(1 << 16):
                seen += chunk
                target.sendall(chunk)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Wait until both sides have hung up."""
        self._thread.join(_SOON_S)
        self._server.close()


class Cutter:
    """Stands before a port of loopback, forwards every connection, and cuts it once so many bytes went one way."""

    def __init__(
        self,
        port: int,
        *,
        up_bytes: int = 1 << 60,
        down_bytes: int = 1 << 60,
        greet: Callable[[socket.socket], None] = lambda _: None,
    ) -> None:
        """`greet` talks to whoever connects before the rest is forwarded."""
        self._target = port
        self._greet = greet
        self._left = {"up": up_bytes, "down": down_bytes}
        self._server = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._server.getsockname()[1])
        self.cut_at_s: list[float] = []
        """When connections were cut."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as server:
            self._greet(client)
            back = threading.Thread(target=self._pump, args=(server, client, self._left["down"]), daemon=True)
            back.start()
            self._pump(client, server, self._left["up"])
            back.join(_SOON_S)

    def _pump(self, source: socket.socket, target: socket.socket, left: int) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 14):
                left -= len(chunk)
                if left < 0:
                    self.cut_at_s.append(time.monotonic())
                    break
                target.sendall(chunk)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Take no further connection."""
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


class Lag:
    """Stands before a port of loopback and delivers everything this much later, at any rate: a long link."""

    def __init__(self, port: int, delay_s: float) -> None:
        self._target = port
        self._delay_s = delay_s
        self._server = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as server:
            threads = []
            for source, target in ((client, server), (server, client)):
                due: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
                threads += [
                    threading.Thread(target=self._take, args=(source, due), daemon=True),
                    threading.Thread(target=self._give, args=(target, due), daemon=True),
                ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _take(self, source: socket.socket, due: "SimpleQueue[tuple[float, bytes]]") -> None:
        chunk = b"more"
        while chunk:
            try:
                chunk = source.recv(1 << 16)
            except OSError:
                chunk = b""
            due.put((time.monotonic() + self._delay_s, chunk))

    def _give(self, target: socket.socket, due: "SimpleQueue[tuple[float, bytes]]") -> None:
        with contextlib.suppress(OSError):
            while True:
                at_s, chunk = due.get()
                time.sleep(max(0.0, at_s - time.monotonic()))
                if not chunk:
                    target.shutdown(socket.SHUT_RDWR)
                    return
                target.sendall(chunk)

    def close(self) -> None:
        """Take no further connection."""
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
