"""Both ends of a connection with keys."""

from pathlib import Path

from splitfl.transport.keys import AllowList, authorize, keygen
from splitfl.transport.security import ClientSecurity, ServerSecurity


def keyed(folder: Path) -> tuple[ServerSecurity, ClientSecurity]:
    """Make keys for a server, and for a client that it lets in."""
    server, client = keygen(folder / "server"), keygen(folder / "client")
    authorize(folder / "server", "clinic-a", client.public)
    return (
        ServerSecurity(key_pair=server, allow_list=AllowList(folder / "server")),
        ClientSecurity(key_pair=client, server_public_key=server.public),
    )
