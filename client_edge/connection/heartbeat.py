"""The control connection: its heartbeats go on while the data connection carries something large."""

import logging
import threading
import time
from collections.abc import Callable

from client_edge.connection.heard import heard
from splitfl.config.operation import LinkSection
from splitfl.errors import RemoteProtocolError, SplitflError
from splitfl.protocol import codec
from splitfl.protocol.codec import MAX_HEADER_BYTES
from splitfl.protocol.messages import Attach, Leave, Ping, Pong, Refusal, Shutdown
from splitfl.transport.zeromq import Endpoint

log = logging.getLogger(__name__)

# How long a wait lasts at most before it looks whether it is to end.
_POLL_S = 0.05
# How long ending waits for the thread.
_ENDING_S = 5.0


class Heartbeat:
    """A thread that tells the server we live, and knows whether the server does."""

    def __init__(self, connect: Callable[[LinkSection], Endpoint], session: str, bounds: LinkSection) -> None:
        self._connect = connect
        self._session = session
        self._bounds = bounds
        self._stopping = threading.Event()
        self._leave: Leave | None = None
        self.last_heard_s = time.monotonic()
        self.pong = Pong(number=0, waiting_for="", bytes_sent=0, bytes_received=0)
        self.fault: RemoteProtocolError | None = None
        """The rule that the server has broken on this connection, which ends by that."""
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def silent_s(self) -> float:
        """Seconds since the server's last sign of life."""
        return time.monotonic() - self.last_heard_s

    def stop(self, leave: Leave | None = None) -> None:
        """End the thread; `leave` is what to say when we go before the end."""
        self._leave = leave
        self._stopping.set()
        self._thread.join(timeout=_ENDING_S)

    def _beat(self) -> None:
        try:
            with self._connect(self._bounds) as endpoint:
                endpoint.bound_messages(num_bytes=MAX_HEADER_BYTES, num_frames=1)
                self._talk(endpoint)
        except RemoteProtocolError as error:
            self.fault = error
        except SplitflError as error:  # the silence that follows ends the wait on the data connection, if that lives
            log.info("the control connection ended: %s", error)

    def _talk(self, endpoint: Endpoint) -> None:
        endpoint.send(codec.encode(Attach(session=self._session)))
        number = 0
        while not self._stopping.is_set():
            number += 1
            endpoint.send(codec.encode(Ping(number=number)))
            self._listen(endpoint, time.monotonic() + self._bounds.heartbeat_interval)
        if self._leave is not None:
            endpoint.send(codec.encode(self._leave))

    def _listen(self, endpoint: Endpoint, until_s: float) -> None:
        while (left_s := until_s - time.monotonic()) > 0 and not self._stopping.is_set():
            frames = endpoint.recv(min(left_s, _POLL_S))
            if frames is None:
                continue
            match heard(frames, max_frame_bytes=self._bounds.frame_bytes):
                case Pong() as pong:
                    self.pong = pong
                    self.last_heard_s = time.monotonic()
                case Refusal() | Shutdown():
                    pass  # it comes on the data connection too, or that breaks
                case other:
                    raise RemoteProtocolError(f"{type(other).__name__} on the control connection")
