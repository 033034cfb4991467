"""The history of a process: every step invoked, acknowledged and applied, for a check of what was lost.

Written only where the settings ask for it (`server.history`, `client.history`); `benchmarks/history.py` reads it.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from splitfl.telemetry.metrics import MetricsLog

HISTORY_FILE = "history.jsonl"


class History:
    """Appends to `history.jsonl`, or does nothing; threads may share it, since a line is one write."""

    def __init__(self, folder: Path, *, is_on: bool, **who: Any) -> None:
        """`who` goes into every line."""
        self._log = MetricsLog(folder / HISTORY_FILE) if is_on else None
        self._who = {"process": os.getpid(), **who}

    @property
    def is_on(self) -> bool:
        """Whether anything is written, so that digests are worth their time."""
        return self._log is not None

    def note(self, event: str, **fields: Any) -> None:
        """Write one line."""
        if self._log is not None:
            self._log.emit(event, **self._who, **fields)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._log is not None:
            self._log.close()
