"""`splitfl consent`: what was agreed to, and how to take it back."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from splitfl.command_line import add_config_arguments
from splitfl.errors import ConfigError

if TYPE_CHECKING:
    from client_edge.consent.consent import Consent
    from splitfl.config.trees import ClientConfig

# A server that is there answers at once; one that is not is not waited for.
_TELLING_S = 10.0


class ConsentCommand:
    """Show a client's consents, or withdraw one."""

    summary = "show what this client has agreed to, when and with whom; or withdraw it, leave the run and purge it here"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("what", choices=("show", "withdraw"), help="what to do")
        add_config_arguments(parser)
        parser.add_argument("--run", default="", metavar="RUN", help="the run, where this client knows several")
        parser.add_argument("--json", action="store_true", help="print it as JSON")

    def run(self, arguments: argparse.Namespace) -> None:
        """Do it."""
        from splitfl.config.trees import ClientConfig

        config = ClientConfig.load(arguments.config, arguments.overrides)
        found = {folder: consent for folder, consent in _consents(config) if arguments.run in ("", consent.run_id)}
        if arguments.what == "show":
            _show(found, as_json=arguments.json)
            return
        open_ones = {folder: consent for folder, consent in found.items() if not consent.withdrawn_at}
        if len(open_ones) != 1:
            names = ", ".join(consent.run_id for consent in open_ones.values()) or "none"
            raise ConfigError(
                f"{config.client.client_id} has consented to {len(open_ones)} runs ({names}): name one with --run"
            )
        ((folder, consent),) = open_ones.items()
        _withdraw(config, folder, consent, as_json=arguments.json)


def _consents(config: "ClientConfig") -> Iterator[tuple[Path, "Consent"]]:
    from client_edge.consent.consent import CONSENT_FILE, Consent

    for path in sorted(config.client.output_dir.glob(f"*/{config.client.client_id}/{CONSENT_FILE}")):
        consent = Consent.read(path.parent)
        if consent is not None:
            yield path.parent, consent


def _show(found: dict[Path, "Consent"], *, as_json: bool) -> None:
    from client_edge.consent.consent import CONSENT_FILE
    from splitfl.telemetry.units import printable

    if as_json:
        sys.stdout.write(json.dumps([asdict(consent) for consent in found.values()]) + "\n")
        return
    for folder, consent in found.items():
        key = consent.server_public_key or "no key: on this machine"
        state = f"withdrawn {consent.withdrawn_at}" if consent.withdrawn_at else "in force"
        sys.stdout.write(
            f"run {consent.run_id} at {consent.server_address} ({key}): {state}\n"
            f"  agreed {consent.agreed_at} ({consent.how}), as {consent.client_id}\n"
            f"  fingerprint {consent.fingerprint}\n  settings in {folder / CONSENT_FILE}\n"
        )
        sys.stdout.writelines(f"  - {printable(sentence)}\n" for sentence in consent.shown)
    if not found:
        sys.stdout.write("no consent was given here\n")


def _withdraw(config: "ClientConfig", folder: Path, consent: "Consent", *, as_json: bool) -> None:
    """Leave the run, remove what is kept of it, and remember that consent was withdrawn."""
    from splitfl.commands.purge import check_idle, remove

    check_idle(folder)
    told = _tell(config, consent)
    removed = [path for path in sorted(folder.iterdir()) if path.name != "consent.json"]
    for path in removed:
        remove(path)
    consent.withdrawn().write(folder)
    if as_json:
        sys.stdout.write(json.dumps({"told": not told, "removed": [str(path) for path in removed]}) + "\n")
        return
    said = (
        f"the server could not be told ({told})" if told else "the server was told that this client does not come back"
    )
    sys.stdout.write(
        f"withdrawn: run {consent.run_id}; {said}; removed {len(removed)} files and folders from {folder}. The run"
        " keeps what it has learned from this client's text: only its operator can roll it back\n"
    )


def _tell(config: "ClientConfig", consent: "Consent") -> str:
    """Tell the server; return why it could not be told, "" if it was."""
    from client_edge.connection.connection import Connection
    from client_edge.consent.gate import OpenGate
    from splitfl.errors import SplitflError

    client = config.client.model_copy(update={"connect_timeout": min(_TELLING_S, config.client.connect_timeout)})
    try:
        connection = Connection(client, OpenGate(client, config.policy), tell=lambda _: None, is_patient=False)
    except SplitflError as error:
        return str(error)
    try:
        if connection.welcome.run_id != consent.run_id:
            connection.leaving = "has only looked"
            return f"{connection.address} now serves run {connection.welcome.run_id}"
        connection.take_leave("withdrew its consent")
    except SplitflError as error:
        return str(error)
    finally:
        connection.close()
    return ""
