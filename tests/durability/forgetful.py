"""A disk that forgets what was not forced out: what a power failure leaves."""

import random
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from splitfl.durability.disk import Appending
from splitfl.errors import StorageError
from splitfl.protocol.messages import Buffer


class ForgetfulDisk:
    """Files in memory, each with what is safe and what is only written."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self.safe: dict[str, bytes] = {}
        self.written: dict[str, bytearray] = {}

    def lose_power(self) -> None:
        """Forget what was not synced, or keep a torn beginning of it."""
        for name, content in list(self.written.items()):
            safe = self.safe.get(name)
            if safe is None:
                del self.written[name]
                continue
            extra = self._draw.randint(0, max(0, len(content) - len(safe)))
            kept = bytearray(content[: len(safe) + extra]) if content[: len(safe)] == safe else bytearray(safe)
            self.written[name] = kept
            self.safe[name] = bytes(kept)

    def make_dir(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)  # for the lock, which is not kept

    def append(self, path: Path) -> Appending:
        self.written.setdefault(path.name, bytearray())
        self.safe.setdefault(path.name, b"")
        return _Growing(self, path.name)

    def write_whole(self, path: Path, buffers: Iterable[Buffer]) -> None:
        content = b"".join(map(bytes, buffers))
        self.written[path.name], self.safe[path.name] = bytearray(content), content

    def open(self, path: Path) -> BinaryIO:
        if path.name not in self.written:
            raise StorageError(f"{path}: not there")
        return BytesIO(bytes(self.written[path.name]))

    def names(self, folder: Path) -> list[str]:
        return sorted(self.written)

    def rename(self, path: Path, name: str) -> None:
        self.written[name] = self.written.pop(path.name)
        self.safe[name] = self.safe.pop(path.name, b"")

    def remove(self, path: Path) -> None:
        self.written.pop(path.name, None)
        self.safe.pop(path.name, None)


class _Growing:
    def __init__(self, disk: ForgetfulDisk, name: str) -> None:
        self._disk = disk
        self._name = name

    def write(self, buffers: Iterable[Buffer]) -> None:
        for buffer in buffers:
            self._disk.written[self._name] += bytes(buffer)

    def sync(self) -> None:
        self._disk.safe[self._name] = bytes(self._disk.written[self._name])

    def cut(self, size: int) -> None:
        del self._disk.written[self._name][size:]

    def close(self) -> None:
        pass
