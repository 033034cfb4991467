"""Counts what a client and its server send each other: a TCP relay on loopback, one for each client.

Every arm goes through the same relay, so bytes are counted in the same way. All bytes that are written to the sockets
count, framing, heartbeats and HTTP headers included, and TCP's own headers not.
"""

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 1 << 20


class Relay:
    """Listens on `port` and hands on to another port of loopback; `up` and `down` are bytes so far."""

    def __init__(self, target_port: int) -> None:
        self.up = 0
        self.down = 0
        self._target_port = target_port
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listening.getsockname()[1])
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept_on, name="relay", daemon=True).start()
        return self

    def __exit__(self, _k: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        for open_socket in [self._listening, *self._sockets]:
            with suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)
            open_socket.close()

    def _accept_on(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:  # closed
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target_port))
            except OSError:  # nobody there yet: the client tries again
                near.close()
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [near, far]
            for source, target, is_up in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._copy, args=(source, target, is_up), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, is_up: bool) -> None:
        buffer = bytearray(_CHUNK_BYTES)
        view = memoryview(buffer)
        with suppress(OSError):
            while count := source.recv_into(view):
                with self._lock:
                    self.up += count * is_up
                    self.down += count * (not is_up)
                target.sendall(view[:count])
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
