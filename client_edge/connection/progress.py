"""How far a large transfer is, said from time to time."""

from collections.abc import Callable

from splitfl.telemetry.units import format_bytes

_EVERY_S = 3.0


class Progress:
    """One transfer; the caller owns the clock."""

    def __init__(self, verb: str, total: int, say: Callable[[str], None], *, begun_at: int, now_s: float) -> None:
        """`verb` is "received" or "sent"; the first bytes may have gone before."""
        self._verb, self._total, self._say = verb, total, say
        self._last = begun_at
        self._last_s = now_s

    def at(self, num_bytes: int, *, now_s: float) -> None:
        """Say it, if some seconds have passed."""
        passed_s = now_s - self._last_s
        if passed_s < _EVERY_S:
            return
        rate = max(0, num_bytes - self._last) / passed_s
        self._say(f"{self._verb} {format_bytes(num_bytes)} of {format_bytes(self._total)}, {format_bytes(int(rate))}/s")
        self._last, self._last_s = num_bytes, now_s


class Arriving:
    """A message that the server has put on the connection and that is not whole; the caller owns the clock.

    A message is there only when its last frame is, so until then the connection's own counter tells how far it is.
    """

    def __init__(self, begun_at: int | None, say: Callable[[str], None]) -> None:
        """`begun_at` is what the connection had received when the wait began, None where that is not known."""
        self._begun_at, self._say = begun_at, say
        self._total = 0
        self._progress: Progress | None = None

    def at(self, total: int, received: int, *, now_s: float) -> None:
        """Say how much of `total` is here; `received` is what the connection has received by now."""
        self._begun_at = received if self._begun_at is None else self._begun_at
        here = received - self._begun_at
        if self._progress is None or total != self._total:
            self._total = total
            self._progress = Progress("received", total, self._say, begun_at=here, now_s=now_s)
        if here < total:
            self._progress.at(here, now_s=now_s)
