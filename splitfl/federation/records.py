"""Reads .jsonl, .json and .txt files as records that know their line; no error quotes a line, which is private text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from splitfl.errors import DataError

SUFFIXES = (".jsonl", ".json", ".txt")

PLAIN_TEXT_FIELD = "text"
"""The one field of a record that was a line of a .txt file."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MOST_NAMES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line that is not blank, as bytes with its line ending; `where` is the file and the line number from 1."""

    where: str
    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The fields of one line; `where` is the file and the line number from 1, for errors."""

    where: str
    fields: Mapping[str, object] = field(repr=False)


def is_plain_text(path: Path) -> bool:
    """Tell whether each line is an example, not an object."""
    return path.suffix.lower() == ".txt"


def read_lines(path: Path) -> list[Line]:
    """Read the lines that are not blank; raise `DataError` if there are none or the file cannot be read.

    Lines end at a line feed only: JSON text may hold other characters that Unicode counts as line ends.
    """
    try:
        with path.open("rb") as file:
            _check_suffix(path)
            numbered = [(number, _without_mark(number, content)) for number, content in enumerate(file, start=1)]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a relative path starts at the folder the command runs in") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a directory; name one file in it ({_known_suffixes()})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None
    lines = [Line(where=f"{path}, line {number}", content=content) for number, content in numbered if content.strip()]
    if not lines:
        raise DataError(f"{path}: an empty file; it needs at least one line with an example")
    return lines


def read_file(path: Path) -> list[Record]:
    """Read one record a line that is not blank; raise `DataError` with the file and the line."""
    parse = _plain_text if is_plain_text(path) else _json_object
    return [Record(where=line.where, fields=parse(line)) for line in read_lines(path)]


def name_fields(fields: Mapping[str, object]) -> str:
    """List a record's field names, never its values, for an error's text."""
    names = [repr(name) for name in fields]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more if names else "none"


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: unknown suffix {path.suffix!r}; known: {_known_suffixes()}")


def _known_suffixes() -> str:
    return ", ".join(SUFFIXES)


def _without_mark(number: int, content: bytes) -> bytes:
    """Drop the byte order mark that some editors put before the first line; JSON does not allow it."""
    return content.removeprefix(_BYTE_ORDER_MARK) if number == 1 else content


def _decode(line: Line) -> str:
    try:
        return line.content.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise DataError(f"{line.where}: not UTF-8; save the file as UTF-8") from None


def _plain_text(line: Line) -> dict[str, object]:
    return {PLAIN_TEXT_FIELD: _decode(line)}


def _json_object(line: Line) -> dict[str, object]:
    text = _decode(line)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg.rstrip(': ')}, column {error.colno}"
        raise DataError(f"{line.where}: not JSON: {reason}; write one JSON object a line") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or brackets thousands deep
        raise DataError(f"{line.where}: not JSON: too long a number, or nested too deeply") from None
    if not isinstance(value, dict):
        raise DataError(f"{line.where}: not an object but {_JSON_NAMES[type(value)]}; write one JSON object a line")
    return value


_JSON_NAMES: dict[type, str] = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
