"""Ends or holds up the process at a named point: how the tests put a crash, or a signal, where it hurts most.

`SPLITFL_CRASH=commit-after-record:3` ends it, as a kill would, the third time it comes by that point.
`SPLITFL_PAUSE=optimizer-tensor:3:2.5` says on standard error that it pauses there. It sleeps for 2.5 s, or until the
file that `SPLITFL_GO` names is there. So a test holds a process up for as long as it needs, and no longer. Several
points are separated by commas.
"""

import functools
import os
import re
import time
from collections import Counter
from pathlib import Path

from splitfl.errors import ConfigError

_CRASH, _PAUSE, _GO = "SPLITFL_CRASH", "SPLITFL_PAUSE", "SPLITFL_GO"
_LOOK_EVERY_S = 0.02
_EXIT_CODE = 137  # what a shell reports of a process that was killed by SIGKILL
_passed: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """End the process at once, without any cleaning up, or sleep, if the environment says so; else do nothing."""
    if _CRASH not in os.environ and _PAUSE not in os.environ:
        return
    _passed[name] += 1
    if (name, _passed[name]) in _wanted(_CRASH, os.environ.get(_CRASH, "")):
        os._exit(_EXIT_CODE)
    pause_s = _wanted(_PAUSE, os.environ.get(_PAUSE, "")).get((name, _passed[name]))
    if pause_s:
        os.write(2, f"paused at {name}\n".encode())
        _pause(pause_s)


def _pause(seconds: float) -> None:
    go = Path(os.environ[_GO]) if _GO in os.environ else None
    ends_s = time.monotonic() + seconds
    while (left_s := ends_s - time.monotonic()) > 0 and not (go and go.exists()):
        time.sleep(min(left_s, _LOOK_EVERY_S))


@functools.lru_cache(maxsize=2)
def _wanted(variable: str, text: str) -> dict[tuple[str, int], float]:
    """Return the seconds to sleep (0 for a crash) by point and how often it was come by."""
    form = re.compile(r"\s*([^:]+):([1-9]\d*)" + (r":(\d+(?:\.\d+)?)\s*" if variable == _PAUSE else r"\s*()"))
    wanted = {}
    for part in text.split(",") if text else ():
        found = form.fullmatch(part)
        if found is None:
            written = "POINT:N:SECONDS" if variable == _PAUSE else "POINT:N"
            raise ConfigError(f"{variable}={text!r}: write {written} with N from 1, several separated by commas")
        wanted[found[1], int(found[2])] = float(found[3] or 0.0)
    return wanted
