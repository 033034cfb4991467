"""A TCP proxy that harms what goes through it: delay, rate, cuts, silence in one or both directions, flipped bits.

It runs in a thread of its own and takes its draws from a seed. It cannot duplicate: TCP would not let it.
"""

import asyncio
import random
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import Literal

Direction = Literal["up", "down"]
_CHUNK_BYTES = 1 << 15


@dataclass(slots=True)
class Harm:
    """The harm to one direction; times are of `time.monotonic`."""

    delay_s: float = 0.0
    bytes_per_second: float = 0.0
    """0 means as fast as it goes; shared by all connections."""
    silent_until_s: float = 0.0
    flips: int = 0
    """Chunks still to come in which one bit is flipped."""
    free_at_s: float = 0.0


class ChaosProxy:
    """Forwards a port of loopback to another, and harms it on request; usable from any thread."""

    def __init__(self, target_port: int, *, seed: int = 0) -> None:
        self._target_port = target_port
        self._draw = random.Random(seed)
        self.harm: dict[Direction, Harm] = {"up": Harm(), "down": Harm()}
        self.connections = 0
        """Accepted so far."""
        self.flipped = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listening.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    def silence(self, seconds: float, *directions: Direction) -> None:
        """Let nothing through for a while, both ways if none is named; what comes meanwhile comes later."""
        for direction in directions or ("up", "down"):
            self.harm[direction].silent_until_s = time.monotonic() + seconds

    def cut(self) -> None:
        """Reset all connections, now."""
        self._loop.call_soon_threadsafe(self._cut)

    def heal(self) -> None:
        """Do no harm any more."""
        self.harm = {"up": Harm(), "down": Harm()}

    def close(self) -> None:
        """End it, and all connections."""
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, sock=self._listening))
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def _cut(self) -> None:
        for writer in self._writers:
            connection = writer.get_extra_info("socket")
            if connection is not None and connection.fileno() >= 0:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            self._writers.discard(writer)
            writer.close()
            return
        self._writers.add(back)
        try:
            await asyncio.wait(
                [
                    asyncio.ensure_future(self._copy(reader, back, "up")),
                    asyncio.ensure_future(self._copy(there, writer, "down")),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for end in (writer, back):
                self._writers.discard(end)
                end.close()

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, direction: Direction) -> None:
        try:
            while data := await source.read(_CHUNK_BYTES):
                await self._hold(len(data), direction)
                target.write(self._flip(data, direction))
                await target.drain()
        except OSError:
            return

    async def _hold(self, num_bytes: int, direction: Direction) -> None:
        harm = self.harm[direction]
        if harm.delay_s:
            await asyncio.sleep(harm.delay_s)
        if harm.bytes_per_second:
            now_s = time.monotonic()
            harm.free_at_s = max(harm.free_at_s, now_s) + num_bytes / harm.bytes_per_second
            await asyncio.sleep(harm.free_at_s - now_s)
        while (left_s := self.harm[direction].silent_until_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, 0.1))

    def _flip(self, data: bytes, direction: Direction) -> bytes:
        harm = self.harm[direction]
        if not harm.flips:
            return data
        harm.flips -= 1
        self.flipped += 1
        at, bit = self._draw.randrange(len(data)), 1 << self._draw.randrange(8)
        return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
