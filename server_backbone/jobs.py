"""Work on the compute thread, one job at a time in the order given, and what follows from it on the socket's thread."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Jobs:
    """A queue of work for one thread. Results are handed over in order, by whoever calls `finish`."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` is called from the compute thread when a job is done."""
        self._wake = wake
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="backbone")
        self._waiting: deque[tuple[Future[Any], Callable[[Any], None], Callable[[Exception], bool]]] = deque()

    def submit(
        self, work: Callable[[], T], then: Callable[[T], None], failed: Callable[[Exception], bool] = lambda _: False
    ) -> None:
        """Run `work` on the compute thread and `then(result)` here; `failed` says whether it dealt with an error."""
        future = self._executor.submit(work)
        self._waiting.append((future, then, failed))
        future.add_done_callback(lambda _: self._wake())

    def finish(self) -> None:
        """Hand over what is done; an error nobody deals with is raised here."""
        while self._waiting and self._waiting[0][0].done():
            future, then, failed = self._waiting.popleft()
            error = future.exception()
            if error is None:
                then(future.result())
            elif not isinstance(error, Exception) or not failed(error):
                raise error

    def close(self) -> None:
        """Wait for all that was submitted; what is decided and what is applied must not come apart."""
        self._executor.shutdown(wait=True)
