"""`splitfl keygen`, `authorize`, `revoke`: keys, and who is let in. Their work is imported when they run."""

import argparse
import json
import sys
from pathlib import Path

from splitfl.errors import ConfigError


class Keygen:
    """Make a key pair."""

    summary = "make a key pair for a server or a client"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("folder", type=Path, metavar="DIR", help="where the keys are written; must hold none yet")
        parser.add_argument("--json", action="store_true", help="print the public key as JSON")

    def run(self, arguments: argparse.Namespace) -> None:
        """Make it and say what to do with it."""
        from splitfl.transport.keys import PUBLIC_FILE, SECRET_FILE, keygen

        folder: Path = arguments.folder
        pair = keygen(folder)
        if arguments.json:
            sys.stdout.write(json.dumps({"folder": str(folder), "public_key": pair.public}) + "\n")
            return
        sys.stdout.write(
            f"public key: {pair.public}\n"
            f"{folder / SECRET_FILE} stays on this machine: anybody who has it counts as you.\n"
            f"A server: set server.keys to {folder}, then `splitfl authorize {folder} CLIENT_ID CLIENT_PUBLIC_KEY"
            " --address tcp://HOST:PORT` for each client.\n"
            f"A client: send {folder / PUBLIC_FILE} to the server's operator, who sends an enrolment file back; set"
            f" client.keys to {folder} and client.enrolment to that file.\n"
        )


class Authorize:
    """Let a client in."""

    summary = "let a client in, running servers included, and write its enrolment file"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("keys", type=Path, metavar="KEYS_DIR", help="the server's folder of keys")
        parser.add_argument("client_id", metavar="CLIENT_ID", help="the client's name")
        parser.add_argument("public_key", metavar="PUBLIC_KEY", help="its public key, or the file that holds it")
        parser.add_argument("--address", required=True, metavar="tcp://HOST:PORT", help="where clients find the server")
        parser.add_argument("--enrolment", type=Path, metavar="FILE", help="default: CLIENT_ID.enrolment.toml")
        parser.add_argument("--json", action="store_true", help="print what was done as JSON")

    def run(self, arguments: argparse.Namespace) -> None:
        """Write the client's key and its enrolment file."""
        from splitfl.transport import keys
        from splitfl.transport.address import check_address

        check_address(arguments.address, has_keys=True)
        pair = keys.read_key_pair(arguments.keys)
        public_key = keys.parse_public_key(arguments.public_key)
        path: Path = arguments.enrolment or Path(f"{arguments.client_id}.enrolment.toml")
        keys.authorize(arguments.keys, arguments.client_id, public_key)
        keys.write_enrolment(
            path,
            keys.Enrolment(
                server_address=arguments.address,
                server_public_key=pair.public,
                client_id=arguments.client_id,
                client_public_key=public_key,
                pinned=keys.AllowList(arguments.keys).keys(),
            ),
        )
        if arguments.json:
            done = {"client_id": arguments.client_id, "public_key": public_key, "enrolment": str(path)}
            sys.stdout.write(json.dumps(done) + "\n")
            return
        sys.stdout.write(
            f"{arguments.client_id} is let in from now on, by running servers with these keys within a second.\n"
            f"Send {path} to that client, which sets client.enrolment to it. Nothing in it is secret, but it must come"
            " from you.\n"
        )


class Revoke:
    """Let a client in no longer."""

    summary = "let a client in no longer: a running server ends its session within a second"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("keys", type=Path, metavar="KEYS_DIR", help="the server's folder of keys")
        parser.add_argument("client_id", metavar="CLIENT_ID", help="the client's name")
        parser.add_argument("--json", action="store_true", help="print what was done as JSON")

    def run(self, arguments: argparse.Namespace) -> None:
        """Remove the client's key."""
        from splitfl.transport import keys

        if not arguments.keys.is_dir():
            raise ConfigError(f"{arguments.keys}: no such folder; name the server's folder of keys")
        keys.revoke(arguments.keys, arguments.client_id)
        if arguments.json:
            sys.stdout.write(json.dumps({"client_id": arguments.client_id, "revoked": True}) + "\n")
            return
        sys.stdout.write(
            f"{arguments.client_id} is let in no longer. Its part in past merges stays; `splitfl rollback` goes"
            " back before it.\n"
        )
