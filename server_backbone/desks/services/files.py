"""Files that a client fetches instead of the model, and frames that it sends to try the way."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from server_backbone.compute.mishaps import Mishap, done_for
from server_backbone.desks.desk import NOTHING, CouldNot, Desk, Effects
from server_backbone.door.mail import Mail
from server_backbone.door.members import Connection
from server_backbone.provisions import Provisions
from splitfl.config.operation import LinkSection
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Chunk, Fetch, Message, Probe, Probed, TensorFrames
from splitfl.telemetry.units import printable

# Frames that a client may have sent back to it on one connection.
_MAX_PROBES = 4
# Pieces of files beyond four times the number that all files have.
_MAX_FETCHES = 64


@dataclass(kw_only=True, eq=False)
class Files(Desk):
    """`Fetch` and `Probe`."""

    link: LinkSection
    provisions: Provisions
    mail: Mail

    takes: ClassVar[tuple[type[Message], ...]] = (Fetch, Probe)

    def __post_init__(self) -> None:
        num_chunks = sum(file.num_bytes // self.link.frame_bytes + 1 for file in self.provisions.files.values())
        self._most_fetches = 4 * num_chunks + _MAX_FETCHES

    def receive(self, connection: Connection, message: Message, now_s: float) -> Effects:
        """Answer with a piece of a file, or with the frame itself."""
        match message:
            case Fetch():
                return self._provide(connection, message)
            case Probe():
                self._send_back(connection, message)
        return NOTHING

    def _provide(self, connection: Connection, message: Fetch) -> Effects:
        connection.num_fetches += 1
        if connection.num_fetches > self._most_fetches:
            raise RemoteProtocolError(f"{connection.num_fetches} pieces of files fetched, more than all files have")
        try:
            content = done_for(
                partial(self.provisions.read, message.name, message.offset, self.link.frame_bytes),
                f"the server cannot read {printable(message.name, 40)}, which it offers",
            )
        except Mishap as mishap:
            return [CouldNot(connection=connection, mishap=mishap)]
        frames = TensorFrames(dtype="u8", shape=(len(content),), buffers=(content,))
        self.mail.send(connection, Chunk(name=message.name, offset=message.offset, content=frames))
        return NOTHING

    def _send_back(self, connection: Connection, message: Probe) -> None:
        """Return a frame; few, and none that would not be legal in training."""
        if connection.is_resumed:
            raise RemoteProtocolError("Probe after Resume")
        connection.num_probes += 1
        content = message.content
        if connection.num_probes > _MAX_PROBES:
            raise RemoteProtocolError(
                f"{connection.num_probes} probes on a connection, where {_MAX_PROBES} is the most"
            )
        if content.dtype != "u8" or len(content.buffers) != 1:
            raise RemoteProtocolError("a probe that is not one frame of bytes")
        self.mail.send(connection, Probed(content=content))
