"""Errors of torch and of the system while something is done for one client: its affair, and nobody else's.

What was under way is held by an error's traceback; so a `Mishap` is raised when that is gone, and keeps words alone.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from splitfl.errors import Incomplete
from splitfl.telemetry.units import printable

T = TypeVar("T")

log = logging.getLogger(__name__)

_MOST_WORDS = 200
# torch's allocator on a CPU raises a plain RuntimeError that says so
_ALLOCATORS = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")
_ERRORS = (RuntimeError, MemoryError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, OSError)


class Mishap(Exception):  # noqa: N818  # nobody has broken a rule
    """Something could not be done for one client."""

    def __init__(self, reason: str, *, is_memory: bool) -> None:
        """`is_memory` says that there was too little memory: smaller pieces may fit."""
        super().__init__(reason)
        self.is_memory = is_memory


def done_for(work: Callable[[], T], what: str) -> T:
    """Do something for one client; raise `Mishap` if torch or the system could not. `what` begins the sentence."""
    try:
        return work()
    except _ERRORS as error:
        is_memory, words = _is_memory(error), _words(error)
        if not is_memory:
            log.warning("%s", what, exc_info=True)
    _give_memory_back()
    raise Mishap(f"{what}: {words}", is_memory=is_memory)


def done_for_all(work: Callable[[], T], what: str) -> T:
    """Do something that the run cannot go on without; raise `Incomplete` where memory is too little for it."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not _is_memory(error):
            raise
        words = _words(error)
    raise Incomplete(
        f"{what}: {words}; acknowledged steps are written down, so the same command goes on with them when there is"
        " more memory"
    )


def _is_memory(error: Exception) -> bool:
    is_ours = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_ours or (isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATORS))


def _words(error: Exception) -> str:
    """Say what went wrong; the system's errors name files, which are nobody else's affair."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    line = (str(error).strip().splitlines() or [""])[0]
    return printable(line, _MOST_WORDS) or type(error).__name__


def _give_memory_back() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
