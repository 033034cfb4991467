"""A router far away: takes TCP connections and passes them on, every byte as much later as it is told.

`python delay.py HOST:PORT TO_HOST:PORT SECONDS`. The kernel's own (`tc netem`) is not in every kernel. The bytes under
way are bounded, and a sender of too much is made to wait, as TCP is used to.
"""

import asyncio
import sys

_CHUNK_BYTES = 1 << 16
# Per direction and connection: more than a link of 20 Mbit/s has under way in 200 ms, by far.
_UNDER_WAY = 256


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter, delay_s: float) -> None:
    """Pass on what comes, later, until its end."""
    loop = asyncio.get_running_loop()
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_UNDER_WAY)

    async def take() -> None:
        data = b"-"
        while data:
            data = await source.read(_CHUNK_BYTES)
            await under_way.put((loop.time() + delay_s, data))

    async def give() -> None:
        while True:
            due_s, data = await under_way.get()
            await asyncio.sleep(due_s - loop.time())
            if not data:
                target.write_eof()
                return
            target.write(data)
            await target.drain()

    async with asyncio.TaskGroup() as both:
        both.create_task(take())
        both.create_task(give())


async def _serve(here: tuple[str, int], there: tuple[str, int], delay_s: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(delay_s)  # the handshake goes there and back too
        try:
            answers, forth = await asyncio.open_connection(*there)
        except OSError:
            writer.close()
            return
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(_pass_on(reader, forth, delay_s))
                both.create_task(_pass_on(answers, writer, delay_s))
        except* OSError:
            pass  # a peer that breaks off ends both ways
        finally:
            forth.close()
            writer.close()

    server = await asyncio.start_server(connected, *here)
    async with server:
        await server.serve_forever()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main(arguments: list[str]) -> None:
    """Pass on until we are ended."""
    here, there, seconds = arguments
    asyncio.run(_serve(_address(here), _address(there), float(seconds)))


if __name__ == "__main__":
    main(sys.argv[1:])
