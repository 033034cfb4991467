"""A stop that was asked for, with Ctrl-C or SIGTERM: noted when it comes, acted on where nothing is half done.

An exception out of a signal handler comes anywhere: in the middle of an optimizer step, or where it is swallowed, as in
a `__del__`. So the signal is noted, by a thread of its own, and the code at work calls `StopRequest.check` between one
thing and the next. A second signal ends the process at once, whatever its other threads are doing.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

ENDED_AT_ONCE = 137
"""Exit code after a second signal: what a shell reports of a process that was killed, which this is as good as."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# `timeout` and others send one signal twice: to the process, and to its group.
_SAME_SIGNAL_S = 0.2
_LOOK_EVERY_S = 0.1
_SHOW_CURSOR = b"\x1b[?25h"  # a progress display has hidden it


class Terminated(KeyboardInterrupt):
    """SIGTERM: a command that has saved its state ends with 0 after it."""


class Stopped(KeyboardInterrupt):
    """A stop that came through at a safe point: no state is half changed."""


class _StoppedBySigterm(Stopped, Terminated):
    """Both."""


class StopRequest:
    """Whether a stop was asked for; any thread may ask and look."""

    def __init__(self) -> None:
        self.raises = False
        """Whether a first signal is raised in the main thread too, wherever that is: while nothing can be half done."""
        self.at_once: list[Callable[[], None]] = []
        """What is still to be done when a second signal ends the process; called from another thread."""
        self._number = 0
        self._asked_s = 0.0

    @property
    def is_asked(self) -> bool:
        """Whether somebody has asked."""
        return self._number != 0

    def ask(self, number: int = signal.SIGINT) -> None:
        """Ask for a stop, as this signal does."""
        self._number, self._asked_s = number, time.monotonic()

    def check(self) -> None:
        """Raise `Stopped` if a stop was asked for: to be called where nothing is half done."""
        if self._number == signal.SIGTERM:
            raise _StoppedBySigterm
        if self._number:
            raise Stopped

    def sleep(self, seconds: float) -> None:
        """Sleep, and raise `Stopped` as soon as a stop is asked for."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left_s, _LOOK_EVERY_S))
        self.check()

    def is_again(self) -> bool:
        """Tell whether a signal that comes now is a second one."""
        return self.is_asked and time.monotonic() - self._asked_s > _SAME_SIGNAL_S


@contextmanager
def on_signals(stop: StopRequest, name: str) -> Iterator[None]:
    """Note SIGINT and SIGTERM in `stop`, and let a second one end this process; for the main thread only.

    `name` is what the process is called in what it then says.
    """

    has_raised = False

    def interrupt(number: int, _frame: object) -> None:
        nonlocal has_raised
        if stop.raises and not has_raised:
            has_raised = True  # once, so that what it ends can clean up
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    wakened, wake = socket.socketpair()
    wake.setblocking(False)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    watcher = threading.Thread(target=_watch, args=(wakened, stop, name), name="signals", daemon=True)
    watcher.start()
    # written to at once, by whatever thread the signal finds, where a handler in Python waits for the main thread
    fd_before = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    try:
        for number in _SIGNALS:
            signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd_before, warn_on_full_buffer=False)
        wake.close()  # which ends the thread
        watcher.join()
        wakened.close()


def _watch(wakened: socket.socket, stop: StopRequest, name: str) -> None:
    while received := wakened.recv(64):  # what has come by now is one request
        number = next((number for number in received if number in _SIGNALS), None)
        if number is None:
            continue
        if stop.is_again():
            _end_at_once(stop, name)
        elif not stop.is_asked:
            if not stop.raises:
                _say(f"{name}: stopping where nothing is half done; another signal ends it at once\n")
            stop.ask(number)


def _end_at_once(stop: StopRequest, name: str) -> None:
    for last in stop.at_once:
        last()
    for descriptor in (1, 2):
        if os.isatty(descriptor):
            os.write(descriptor, _SHOW_CURSOR)
    _say(f"{name}: ended at once by a second signal; what is on disk is as after a kill\n")
    os._exit(ENDED_AT_ONCE)


def _say(text: str) -> None:
    """Write past Python's streams, whose locks another thread may hold."""
    with suppress(OSError):
        os.write(2, text.encode())
