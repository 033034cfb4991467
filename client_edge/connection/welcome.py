"""What a server's welcome may say: looked at whole where it arrives, before it reaches a path, a size or a class.

Whether the settings are wanted is another question (`policy`, `consent`); here it is only whether they are settings.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from splitfl.config.patterns import NAME_PATTERN
from splitfl.config.trees import RunConfig
from splitfl.errors import ConfigError, RemoteProtocolError
from splitfl.models.origin import DESCRIPTION_FILES
from splitfl.models.source import ADAPTERS_FILE, WEIGHTS_FILE
from splitfl.protocol.codec import MAX_HEADER_BYTES
from splitfl.protocol.messages import Welcome
from splitfl.telemetry.units import printable

_KNOWN_FILES = frozenset({*DESCRIPTION_FILES, WEIGHTS_FILE, ADAPTERS_FILE})
_NEEDED_FILES = ("config.json", WEIGHTS_FILE)
# The largest tokenizer.json in use has some 35 MB.
_MOST_DESCRIPTION_BYTES = 1 << 27
_MOST_NAME = 256
_MOST_SILENCE_S = 86_400.0
_MOST_SAID = 400

_NAME = re.compile(NAME_PATTERN)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}")


def check_welcome(welcome: Welcome) -> None:
    """Raise `RemoteProtocolError` unless names, hashes, sizes and limits are what a server of this version sends."""
    # a pattern's $ lets a line's end through, fullmatch does not
    if not _NAME.fullmatch(welcome.run_id):
        raise RemoteProtocolError(
            f"the server's run_id {_quoted(welcome.run_id)} is no name: one has up to 64 letters, digits, '.', '_' and"
            " '-', and begins with a letter or digit"
        )
    if not _TOKEN.fullmatch(welcome.session):
        raise RemoteProtocolError("the server's session token is no token of up to 128 letters, digits, '_' and '-'")
    if not _DIGEST.fullmatch(welcome.fingerprint):
        raise RemoteProtocolError(f"the server's fingerprint {_quoted(welcome.fingerprint)} is no SHA-256 in hex")
    _check_files(welcome)
    _check_limits(welcome.limits)


def settings_of(welcome: Welcome) -> RunConfig:
    """Read the run's settings; a fingerprint that differs means that the two sides read them differently."""
    try:
        tree = json.loads(welcome.settings, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise RemoteProtocolError("the server's settings are no JSON") from None
    if not isinstance(tree, dict):
        raise RemoteProtocolError("the server's settings are no JSON object")
    for name, value in _values_in(tree):
        if isinstance(value, float) and not math.isfinite(value):
            raise RemoteProtocolError(f"the server's setting {_quoted(name)} is not finite")
        # they are shown in what is to be accepted, and in errors
        if isinstance(value, str) and not value.isprintable():
            raise RemoteProtocolError(f"the server's setting {_quoted(name)} is no plain text: {_quoted(value)}")
    try:
        run = RunConfig.from_tree(tree, source="the server's settings")
    except ConfigError as error:
        raise RemoteProtocolError(_cut(printable(error))) from None
    if run.link.heartbeat_timeout > _MOST_SILENCE_S:
        raise RemoteProtocolError(
            f"the server's link.heartbeat_timeout is {run.link.heartbeat_timeout:g} s, more than a day"
        )
    model = run.model.model_name_or_path
    if len(model) > _MOST_NAME or not model.isprintable():
        raise RemoteProtocolError(
            f"the server's model name {_quoted(model)} is no name of up to {_MOST_NAME} characters"
        )
    if run.fingerprint() != welcome.fingerprint:
        raise RemoteProtocolError(
            f"the run's settings have fingerprint {run.fingerprint():.12} here and {welcome.fingerprint:.12} on the"
            " server: install the same splitfl on both"
        )
    return run


def _check_files(welcome: Welcome) -> None:
    names, sizes, digests = welcome.file_names, welcome.file_sizes, welcome.file_hashes
    if not len(names) == len(sizes) == len(digests):
        raise RemoteProtocolError(
            f"the server announces {len(names)} files, {len(sizes)} sizes and {len(digests)} hashes: as many of each"
            " belong"
        )
    if len(set(names)) != len(names):
        raise RemoteProtocolError("the server announces a file twice")
    for name, digest in zip(names, digests, strict=True):
        if name not in _KNOWN_FILES:
            raise RemoteProtocolError(
                f"the server announces a file {_quoted(name)}; a welcome has {', '.join(sorted(_KNOWN_FILES))}"
            )
        if not _DIGEST.fullmatch(digest):
            raise RemoteProtocolError(f"the server's hash of {name} is {_quoted(digest)}, no SHA-256 in hex")
    for name in _NEEDED_FILES:
        if name not in names:
            raise RemoteProtocolError(f"the server announces no {name}, which every client needs")
    for name, size in zip(names, sizes, strict=True):
        if name in DESCRIPTION_FILES and size > _MOST_DESCRIPTION_BYTES:
            raise RemoteProtocolError(
                f"the server's {name} has {size} bytes, and {_MOST_DESCRIPTION_BYTES} are the most that a client takes"
            )


def _check_limits(limits: dict[str, float]) -> None:
    for name, value in limits.items():
        if not math.isfinite(value) or value < 0:
            raise RemoteProtocolError(
                f"the server's limit {_quoted(name)} is {value:g}: limits are finite and not negative"
            )
    if limits.get("message_bytes", math.inf) < MAX_HEADER_BYTES:
        raise RemoteProtocolError(
            f"the server's limit message_bytes is {limits['message_bytes']:g}, less than a header's {MAX_HEADER_BYTES}"
        )


def _values_in(value: Any, name: str = "") -> Iterator[tuple[str, float | str]]:
    match value:
        case float() | str():
            yield name, value
        case dict():
            for key, inner in value.items():
                yield from _values_in(inner, f"{name}.{key}" if name else key)
        case list():
            for inner in value:
                yield from _values_in(inner, name)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _quoted(text: str) -> str:
    return f"{text!r:.64}"


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SAID else text[: _MOST_SAID - 3] + "..."
