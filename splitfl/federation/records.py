"""Reads text files and tables as records that know their line; no error quotes a line, which is private text.

.txt holds a text a line, .jsonl and .json an object a line; .csv, .tsv and .parquet are tables (`federation.tables`).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from splitfl.errors import DataError
from splitfl.federation.tables import TABLES, read_rows

SUFFIXES = (".jsonl", ".json", ".txt", *TABLES)

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


def is_table(path: Path) -> bool:
    """Tell whether the file is a table, whose rows are not lines."""
    return path.suffix.lower() in TABLES


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines that are not blank; raise `DataError` if there are none or the file cannot be read.

    Lines end at a line feed only: JSON text may hold other characters that Unicode counts as line ends.
    """
    with _readable(path), path.open("rb") as file:
        is_empty = True
        for number, content in enumerate(file, start=1):
            if content.strip():
                is_empty = False
                yield Line(where=f"{path}, line {number}", content=_without_mark(number, content))
    if is_empty:
        raise DataError(f"{path}: an empty file; it needs at least one line with an example")


def read_file(path: Path) -> Iterator[Record]:
    """Yield one record a line that is not blank, or a row; raise `DataError` with the file and the line."""
    with _readable(path):
        _check_suffix(path)
    if is_table(path):
        yield from _read_table(path)
        return
    parse = _plain_text if is_plain_text(path) else _json_object
    for line in read_lines(path):
        yield Record(where=line.where, fields=parse(line))


def _read_table(path: Path) -> Iterator[Record]:
    is_empty = True
    with _readable(path):
        for where, fields in read_rows(path):
            is_empty = False
            yield Record(where=where, fields=fields)
    if is_empty:
        raise DataError(f"{path}: a table without rows; it needs at least one with an example")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the system says of a file that cannot be read into a sentence."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a relative path starts at the folder the command runs in") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a directory; name one file in it ({_known_suffixes()})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None


def name_fields(fields: Mapping[str, object]) -> str:
    """List a record's field names, never its values, for an error's text."""
    names = [repr(name) for name in fields]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more if names else "none"


def _check_suffix(path: Path) -> None:
    path.open("rb").close()  # a file that is not there is missing first, whatever its suffix
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
