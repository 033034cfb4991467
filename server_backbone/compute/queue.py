"""Work on the compute thread, one job at a time in the order given, and what follows from it on the socket's thread."""

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class _Dropped(Exception):  # noqa: N818  # no error: nobody waits for it any more
    """A job that had not begun when everything was stopped."""


class Jobs:
    """A queue of work for one thread. Results are handed over in order, by whoever calls `finish`."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` is called from the compute thread when a job is done."""
        self._wake = wake
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="backbone")
        self._waiting: deque[tuple[Future[Any], Callable[[Any], None], Callable[[Exception], bool], str]] = deque()
        self._is_closed = False
        self._drops = False
        self.is_quiet = False
        """Whether the compute thread has ended."""
        self._num_asked_by: Counter[str] = Counter()

    def submit(
        self,
        work: Callable[[], T],
        then: Callable[[T], None],
        failed: Callable[[Exception], bool] = lambda _: False,
        *,
        always: bool = False,
        asked_by: str = "",
    ) -> None:
        """Run `work` on the compute thread and `then(result)` here; `failed` says whether it dealt with an error.

        What is to be done `always` is also done when everything behind the job at hand is dropped;
        `asked_by` is the client whose message asks for it.
        """
        if self._is_closed:
            return  # what follows from the last results follows when the run goes on

        def undropped() -> T:
            if self._drops and not always:
                raise _Dropped
            return work()

        future = self._executor.submit(undropped)
        self._waiting.append((future, then, failed, asked_by))
        self._num_asked_by[asked_by] += 1
        future.add_done_callback(lambda _: self._wake())

    def num_asked_by(self, client_id: str) -> int:
        """Return how many jobs of a client wait, or wait to be finished."""
        return self._num_asked_by[client_id]

    def finish(self) -> None:
        """Hand over what is done; an error nobody deals with is raised here."""
        while self._waiting and self._waiting[0][0].done():
            future, then, failed, client_id = self._waiting.popleft()
            self._num_asked_by[client_id] -= 1
            error = future.exception()
            if error is None:
                then(future.result())
            elif isinstance(error, _Dropped):
                continue
            elif not isinstance(error, Exception) or not failed(error):
                raise error

    def close(self, *, drops: bool = False) -> None:
        """Take no more, and wait for what was submitted, or if the rest `drops` for the job at hand; twice is fine.

        What is decided and what is applied must not come apart: the second is to be done `always`.
        """
        self._is_closed = True
        self._drops = drops
        self._executor.shutdown(wait=True)
        self.is_quiet = True
