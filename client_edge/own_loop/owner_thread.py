"""A thread that owns what may be used from one thread only."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

# How long ending may wait for a call that was interrupted, and may be trying to reach a server that is gone.
_PATIENCE_S = 5.0


class OwnerThread:
    """Does one thing after the other for callers in any thread, who wait for it.

    torch runs the backward of a GPU's graph in a thread of its own, and a socket must stay in the thread that made it.
    A `ThreadPoolExecutor` would do, but it takes no more work once the interpreter begins to end, when there is still a
    goodbye to say.
    """

    def __init__(self, name: str) -> None:
        self._asked: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def call(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, or raise what it raises, run in the thread."""
        if threading.current_thread() is self._thread:
            return work()
        return self._ask(work).result()

    def end(self, last: Callable[[], object] = lambda: None) -> None:
        """Do this last, and end; the thread's present work may take long, and is not waited for beyond some seconds."""
        if threading.current_thread() is self._thread:
            last()
        else:
            wait([self._ask(last)], _PATIENCE_S)
        self._asked.put(None)

    def _ask(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._asked.put((work, future))
        return future

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            work, future = asked
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  # whatever it is, it is the caller's
                future.set_exception(error)
