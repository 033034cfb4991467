"""Generating with the backbone on a server: its blocks, and their cache, as the stand-in sees them.

Shapes: B rows, S new positions, D hidden width.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from client_edge.connection.connection import Connection
from splitfl.errors import ModelError, Refused, TransportError
from splitfl.models.remote_cache import lengths_of
from splitfl.protocol.messages import Declined, ForwardDone
from splitfl.protocol.roles import Role
from splitfl.session.client_session import ClientSession

T = TypeVar("T")


class RemoteGenerator:
    """The backbone of a server, for generating only: one generation at a time, from any thread."""

    def __init__(self, connection: Connection, call: Callable[[Callable[[], T]], T] = lambda work: work()) -> None:
        """Take a connection that has resumed, and how to run what uses it where the caller's thread may not."""
        self._connection = connection
        self._call: Callable[[Callable[[], Any]], Any] = call
        self._busy = threading.Lock()
        self._under_way: dict[int, threading.Thread] = {}
        self._to_end: deque[tuple[ClientSession, int]] = deque()

    def __call__(
        self, hidden_BSD: Tensor, mask_BS: Tensor | None, position_ids_BS: Tensor | None, *, training: bool
    ) -> Tensor:
        """Run a whole text through; only a text that begins anew is asked for, so it is a cache of one use."""
        if torch.is_grad_enabled() or training:
            raise ModelError(
                "this model is for generating: train with `splitfl client`, or call it in eval mode under"
                " torch.no_grad()"
            )
        cache = self.new_cache()
        try:
            return cache.decode(hidden_BSD, lengths_of(hidden_BSD, mask_BS), ())
        finally:
            cache.end()

    def new_cache(self, *, adapters_off: bool = False) -> "GenerationCache":
        """Return a new generation's cache; the server makes its part with the first positions."""
        return GenerationCache(self, adapters_off=adapters_off)

    @contextmanager
    def alone(self) -> Iterator[Connection]:
        """Lend the connection to the one thread that generates; raise `ModelError` for a second one."""
        others = [thread for thread in self._under_way.values() if thread is not threading.current_thread()]
        if any(thread.is_alive() for thread in others) or not self._busy.acquire(blocking=False):
            raise ModelError(
                "two generations at once on one session: wait for the other thread's to end, or generate its prompts in"
                " one batch"
            )
        try:
            self._end_caches()
            yield self._connection
        finally:
            self._busy.release()

    def ask(self, work: Callable[[], Tensor]) -> Tensor:
        """Do what uses the connection, where that is to be done."""
        answer_BSD: Tensor = self._call(work)
        return answer_BSD

    def began(self, cache_id: int) -> None:
        """Take note that this thread generates."""
        self._under_way[cache_id] = threading.current_thread()

    def ended(self, session: ClientSession, cache_id: int) -> None:
        """Have a cache freed: now if nobody uses the connection, else before the next positions.

        A generation's end is the end of an object, which may come at any moment and in any thread.
        """
        self._under_way.pop(cache_id, None)
        self._to_end.append((session, cache_id))
        if self._busy.acquire(blocking=False):
            try:
                self._end_caches()
            finally:
                self._busy.release()

    def _end_caches(self) -> None:
        while self._to_end:
            session, cache_id = self._to_end.popleft()
            if session is self._connection.session and not self._connection.is_closed:
                with suppress(TransportError):  # a connection that is lost takes its caches with it
                    self._call(partial(self._connection.send, session.end_cache(cache_id)))


class GenerationCache:
    """One generation's cache on a server."""

    def __init__(self, remote: RemoteGenerator, *, adapters_off: bool) -> None:
        self._remote = remote
        self._adapters_off = adapters_off
        self._session: ClientSession | None = None
        self._id = 0

    def decode(self, hidden_BSD: Tensor, lengths_B: tuple[int, ...], beams_B: tuple[int, ...]) -> Tensor:
        """Run new positions: one round trip, or several for a prompt that is too long for one message."""
        with self._remote.alone() as connection:
            self._begin_on(connection)
            most = max(1, connection.session.terms.max_new_positions // hidden_BSD.shape[0])
            got: list[Tensor] = []
            for piece_BSD, now_B in _pieces(hidden_BSD.detach(), lengths_B, most):
                beams = () if got else beams_B
                got.append(self._remote.ask(partial(self._decode, connection, piece_BSD, now_B, beams)))
        return torch.cat(got, dim=1).to(hidden_BSD.device)

    def _begin_on(self, connection: Connection) -> None:
        if self._session is None:
            self._session, self._id = connection.session, connection.session.new_cache()
            self._remote.began(self._id)
        if self._session is not connection.session:
            raise Refused("the session in which this generation began has ended, and its cache with it: begin it anew")

    def _decode(
        self, connection: Connection, hidden_BSD: Tensor, lengths_B: tuple[int, ...], beams_B: tuple[int, ...]
    ) -> Tensor:
        """Return the backbone's activations of new positions; raise `Refused` when the server declines."""
        frames = connection.tensors.pack(Role.NEW_POSITIONS, hidden_BSD)
        connection.send(
            connection.session.decode(self._id, frames, lengths_B, beams_B, adapters_off=self._adapters_off)
        )
        match connection.answer("the next token", ForwardDone, Declined):
            case ForwardDone(hidden_BSD=answer_BSD):
                return connection.tensors.unpack(Role.NEW_POSITIONS, answer_BSD)
            case Declined(reason=reason):
                raise Refused(f"{connection.address} declined: {reason}")

    def end(self) -> None:
        """Free the cache."""
        session, self._session = self._session, None
        if session is not None:
            self._remote.ended(session, self._id)


def _pieces(hidden_BSD: Tensor, lengths_B: tuple[int, ...], most: int) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Cut rows, padded on the left, into pieces of `most` positions, and say how many of each row's are no padding."""
    num_later, left_B = hidden_BSD.shape[1], lengths_B
    for piece_BSD in hidden_BSD.split(most, dim=1):
        num_later -= piece_BSD.shape[1]
        now_B = tuple(max(0, left - num_later) for left in left_B)
        yield piece_BSD, now_B
        left_B = tuple(left - now for left, now in zip(left_B, now_B, strict=True))
