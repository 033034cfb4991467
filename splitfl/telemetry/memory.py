"""Memory of this process and of others, in bytes."""

import re
import sys
from pathlib import Path
from typing import Any


def rss_bytes() -> int:
    """Return what this process holds in memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Return the most this process has held in memory since it started.

    On Linux this is VmHWM: `ru_maxrss` outlives fork and exec, so a small child of a
    large parent would report its parent.
    """
    status = Path("/proc/self/status")
    line = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(line[1]) * 1024 if line else _peak_without_proc()


def pss_bytes(pid: int) -> int:
    """Return a process's memory with shared pages divided among their users; RSS where unknown, 0 when it is gone."""
    import psutil

    try:
        return _pss_or_rss(psutil.Process(pid))
    except psutil.NoSuchProcess:  # a zombie too: it holds nothing
        return 0


def _pss_or_rss(process: Any) -> int:
    import psutil

    try:
        full = process.memory_full_info()
    except psutil.AccessDenied:  # another user's process
        return int(process.memory_info().rss)
    return int(getattr(full, "pss", full.rss))


def _peak_without_proc() -> int:
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, kibibytes elsewhere
