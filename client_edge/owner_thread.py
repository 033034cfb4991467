"""A thread that owns what may be used from one thread only."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class OwnerThread:
    """Does one thing after the other, for callers in any thread; they wait for it.

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
        future: Future[T] = Future()
        self._asked.put((work, future))
        return future.result()

    def end(self) -> None:
        """End the thread behind what it was asked for."""
        self._asked.put(None)

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            work, future = asked
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  # whatever it is, it is the caller's
                future.set_exception(error)
