"""What stands between a server's welcome and all that follows: the client's policy, then its consent."""

import getpass
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from client_edge.consent.consent import Answer, Consent, require_consent
from client_edge.consent.policy import Allowance, check_policy
from splitfl.config.own import ClientSection, PolicySection
from splitfl.config.trees import RunConfig
from splitfl.durability.disk import make_private_dir
from splitfl.errors import NotAccepted
from splitfl.protocol.messages import Welcome


class Gate:
    """Lets a client into a run, and counts what it gives to it. One for each session."""

    def __init__(self, client: ClientSection, policy: PolicySection, answer: Answer) -> None:
        self._client = client
        self._answer = answer
        self.policy = policy
        self.allowance: Allowance | None = None

    def check(self, welcome: Welcome, run: RunConfig) -> None:
        """Raise `NotAllowed` for settings that this client's policy does not allow; asked at every joining."""
        check_policy(self.policy, run, welcome)

    def admit(self, welcome: Welcome, run: RunConfig, *, address: str, server_key: str) -> None:
        """Raise `NotAccepted` unless somebody here has accepted that, or does now; asked at every joining."""
        folder = folder_of(self._client, welcome.run_id)
        client_id = self._client.client_id
        asked = Consent.asked_for(
            run, run_id=welcome.run_id, client_id=client_id, address=address, server_key=server_key
        )
        require_consent(asked, run, folder, self._answer)
        if self.allowance is None:
            make_private_dir(folder)
            self.allowance = Allowance(self.policy, folder)


class OpenGate(Gate):
    """Lets a client look at a run without taking part in it: nothing is accepted, and nothing kept."""

    def __init__(self, client: ClientSection, policy: PolicySection) -> None:
        super().__init__(client, policy, nobody)

    def check(self, welcome: Welcome, run: RunConfig) -> None:
        """Look at it, as everybody may."""

    def admit(self, welcome: Welcome, run: RunConfig, *, address: str, server_key: str) -> None:
        """Look at it, as everybody may."""


def folder_of(client: ClientSection, run_id: str) -> Path:
    """Return a client's folder of a run, whose name has been checked."""
    return client.output_dir / run_id / client.client_id


def nobody(_sentences: Sequence[str]) -> str:
    """Accept nothing."""
    return ""


def accepts_with(how: str) -> Answer:
    """Accept whatever the policy lets through, and remember that it was so."""
    return lambda _sentences: f"{how}, by {_user()}"


def says_why(sentences: Sequence[str]) -> str:
    """Accept nothing, and put what would have to be accepted into the error: for programs, which have no terminal."""
    raise NotAccepted(f"this run needs somebody's consent (accept=True gives it): {' '.join(sentences)}")


def answers_for(accept: bool | str, tell: Callable[[str], None]) -> Answer:
    """Show what is to be accepted; it is by `accept` (True, or in words how), or asked where there is a terminal."""

    def answer(sentences: Sequence[str]) -> str:
        for sentence in sentences:
            tell(sentence)
        if accept:
            return accepts_with(accept if isinstance(accept, str) else "accept=True")(sentences)
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            return ""
        if not _says_yes():
            raise NotAccepted(
                "not accepted, so this client takes no part. Nothing but its name was sent this time; the same command"
                " asks again"
            )
        return f"asked on the terminal, by {_user()}"

    return answer


def _says_yes() -> bool:
    """Ask on the terminal, and leave it at the beginning of a line whatever comes: an answer, Ctrl-D or Ctrl-C."""
    sys.stderr.write("Take part, and let the server see this? [y/N] ")
    sys.stderr.flush()
    said = ""
    try:
        said = sys.stdin.readline()
    except UnicodeDecodeError:  # typed in another encoding, and no y in ours
        said = "?\n"
    finally:
        if not said.endswith("\n"):
            sys.stderr.write("\n")
    return said.strip().lower() in ("y", "yes")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "a user without a name"
