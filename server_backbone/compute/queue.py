"""Work for the compute thread: one piece at a time in the order given, and the results in the same order."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar


class Work(Protocol):
    """A piece of work: data, whose meaning the worker knows."""

    @property
    def asked_by(self) -> str:
        """The client whose message asks for it, "" for none."""

    @property
    def always(self) -> bool:
        """Whether it is done also when everything that has not begun is dropped."""


W = TypeVar("W", bound=Work)


Doers: TypeAlias = Mapping[type[W], Callable[[Any], Any]]
"""Who does which type of work."""


class _Dropped(Exception):  # noqa: N818  # no error: nobody waits for it any more
    """Work that had not begun when everything was stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Generic[W]):
    """A piece of work and its result, or the error that it ended with."""

    work: W
    result: Any = None
    error: Exception | None = None


class Queue(Generic[W]):
    """Work for one thread. The caller of `done` hands its results over in order."""

    def __init__(self, doers: Doers[W], after: Callable[[], None], wake: Callable[[], None]) -> None:
        """All run on the compute thread: the doer of a piece, by its type, then `after`, then `wake`."""
        self._doers = doers
        self._after = after
        self._wake = wake
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="backbone")
        self._waiting: deque[tuple[W, Future[Any]]] = deque()
        self._is_closed = False
        self._drops = False
        self._num_asked_by: Counter[str] = Counter()
        self.is_quiet = False
        """Whether the compute thread has ended."""

    def put(self, work: W) -> None:
        """Have this done after all that was put before; once the queue is closed, never."""
        if self._is_closed:
            return  # what follows from the last results follows when the run goes on
        future = self._executor.submit(self._run, work)
        self._waiting.append((work, future))
        self._num_asked_by[work.asked_by] += 1
        future.add_done_callback(lambda _: self._wake())

    def num_asked_by(self, client_id: str) -> int:
        """Return how much work of a client waits, or waits to be handed over."""
        return self._num_asked_by[client_id]

    def done(self) -> Iterator[Done[W]]:
        """Hand over what is done; raise what is no `Exception`."""
        while self._waiting and self._waiting[0][1].done():
            work, future = self._waiting.popleft()
            self._num_asked_by[work.asked_by] -= 1
            error = future.exception()
            if isinstance(error, _Dropped):
                continue
            if error is None:
                yield Done(work=work, result=future.result())
            elif isinstance(error, Exception):
                yield Done(work=work, error=error)
            else:
                raise error

    def close(self, *, drops: bool = False) -> None:
        """Take no more, and wait for what was put, or if the rest `drops` for the piece at hand; twice is fine.

        A decided step and its being applied must not come apart: the second is to be done `always`.
        """
        self._is_closed = True
        self._drops = drops
        self._executor.shutdown(wait=True)
        self.is_quiet = True

    def _run(self, work: W) -> Any:
        if self._drops and not work.always:
            raise _Dropped
        try:
            return self._doers[type(work)](work)
        finally:
            self._after()
