"""The file operations that durability hangs on, and nothing else: files are private, whole and forced out.

POSIX promises little: a file's content is safe after `fsync` of it, its name after `fsync` of its folder.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Protocol

from splitfl.errors import StorageError
from splitfl.protocol.messages import Buffer

_FILE_MODE = 0o600
_DIR_MODE = 0o700


class Appending(Protocol):
    """A file that grows at its end."""

    def write(self, buffers: Iterable[Buffer]) -> None:
        """Add these bytes, or raise `StorageError`; then some of them may be there."""
        ...

    def sync(self) -> None:
        """Return when all that was written is on the disk."""
        ...

    def cut(self, size: int) -> None:
        """Drop everything after this many bytes."""
        ...

    def close(self) -> None:
        """Close; twice is fine."""
        ...


class Disk(Protocol):
    """Where a store keeps its files; every failure is a `StorageError`."""

    def make_dir(self, folder: Path) -> None:
        """Make a folder that only this user may enter."""
        ...

    def append(self, path: Path) -> Appending:
        """Open for appending; the file and its name are made durable if it is new."""
        ...

    def write_whole(self, path: Path, buffers: Iterable[Buffer]) -> None:
        """Replace a file: it has the new content or the old one, never a part."""
        ...

    def open(self, path: Path) -> BinaryIO:
        """Open for reading."""
        ...

    def names(self, folder: Path) -> list[str]:
        """List a folder."""
        ...

    def rename(self, path: Path, name: str) -> None:
        """Give a file another name in its folder."""
        ...

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there."""
        ...


def make_private_dir(folder: Path) -> None:
    """Make a folder that only this user may enter, and those above it if they are missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=_DIR_MODE)
    except OSError as error:
        raise StorageError.at(folder, error) from None


class RealDisk:
    """The machine's own."""

    def make_dir(self, folder: Path) -> None:
        make_private_dir(folder)

    def append(self, path: Path) -> Appending:
        try:
            is_new = not path.exists()
            file = _RealFile(path)
            if is_new:
                sync_dir(path.parent)
        except OSError as error:
            raise StorageError.at(path, error) from None
        return file

    def write_whole(self, path: Path, buffers: Iterable[Buffer]) -> None:
        half = path.with_name(f".{path.name}.partial")
        try:
            half.unlink(missing_ok=True)
            descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE_MODE)
            try:
                for buffer in buffers:
                    _write_all(descriptor, buffer)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            half.rename(path)
            sync_dir(path.parent)
        except OSError as error:
            half.unlink(missing_ok=True)
            raise StorageError.at(path, error) from None

    def open(self, path: Path) -> BinaryIO:
        try:
            return path.open("rb")
        except OSError as error:
            raise StorageError.at(path, error) from None

    def names(self, folder: Path) -> list[str]:
        try:
            return sorted(entry.name for entry in folder.iterdir())
        except OSError as error:
            raise StorageError.at(folder, error) from None

    def rename(self, path: Path, name: str) -> None:
        try:
            path.replace(path.with_name(name))
            sync_dir(path.parent)
        except OSError as error:
            raise StorageError.at(path, error) from None

    def remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError.at(path, error) from None


class _RealFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, _FILE_MODE)

    def write(self, buffers: Iterable[Buffer]) -> None:
        try:
            for buffer in buffers:
                _write_all(self._descriptor, buffer)
        except OSError as error:
            raise StorageError.at(self._path, error) from None

    def sync(self) -> None:
        try:
            os.fdatasync(self._descriptor)  # the size, which an append changes, is forced out with it
        except OSError as error:
            raise StorageError.at(self._path, error) from None

    def cut(self, size: int) -> None:
        try:
            os.ftruncate(self._descriptor, size)
        except OSError as error:
            raise StorageError.at(self._path, error) from None

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _write_all(descriptor: int, buffer: Buffer) -> None:
    left = memoryview(buffer).cast("B")
    while left:
        left = left[os.write(descriptor, left) :]


def sync_dir(folder: Path) -> None:
    """Force out which files are in a folder: after a power failure a record may speak of them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
