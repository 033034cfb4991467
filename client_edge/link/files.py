"""The files of a welcome: from this machine where they are here already, else from the server, piece by piece."""

import hashlib
import time
from pathlib import Path

from client_edge.connection.connection import Connection
from client_edge.connection.line import WINDOW_BYTES
from client_edge.connection.progress import Progress
from client_edge.link.partial import PartialFile
from splitfl.errors import PeerGone, RemoteProtocolError
from splitfl.protocol.messages import Chunk, Fetch
from splitfl.session.limits import messages_queued


class Files:
    """What a server announces in its welcome, each file known by its SHA-256 (hex)."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.bytes_fetched = 0
        """Bytes of files that came from the server, and not from this machine."""

    def fetch(self, name: str, folder: Path) -> Path:
        """Return a file of the welcome, from `folder` if it is there with the announced hash, else from the server."""
        size, digest = self._announced(name)
        path = self.place_of(name, folder)
        if path.exists() and _hash_of(path) == digest:
            return path
        with PartialFile(folder, digest, size) as part:
            begun_at = part.num_bytes
            self._receive(part, name, size)
            if begun_at and part.digest() != digest:  # what an earlier start had left was no part of it
                part.empty()
                self._receive(part, name, size)
            if part.digest() != digest:
                part.empty()
                raise RemoteProtocolError(f"{name} arrived with another hash than announced: start the client again")
            part.become(path)
        self.bytes_fetched += size
        return path

    def place_of(self, name: str, folder: Path) -> Path:
        """Return where `fetch` looks for a file and leaves it: its SHA-256 (hex) is its name."""
        return folder / self.digest_of(name)

    def digest_of(self, name: str) -> str:
        """Return the SHA-256 (hex) that the welcome announces for a file."""
        return self._announced(name)[1]

    def has(self, name: str) -> bool:
        """Tell whether the welcome announces a file."""
        return name in self.connection.welcome.file_names

    def _announced(self, name: str) -> tuple[int, str]:
        welcome = self.connection.welcome
        at = welcome.file_names.index(name)
        return welcome.file_sizes[at], welcome.file_hashes[at]

    def _receive(self, part: PartialFile, name: str, size: int) -> None:
        """Fetch what is missing of a file, over as many connections as it takes."""
        progress = Progress("received", size, self.connection.tell, begun_at=part.num_bytes, now_s=time.monotonic())
        while part.num_bytes < size:
            try:
                self._fetch_pieces(part, name, size, progress)
            except PeerGone as gone:
                self.connection.reconnect(gone, resume_at=1)

    def _fetch_pieces(self, part: PartialFile, name: str, size: int, progress: Progress) -> None:
        """Fetch the rest of a file, with several pieces on their way at once so that a long link is filled."""
        link = self.connection.run.link
        step = link.frame_bytes
        window = step * max(1, min(messages_queued(link) // 2, WINDOW_BYTES // step))
        asked = part.num_bytes
        while part.num_bytes < size:
            while asked < size and asked - part.num_bytes < window:
                self.connection.send(Fetch(name=name, offset=asked))
                asked += step
            part.write(self._piece(name, part.num_bytes, min(step, size - part.num_bytes)))
            self.connection.reached(name, part.num_bytes)
            progress.at(part.num_bytes, now_s=time.monotonic())

    def _piece(self, name: str, offset: int, num_bytes: int) -> bytes:
        chunk = self.connection.answer(f"{name} from byte {offset}", Chunk)
        content = b"".join(chunk.content.buffers)
        if (chunk.name, chunk.offset, len(content)) != (name, offset, num_bytes):
            raise RemoteProtocolError(
                f"a piece of {chunk.name!r:.64} of {len(content)} bytes at {chunk.offset} in answer to {name} at"
                f" {offset}, {num_bytes} bytes"
            )
        return content


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
