"""Which clients generate with which caches, and whether there is room: pure state, time comes in as a number."""

from dataclasses import dataclass, field

from splitfl.config.operation import LinkSection
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Decode
from splitfl.telemetry.units import counted


@dataclass(slots=True)
class _Cache:
    rows: int
    length: int
    last_used_s: float

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(slots=True)
class _Caches:
    """The caches of one client."""

    open: dict[int, _Cache] = field(default_factory=dict)
    last_id: int = 0


class CacheBook:
    """The caches of all clients, as far as they can be counted without tensors."""

    def __init__(self, bounds: LinkSection) -> None:
        self._bounds = bounds
        self._clients: dict[str, _Caches] = {}

    def admit(self, client_id: str, message: Decode, now_s: float) -> str:
        """Take new positions in and return ""; or change nothing and return why they are declined.

        Raises `RemoteProtocolError` for rows that do not fit the cache's.
        """
        caches = self._clients.setdefault(client_id, _Caches())
        batch, num_new, _ = message.hidden_BSD.shape
        cache = caches.open.get(message.cache_id)
        _check_rows(message, batch, 0 if cache is None else cache.rows)
        if cache is None and message.cache_id <= caches.last_id:
            return (
                f"cache {message.cache_id} has ended, or nothing was asked of it for link.cache_timeout ="
                f" {self._bounds.cache_timeout:g} s: begin the generation anew"
            )
        length = num_new + (0 if cache is None else cache.length)
        if reason := self._objection(caches, message.cache_id, batch * length):
            return reason
        caches.open[message.cache_id] = _Cache(rows=batch, length=length, last_used_s=now_s)
        caches.last_id = max(caches.last_id, message.cache_id)
        return ""

    def _objection(self, caches: _Caches, cache_id: int, tokens: int) -> str:
        others = [cache for number, cache in caches.open.items() if number != cache_id]
        if len(others) >= self._bounds.max_caches:
            return (
                f"this client generates with {counted(len(others), 'cache')} already, and link.max_caches is"
                f" {self._bounds.max_caches}: let one of those generations end first"
            )
        if (total := tokens + sum(cache.tokens for cache in others)) > self._bounds.max_cache_tokens:
            return (
                f"a cache of {total} tokens (rows times positions, all generations of this client), more than"
                f" link.max_cache_tokens = {self._bounds.max_cache_tokens}: generate fewer or shorter rows at once"
            )
        return ""

    def has(self, client_id: str, cache_id: int) -> bool:
        """Tell whether a client generates with a cache."""
        return client_id in self._clients and cache_id in self._clients[client_id].open

    def ended(self, client_id: str, cache_id: int) -> None:
        """Take note that a cache is free."""
        if client_id in self._clients:
            self._clients[client_id].open.pop(cache_id, None)

    def forget(self, client_id: str) -> None:
        """Take note that a client's connection is gone, and all its caches with it."""
        self._clients.pop(client_id, None)

    def expired(self, now_s: float) -> list[tuple[str, int]]:
        """Return the caches, as (client, cache), that nothing was asked of for too long; they count as ended."""
        late = [
            (client_id, cache_id)
            for client_id, caches in self._clients.items()
            for cache_id, cache in caches.open.items()
            if now_s - cache.last_used_s > self._bounds.cache_timeout
        ]
        for client_id, cache_id in late:
            self.ended(client_id, cache_id)
        return late


def _check_rows(message: Decode, batch: int, cached_rows: int) -> None:
    beams_B = message.beams_B
    if beams_B and (len(beams_B) != batch or not all(0 <= row < cached_rows for row in beams_B)):
        raise RemoteProtocolError(f"beams_B must name one of {cached_rows} cached rows for each of {batch} rows")
    if not beams_B and cached_rows not in (0, batch):
        raise RemoteProtocolError(f"{batch} rows for a cache of {cached_rows}")
