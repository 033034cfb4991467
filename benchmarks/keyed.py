"""Keys for a benchmark's server and clients, as `splitfl keygen` and `splitfl authorize` make them."""

from pathlib import Path

from splitfl.transport.keys import Enrolment, authorize, keygen, write_enrolment


class KeyRing:
    """The keys of one run, all in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = keygen(self.server_keys)

    @property
    def server_keys(self) -> Path:
        """The server's folder of keys."""
        return self._folder / "keys-server"

    def enrol(self, client_id: str, address: str) -> dict[str, str]:
        """Make a client's keys, let it in, and return its settings; `address` is where it reaches the server."""
        keys, enrolment = self._folder / f"keys-{client_id}", self._folder / f"{client_id}.enrolment.toml"
        public = keygen(keys).public
        authorize(self.server_keys, client_id, public)
        write_enrolment(
            enrolment,
            Enrolment(
                server_address=address,
                server_public_key=self._server.public,
                client_id=client_id,
                client_public_key=public,
                pinned={},
            ),
        )
        return {"keys": str(keys), "enrolment": str(enrolment)}
