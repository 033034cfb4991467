"""The events of a run: one JSON object a line in `metrics.jsonl`, and their listeners."""

import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeAlias

from splitfl.errors import ConfigError, DataError, StorageError

Event: TypeAlias = dict[str, Any]
Listener: TypeAlias = Callable[[Event], None]


class MetricsLog:
    """Append events to a file and hand each to the listeners; use it from one thread.

    Each line leaves in one unbuffered write, so a killed process leaves whole lines and at most one torn last one.
    Opening a file that ends in a torn line cuts that line off and goes on after it.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        listeners: Iterable[Listener] = (),
    ) -> None:
        self.path = path
        self._clock = clock
        self._wall_clock = wall_clock
        self._listeners = list(listeners)
        self._file = _open_for_appending(path)
        self._opened_at_s = clock()

    def listen(self, listener: Listener) -> None:
        """Hand every later event to the listener too, after it has been written."""
        self._listeners.append(listener)

    def emit(self, event: str, **fields: Any) -> Event:
        """Write one event and return it as written: paths as text, numbers that are not finite as None.

        Raises `StorageError` when the disk does not take it.
        """
        record: Event = {"event": event, "time": self._wall_clock(), "elapsed_s": self._clock() - self._opened_at_s}
        record |= {name: jsonable(value) for name, value in fields.items()}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) < len(line):  # as much as there was room for
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._file.fileno(), before)  # or the next line would be glued to half a one
            raise StorageError.at(self.path, error) from None
        for listener in self._listeners:
            listener(record)
        return record

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(path: Path) -> list[Event]:
    """Read a metrics file, leaving out one torn last line; raise `DataError` for anything else that is no event."""
    try:
        *lines, tail = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; give the metrics.jsonl of a run") from None
    events = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    return [*events, json.loads(tail)] if _is_whole(tail) else events


def jsonable(value: Any) -> Any:
    """Turn paths into text, tuples into lists and numbers that are not finite into None, at any depth."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case PurePath():
            return str(value)
        case Mapping():
            return {str(key): jsonable(inner) for key, inner in value.items()}
        case list() | tuple():
            return [jsonable(inner) for inner in value]
        case _:
            return value


def _open_for_appending(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _mend_tail(path)
        return path.open("ab", buffering=0)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}; choose a folder you may write to") from None


def _mend_tail(path: Path) -> None:
    """Make the file end with a whole line, or the next event would be glued to a torn one."""
    content = path.read_bytes()
    tail = content[content.rfind(b"\n") + 1 :]
    if _is_whole(tail):
        path.write_bytes(content + b"\n")
    elif tail:
        with path.open("r+b") as file:
            file.truncate(len(content) - len(tail))


def _is_whole(tail: bytes) -> bool:
    """Tell a line that lacks only its newline from a torn one: an object cut short never parses."""
    try:
        return isinstance(json.loads(tail), dict)
    except ValueError:
        return False


def _parse(line: bytes, where: str) -> Event:
    try:
        event = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); the file was changed after the run wrote it") from None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise DataError(f"{where}: not an event: {event!r:.80}; each line is an object with the field `event`")
    return event
