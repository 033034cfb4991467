"""One folder with generations: a snapshot, and the log of what happened since.

`snapshot-N.bin` is one record, and `log-N.bin` holds the records after it. A new snapshot begins generation N + 1. The
generation before it stays, so a damaged snapshot has a predecessor, whose log leads to the same moment.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from splitfl.durability.crash import crash_point
from splitfl.durability.disk import Appending, Disk, RealDisk
from splitfl.durability.format import check_format, write_format
from splitfl.durability.record import Damaged, Record, pack, unpack
from splitfl.errors import ConfigError, StorageError

_SNAPSHOT = re.compile(r"snapshot-(\d{8})\.bin")
_KEPT = re.compile(r"kept-(\d{8})\.bin")


@dataclass(slots=True, kw_only=True)
class Recovered:
    """Where the records end: a snapshot and what happened since, in order."""

    snapshot: Record | None = None
    entries: Iterator[Record] = field(default_factory=lambda: iter(()))
    notes: list[str] = field(default_factory=list)
    """Sentences for the operator."""


class Store:
    """Records of one process; one thread at a time uses it. Raises `StorageError` for whatever the disk does."""

    def __init__(
        self,
        folder: Path,
        *,
        fsync: Literal["always", "interval", "never"],
        fsync_interval: float,
        keep: int,
        disk: Disk | None = None,
        is_reading: bool = False,
    ) -> None:
        """Open the folder for this process alone; `keep` generations stay, 0 means all."""
        self._folder = folder
        self._fsync = fsync
        self._fsync_interval = fsync_interval
        self._keep = keep
        self._disk = disk or RealDisk()
        self._log: Appending | None = None
        self._log_bytes = 0
        self._synced_s = time.monotonic()
        self._lock = -1
        self._is_reading = is_reading
        if not is_reading:
            self._disk.make_dir(folder)
            self._lock = _lock(folder)
        try:
            self._check_format()
        except BaseException:
            self.close()
            raise

    def _check_format(self) -> None:
        if self._is_reading and not self._folder.exists():
            return
        if not check_format(self._disk, self._folder) and not self._is_reading:
            write_format(self._disk, self._folder)

    @classmethod
    def reading(cls, folder: Path) -> Self:
        """Open the folder to look at it only, also while another process writes to it."""
        return cls(folder, fsync="never", fsync_interval=1.0, keep=0, is_reading=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def adopt(self, *, fsync: Literal["always", "interval", "never"], fsync_interval: float, keep: int) -> None:
        """Go on with settings of which some have changed."""
        self._fsync = fsync
        self._fsync_interval = fsync_interval
        self._keep = keep

    @property
    def bytes_logged(self) -> int:
        """Bytes of the current log."""
        return self._log_bytes

    def close(self) -> None:
        """Force out what was written and let another process have the folder; twice is fine."""
        if self._log is not None:
            if self._fsync != "never":
                self._log.sync()
            self._log.close()
            self._log = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # reading

    def generations(self) -> list[int]:
        """Return the numbers of the generations that are kept, the oldest first."""
        return self._numbers(_SNAPSHOT)

    def snapshot_of(self, generation: int) -> Record:
        """Read a generation's snapshot; raise `Damaged` if it is."""
        return self._read_whole(self._path("snapshot", generation))

    def kept(self) -> list[int]:
        """Return the numbers of the records that are kept by number, the lowest first."""
        return self._numbers(_KEPT)

    def kept_at(self, number: int) -> Record:
        """Read a record that is kept by number; raise `Damaged` if it is."""
        return self._read_whole(self._path("kept", number))

    def _numbers(self, pattern: re.Pattern[str]) -> list[int]:
        names = self._disk.names(self._folder) if self._folder.exists() else []
        return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))

    def _read_whole(self, path: Path) -> Record:
        with self._disk.open(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            try:
                return unpack(file, size)[0]
            except Damaged as error:
                raise Damaged(f"{path}: {error}") from None

    def entries_of(self, generation: int) -> Iterator[Record]:
        """Read the records after a generation's snapshot, up to the first that is damaged."""
        for record, _ in self._read_log(generation):
            yield record

    def recover(self) -> Recovered:
        """Return the newest snapshot that is whole, and all records after it.

        Appending goes on after the last whole record; torn or damaged bytes after that are set aside.
        """
        generations = self.generations()
        recovered = Recovered()
        for generation in reversed(generations):
            try:
                recovered.snapshot = self.snapshot_of(generation)
            except Damaged as error:
                recovered.notes.append(f"{error}; the generation before it is used, with the log since")
                continue
            later = [number for number in generations if number >= generation]
            recovered.entries = self._entries_since(later)
            self._repair(later[-1], recovered.notes)
            return recovered
        if generations:
            raise StorageError(
                f"{self._folder}: none of {len(generations)} snapshots can be read: restore the folder from a backup,"
                " or begin a new run"
            )
        return recovered

    def _entries_since(self, generations: list[int]) -> Iterator[Record]:
        for generation in generations:
            end = 0
            for record, up_to in self._read_log(generation):
                end = up_to
                yield record
            if generation != generations[-1] and end < self._size_of_log(generation):
                raise StorageError(
                    f"{self._path('log', generation)}: damaged {end} bytes in, and the snapshot after it as well:"
                    " restore the folder from a backup, or go back with `splitfl rollback`"
                )

    def _size_of_log(self, generation: int) -> int:
        with self._disk.open(self._path("log", generation)) as file:
            return file.seek(0, os.SEEK_END)

    def _read_log(self, generation: int) -> Iterator[tuple[Record, int]]:
        """Yield (record, bytes up to its end)."""
        path = self._path("log", generation)
        if path.name not in self._disk.names(self._folder):
            return
        with self._disk.open(path) as file:
            size = file.seek(0, os.SEEK_END)
            at = file.seek(0)
            while at < size:
                try:
                    record, num_bytes = unpack(file, size - at)
                except Damaged:
                    return
                at += num_bytes
                yield record, at

    def _repair(self, generation: int, notes: list[str]) -> None:
        """Cut the last log off after its last whole record, and keep the rest aside."""
        good = max((up_to for _, up_to in self._read_log(generation)), default=0)
        path = self._path("log", generation)
        if self._is_reading:
            return
        if path.name in self._disk.names(self._folder):
            with self._disk.open(path) as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(good)
                tail = file.read(size - good)
            if tail:
                self._disk.write_whole(path.with_name(f"{path.name}.damaged"), [tail])
                notes.append(
                    f"{path}: the last {len(tail)} bytes are no whole record, as after a crash; {path.name}.damaged"
                    " keeps them, and the run goes on before them"
                )
        self._go_on_in(self._disk.append(path))
        self._log_bytes = good
        self._appending().cut(good)
        self._appending().sync()

    # writing

    def append(self, record: Record, *, durable: bool = True) -> None:
        """Write a record after the others.

        With `fsync = "always"` it is on the disk when this returns, if it must be `durable`. If the disk does not take
        it, the written part is taken back, and the store goes on with its earlier records.
        """
        log = self._appending()
        crash_point("append-before")
        before = self._log_bytes
        size = 0
        try:
            for number, buffer in enumerate(pack(record)):
                log.write([buffer])
                size += len(buffer)
                if number == 0:
                    crash_point("append-torn")
            crash_point("append-after")
            self._log_bytes = before + size
            self._sync(log, durable=durable)
        except StorageError:
            self._log_bytes = before
            log.cut(before)
            raise
        crash_point("append-synced")

    def _sync(self, log: Appending, *, durable: bool) -> None:
        now_s = time.monotonic()
        is_due = now_s - self._synced_s >= self._fsync_interval
        if (self._fsync == "always" and durable) or (self._fsync == "interval" and is_due):
            log.sync()
            self._synced_s = now_s

    def snapshot(self, record: Record, *, holds: int | None = None) -> int:
        """Begin a new generation with this snapshot and return its number; if that fails, the one before it goes on.

        The generation `holds` stays, however many have come since.
        """
        generations = self.generations()
        number = generations[-1] + 1 if generations else 0
        # its log first: a snapshot whose log could not be opened would hide the records after the last one
        log = self._disk.append(self._path("log", number))
        crash_point("snapshot-before-rename")
        try:
            self._disk.write_whole(self._path("snapshot", number), pack(record))
        except StorageError:
            log.close()
            raise
        crash_point("snapshot-after-rename")
        self._go_on_in(log)
        self._log_bytes = 0
        crash_point("snapshot-before-clean")
        if self._keep:
            for old in [*generations, number][: -self._keep]:
                if old != holds:
                    self._remove(old)
        return number

    def keep(self, number: int, record: Record, limit: int) -> None:
        """Keep a record by number, apart from generations and log; of more than `limit` the lowest numbers go."""
        self._disk.write_whole(self._path("kept", number), pack(record))
        for old in self.kept()[:-limit]:
            self._disk.remove(self._path("kept", old))

    def forget_kept(self, *, above: int) -> None:
        """Remove the records that are kept by numbers above this one."""
        for number in self.kept():
            if number > above:
                self._disk.remove(self._path("kept", number))

    def rewind(self, generation: int) -> None:
        """Go back to right after a generation's snapshot; later records are kept aside as `*.dropped`."""
        for name in self._disk.names(self._folder):
            if name.endswith(".dropped"):
                self._disk.remove(self._folder / name)
        for number in self.generations():
            paths = [self._path("log", number)] if number == generation else []
            paths += [self._path("snapshot", number), self._path("log", number)] if number > generation else []
            for path in paths:
                if path.exists():
                    self._disk.rename(path, f"{path.name}.dropped")

    def _remove(self, generation: int) -> None:
        log = self._path("log", generation)
        for path in (log, log.with_name(f"{log.name}.damaged"), self._path("snapshot", generation)):
            self._disk.remove(path)

    def _go_on_in(self, log: Appending) -> None:
        if self._log is not None:
            self._log.close()
        self._log = log

    def _appending(self) -> Appending:
        if self._log is None:
            raise StorageError(f"{self._folder}: nothing to append to before a first snapshot or `recover`")
        return self._log

    def _path(self, kind: str, generation: int) -> Path:
        return self._folder / f"{kind}-{generation:08d}.bin"


def check_idle(folder: Path) -> None:
    """Raise `ConfigError` while a process is at work in a store's folder, in whatever form its records are."""
    os.close(_lock(folder))


def _lock(folder: Path) -> int:
    """Take the folder for this process; the system gives it back when the process ends, however it does."""
    path = folder / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError.at(path, error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ConfigError(
            f"{folder} is in use by another process: stop that one, or give this one another folder or name"
        ) from None
    return descriptor
