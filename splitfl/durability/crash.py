"""Ends the process at a named point, as a kill would: how the tests put a crash where it hurts most.

`SPLITFL_CRASH=commit-after-record:3` ends it the third time it comes by that point; several are separated by commas.
"""

import functools
import os
from collections import Counter

from splitfl.errors import ConfigError

_VARIABLE = "SPLITFL_CRASH"
_EXIT_CODE = 137  # what a shell reports of a process that was killed by SIGKILL
_passed: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """End the process at once, without any cleaning up, if the environment says so; else do nothing."""
    if _VARIABLE not in os.environ:
        return
    _passed[name] += 1
    if _wanted(os.environ[_VARIABLE]).get(name) == _passed[name]:
        os._exit(_EXIT_CODE)


@functools.lru_cache(maxsize=1)
def _wanted(text: str) -> dict[str, int]:
    wanted = {}
    for part in text.split(","):
        name, colon, count = part.partition(":")
        if not colon or not count.isdigit() or not int(count):
            raise ConfigError(f"{_VARIABLE}={text!r}: write POINT:N with N from 1, several separated by commas")
        wanted[name.strip()] = int(count)
    return wanted
