"""Ends a client's connection to a server that sends a message without end, before it fills the client's memory.

`watch` does the same for a server: libzmq keeps the frames of a multipart message until the last has come, and the
application sees nothing of it. Here it is one connection, and its bound is known more exactly, since a client is sent
little that it has not asked for. Linux only.
"""

import threading
import time

from splitfl.transport.watch import HANDSHAKE_BYTES, HEARTBEAT_BYTES, SETTLE_S, peer_of, read_by_zeromq, shut_down

_INTERVAL_S = 0.05


class Lookout:
    """A thread that follows one connection; it begins when there is one."""

    def __init__(self, *, heartbeat_s: float) -> None:
        self._heartbeat_s = heartbeat_s
        self.message_bytes = 0
        """The most that a message takes on the connection, framing included."""
        self.waiting_bytes = 0
        """The most that all messages take which may wait there unread, the one that is arriving included."""
        self.excess = 0
        """Bytes without the end of a message for which the connection was ended, 0 while it was not."""
        self._lock = threading.Lock()
        self._descriptor = -1
        self._peer = ("", 0)
        self._baseline = 0
        self._heard_s = self._emptied_s = 0.0
        self._too_much_since_s: float | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def connected(self, descriptor: int) -> None:
        """Follow this connection from now on."""
        with self._lock:
            self._descriptor, self._peer = descriptor, peer_of(descriptor)
            # what came before this was told has been taken already, or counts as if it had
            self._baseline = read_by_zeromq(descriptor)
            self._heard_s, self._too_much_since_s = time.monotonic(), None
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lookout", daemon=True)
            self._thread.start()

    def heard(self) -> None:
        """Take note that a whole message was taken from the socket."""
        with self._lock:
            self._baseline = read_by_zeromq(self._descriptor) or self._baseline
            self._heard_s = time.monotonic()
            self._too_much_since_s = None

    def emptied(self) -> None:
        """Take note that no whole message waits in the socket."""
        self._emptied_s = time.monotonic()

    def stop(self) -> None:
        """End the thread; twice is fine."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while not self._stopping.wait(_INTERVAL_S) and not self.excess:
            with self._lock:
                self._judge(time.monotonic())

    def _judge(self, now_s: float) -> None:
        num_bytes = read_by_zeromq(self._descriptor) - self._baseline
        beside = HANDSHAKE_BYTES + HEARTBEAT_BYTES * (now_s - self._heard_s) / self._heartbeat_s
        if num_bytes <= self.message_bytes + beside:
            self._too_much_since_s = None
            return
        if self._too_much_since_s is None:
            self._too_much_since_s = now_s
        # whole messages are in the queue by then, and would have been found there
        is_of_one_message = self._emptied_s - self._too_much_since_s > SETTLE_S
        if is_of_one_message or num_bytes > self.waiting_bytes + beside:
            self.excess = num_bytes
            shut_down(self._descriptor, self._peer)
