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
