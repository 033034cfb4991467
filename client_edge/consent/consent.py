"""Consent that is remembered: what a run's settings let the server see, who accepted it when, and what has changed.

It is given for one run, one fingerprint (identity and exposure of the settings) and one server's key. It bounds what
this client does and hides nothing from the server.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeAlias

from splitfl.config.run import differences
from splitfl.config.trees import RunConfig
from splitfl.durability.disk import RealDisk, make_private_dir
from splitfl.errors import NotAccepted
from splitfl.telemetry.units import counted, printable
from splitfl.training.forecast import sight_of

# Within a client's folder (client-runs/RUN/CLIENT), readable by its owner alone.
CONSENT_FILE = "consent.json"
_MOST_CHARACTERS = 200

Answer: TypeAlias = Callable[[Sequence[str]], str]
"""Is shown sentences; returns how they were accepted, "" if they were not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Consent:
    """What somebody at this client has accepted, or is to accept (`agreed_at` empty)."""

    run_id: str
    client_id: str
    server_address: str
    server_public_key: str
    """"" for a server without keys, on this machine."""
    fingerprint: str
    identity: dict[str, Any]
    exposure: dict[str, Any]
    agreed_at: str = ""
    how: str = ""
    shown: tuple[str, ...] = ()
    """The sentences that were accepted."""
    withdrawn_at: str = ""

    @classmethod
    def asked_for(cls, run: RunConfig, *, run_id: str, client_id: str, address: str, server_key: str) -> Self:
        """Return what is to be accepted."""
        return cls(
            run_id=run_id,
            client_id=client_id,
            server_address=address,
            server_public_key=server_key,
            fingerprint=run.fingerprint(),
            identity=run.identity(),
            exposure=run.exposure(),
        )

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return what is remembered in a client's folder, None where there is nothing that can be read."""
        try:
            found = json.loads((folder / CONSENT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        names = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or found.keys() != names:
            return None
        kinds = {"identity": dict, "exposure": dict, "shown": list}
        is_sound = all(isinstance(found[name], kinds.get(name, str)) for name in names)
        return cls(**found | {"shown": tuple(map(str, found["shown"]))}) if is_sound else None

    def write(self, folder: Path) -> None:
        """Remember it, for this user's eyes only."""
        make_private_dir(folder)
        RealDisk().write_whole(folder / CONSENT_FILE, [json.dumps(asdict(self), indent=1).encode()])

    def covers(self, asked: "Consent") -> bool:
        """Tell whether this still holds for what is asked for."""
        return (
            not self.withdrawn_at
            and (self.run_id, self.client_id, self.fingerprint) == (asked.run_id, asked.client_id, asked.fingerprint)
            and self.server_public_key == asked.server_public_key
        )

    def changes(self, asked: "Consent") -> Iterator[str]:
        """Say what is otherwise than it was accepted."""
        if self.server_public_key != asked.server_public_key:
            yield f"the server's key was {self.server_public_key or 'none'}, and is {asked.server_public_key or 'none'}"
        for tree in ("identity", "exposure"):
            for name, before, now in differences(getattr(self, tree), getattr(asked, tree)):
                yield f"{_short(name)} was {_short(before)}, and is {_short(now)}"

    def withdrawn(self) -> Self:
        """Return this, taken back now."""
        return replace(self, withdrawn_at=_now())


def require_consent(asked: Consent, run: RunConfig, folder: Path, answer: Answer) -> None:
    """Return if this was accepted before, or is now; raise `NotAccepted` otherwise."""
    before = Consent.read(folder)
    if before is not None and before.covers(asked):
        return
    shown = list(sentences_of(asked, run, before))
    how = answer(shown)
    if not how:
        changed = before is not None and not before.withdrawn_at
        what = "it is not what was accepted earlier" if changed else "nobody here has accepted that"
        raise NotAccepted(
            f"run {asked.run_id} at {asked.server_address} lets the server see the above, and {what}. Read it, then"
            " start again with --accept, or on a terminal, where you are asked. Nothing but this client's name was sent"
        )
    replace(asked, agreed_at=_now(), how=how, shown=tuple(shown)).write(folder)


def sentences_of(asked: Consent, run: RunConfig, before: Consent | None = None) -> Iterator[str]:
    """Say in plain words what is to be accepted; what has changed comes first."""
    key = f"the server's key is {asked.server_public_key}" if asked.server_public_key else "without keys"
    yield (
        f"Run {asked.run_id} at {asked.server_address} ({key}) trains {run.model.model_name_or_path} on this machine's"
        f" text, with this client as {asked.client_id}."
    )
    if before is not None and before.withdrawn_at:
        yield f"An earlier consent to this run was withdrawn at {before.withdrawn_at}."
    elif before is not None:
        yield f"Changed since {before.agreed_at}: {'; '.join(before.changes(asked)) or 'the name of the run'}."
    yield (
        "This machine computes the embedding and the head of the model,"
        f" {counted(run.model.bottom_layers, 'block')} below the first cut and"
        f" {counted(run.model.top_layers, 'block')} above the last. The server computes the blocks in between."
    )
    yield from sight_of(run).sentences
    yield (
        "Accepting bounds what this client does: other settings of this kind, or another key, are refused until they"
        " are accepted too. It hides nothing from the server. `splitfl consent show` shows later what was accepted"
        f" (fingerprint {asked.fingerprint:.16}), and `splitfl consent withdraw` ends it."
    )


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _short(value: object) -> str:
    shown = printable(value if isinstance(value, str) else repr(value))
    return shown if len(shown) <= _MOST_CHARACTERS else shown[: _MOST_CHARACTERS - 3] + "..."
