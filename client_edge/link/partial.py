"""A file that is on its way: what has come stays on disk when the connection, or this process, ends before the rest."""

import fcntl
import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self


class PartialFile:
    """The part that is there of a file with this SHA-256 (hex), for one process at a time."""

    def __init__(self, folder: Path, digest: str, size: int) -> None:
        """Take up what an earlier start has left; while another client is at work on that, begin one of our own."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._is_kept = folder / f".{digest}.partial", True
        self._file = _opened(self._path)
        if not _is_ours(self._file, self._path):
            self._file.close()
            self._path, self._is_kept = folder / f".{digest}.{os.getpid()}.partial", False
            self._file = _opened(self._path)
        self._file.seek(0, os.SEEK_END)
        if self.num_bytes > size or not self._is_kept:
            self.empty()

    @property
    def num_bytes(self) -> int:
        """Bytes that are here."""
        return self._file.tell()

    def write(self, content: bytes) -> None:
        """Take the next bytes."""
        self._file.write(content)

    def empty(self) -> None:
        """Begin anew."""
        self._file.seek(0)
        self._file.truncate()

    def digest(self) -> str:
        """Return the SHA-256 (hex) of what is here."""
        self._file.seek(0)
        found = hashlib.file_digest(self._file, "sha256").hexdigest()  # type: ignore[arg-type]
        self._file.seek(0, os.SEEK_END)
        return found

    def become(self, path: Path) -> None:
        """Move to where it belongs."""
        self._file.flush()
        self._path.replace(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._file.close()
        if not self._is_kept:
            self._path.unlink(missing_ok=True)


def _opened(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")


def _is_ours(file: BinaryIO, path: Path) -> bool:
    """Lock a file, and tell whether it is still the one at the path: another process may just have finished it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except OSError:
        return False
