"""Conversations of sessions, gates and rounds, each a script with its whole printed outcome.

`pytest tests/traces --rewrite-traces` writes down what happens now; the diff is for the reviewer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from traces.conversation import Conversation

FOLDER = Path(__file__).parent
DASHES = "----"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Commands, and what is expected of them; the lines before them are a comment or a heading."""

    commands: tuple[str, ...]
    expected: tuple[str, ...]


def exchanges(text: str) -> Iterator[Exchange]:
    """Read a trace: blocks between empty lines, each commands, a line of dashes, the outcome."""
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        end = lines.index(DASHES) if DASHES in lines else len(lines)
        yield Exchange(commands=tuple(lines[:end]), expected=tuple(lines[end + 1 :]))


def outcome(conversation: Conversation, exchange: Exchange) -> list[str]:
    """Do what the commands say; "ok" where nothing is to be told."""
    told = [line for command in exchange.commands if not command.startswith("#") for line in conversation.do(command)]
    return told or ["ok"]


def is_script(exchange: Exchange) -> bool:
    return not all(line.startswith("#") for line in exchange.commands)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_trace(path: Path, tmp_path: Path, trace_model: Path, request: pytest.FixtureRequest) -> None:
    conversation = Conversation(tmp_path, trace_model)
    rewrites, written = request.config.getoption("--rewrite-traces"), []
    try:
        for exchange in exchanges(path.read_text()):
            if not is_script(exchange):
                written.append("\n".join(exchange.commands))
                continue
            happened = outcome(conversation, exchange)
            written.append("\n".join([*exchange.commands, DASHES, *happened]))
            if not rewrites:
                assert happened == list(exchange.expected), f"{path.name}: after {'; '.join(exchange.commands)}"
    finally:
        conversation.close()
    if rewrites:
        path.write_text("\n\n".join(written) + "\n")


def test_every_trace_says_first_what_it_shows() -> None:
    for path in FOLDER.glob("*.txt"):
        assert path.read_text().startswith("# "), path.name
