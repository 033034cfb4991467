"""A server that lies in one thing at a time: an honest one, and between it and the client a listener of our own.

What the honest server says is decoded, changed where the lie is, and said to the client by the lying one; so all else
is as the protocol has it, and the client is the real program.
"""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from conftest import free_port

from splitfl.errors import SplitflError
from splitfl.protocol import codec
from splitfl.protocol.messages import Buffer, Message
from splitfl.transport.zeromq import Endpoint, Listener

Lie: TypeAlias = Callable[[Message], Message | Iterable[Message]]
"""What to say instead of a message; the message itself where it is not the subject."""

_FRAME_BYTES = 1 << 18


@dataclass
class LyingServer:
    """Stands before a server on loopback, and tells every client the same lie."""

    honest_port: int
    lie: Lie
    port: int = field(default_factory=free_port)
    heard: list[str] = field(default_factory=list)
    """Kinds of the client's messages, in order."""

    def __enter__(self) -> "LyingServer":
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._stand, name="lying-server", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(timeout=10.0)

    def _stand(self) -> None:
        link = {"max_frame_bytes": _FRAME_BYTES, "heartbeat_interval": 2.0, "heartbeat_timeout": 60.0}
        honest: dict[bytes, Endpoint] = {}
        with Listener(f"tcp://127.0.0.1:{self.port}", **link) as listener:  # type: ignore[arg-type]
            while not self._stopping.is_set():
                arrived = listener.recv(0.005)
                if arrived is not None and arrived.frames:
                    end = honest.get(arrived.peer)
                    if end is None:
                        end = honest[arrived.peer] = Endpoint(f"tcp://127.0.0.1:{self.honest_port}", **link)  # type: ignore[arg-type]
                    self.heard.append(type(_read(arrived.frames)).__name__)
                    end.send([bytes(frame) for frame in arrived.frames])
                for peer, end in list(honest.items()):
                    try:
                        self._pass_on(listener, peer, end)
                    except SplitflError:  # one of the two has gone
                        end.close()
                        del honest[peer]
        for end in honest.values():
            end.close()

    def _pass_on(self, listener: Listener, peer: bytes, end: Endpoint) -> None:
        while (frames := end.recv(0.0)) is not None:
            said = self.lie(_read(frames))
            for message in [said] if not isinstance(said, Iterable) else said:
                listener.send(peer, codec.encode(message))
                if self._stopping.is_set():
                    return
                time.sleep(0)  # so that the thread of a test goes on beside endless messages


def _read(frames: list[memoryview] | list[Buffer]) -> Message:
    return codec.decode([bytes(frame) for frame in frames], max_frame_bytes=_FRAME_BYTES)
