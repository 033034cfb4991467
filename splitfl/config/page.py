"""Renders docs/configuration.md from the settings themselves: `python -m splitfl.config.page` writes it to stdout."""

import inspect
import json
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo

from splitfl.config.patterns import NAME_PATTERN, SHA256_PATTERN
from splitfl.config.reading import Config
from splitfl.config.section import Section, classes_of, is_section
from splitfl.config.trees import ClientConfig, ServerConfig

_INTRODUCTION = """\
# Configuration

<!-- Written by `make docs` from splitfl/config/; a test compares the two. Change the settings there, not here. -->

A server and a client read one TOML file each. A section below is a TOML table; every setting has a default, and only
`model.model_name_or_path` (server) and `client.client_id` (client) must be given. `--set section.key=value` on the
command line overrides the file and may be given several times. An unknown setting is refused with the nearest known
one, a wrong value with the rule; the exit code is then 2.

**The server's settings are the run's.** All sections of the server's file but `[server]` travel to every client when it
joins. So nothing has to be kept equal by hand on two machines. A client's file holds only what is the client's own.

"unset" means that the setting is left out of the file.

Each setting of a run has a **class**, which says what a change between two starts means:

- **identity**: it decides the weights. With another value it is another run.
- **exposure**: it decides what leaves a client. A change needs the clients' consent.
- **operation**: it decides neither. It may change between two starts of the same run.

Where rounds are compared (`federation.early_stopping_patience`, `federation.load_best_model_at_end`), what is measured
decides which round the run ends with, so `[evaluation]` and `federation.per_device_eval_batch_size` are then identity
too. `federation.num_rounds = 0` against 1 or more is identity as well. docs/reliability.md says what becomes of a run.

Some settings are tied to others, and a file that breaks a rule is refused: `federation.min_train_clients` must not
exceed `federation.min_available_clients`; an option in `[strategy]` must be one that `federation.strategy` uses;
FedBuff needs a `federation.server_mode` in which clients do not share steps and a constant learning rate;
`link.heartbeat_timeout` must be at least twice `link.heartbeat_interval`;
a frame of `link.frame_bytes` must take less than half of `link.heartbeat_timeout` at
`link.slowest_link_bytes_per_second`.
"""

_PLACES: Mapping[type[Config], str] = {ServerConfig: "The server's file", ClientConfig: "A client's file"}

# How pydantic's constraints read; the attribute of the constraint -> the sign before its value.
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_KNOWN_PATTERNS = {
    r"^$|" + SHA256_PATTERN: "empty, or 64 hexadecimal digits",
    r"^$|" + NAME_PATTERN: "empty, or 1 to 64 letters, digits, `.`, `_`, `-`, the first a letter or digit",
}


def render() -> str:
    """Return the whole page as Markdown, ending with a newline."""
    parts = [_INTRODUCTION]
    for tree, title in _PLACES.items():
        parts.append(f"## {title}\n\n`splitfl {tree.command} --config FILE.toml`. {_sentence_of(tree)}\n")
        parts += _tables(tree)
    return "\n".join(parts)


def _tables(tree: type[Config]) -> Iterator[str]:
    """Render a tree's own settings first, as TOML wants them, then a table a section."""
    sections = {name: field for name, field in tree.model_fields.items() if is_section(field.annotation)}
    top = {name: field for name, field in tree.model_fields.items() if name not in sections}
    if top:
        yield f"### At the top of the file\n\n{_table(tree, top)}\n"
    for name, field in sections.items():
        section = typing.cast(type[Section], field.annotation)
        yield f"### `[{name}]`\n\n{_sentence_of(section)}\n\n{_table(section, section.model_fields)}\n"


def _table(section: type[Section], fields: Mapping[str, FieldInfo]) -> str:
    classes = {name: [each.value for each in classes_of(section, name)] for name in fields}
    has_classes = any(classes.values())
    head = ["setting", *(["class"] if has_classes else []), "type", "default", "bounds", "meaning"]
    rows = [_line(head), "|---" * len(head) + "|"]
    rows += [_row(name, field, [", ".join(classes[name])] if has_classes else []) for name, field in fields.items()]
    return "\n".join(rows)


def _row(name: str, field: FieldInfo, classes: list[str]) -> str:
    cells = [
        f"`{name}`",
        *classes,
        _type_of(field.annotation),
        _default_of(field),
        _bounds_of(field),
        _one_line(field.description),
    ]
    return _line(cell.replace("|", r"\|") for cell in cells)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _type_of(annotation: Any) -> str:
    """Name a type in TOML's words, a choice by its values."""
    names = {str: "string", int: "integer", float: "number", bool: "true or false", Path: "path"}
    if annotation in names:
        return names[annotation]
    arguments = typing.get_args(annotation)
    match typing.get_origin(annotation):
        case origin if origin is Literal:
            return ", ".join(f"`{json.dumps(choice)}`" for choice in arguments)
        case types.UnionType | typing.Union:
            return " or ".join(_type_of(choice) for choice in arguments if choice is not types.NoneType)
        case origin if origin is tuple:
            return f"list of {_type_of(arguments[0])}s"
        case origin if origin is dict:
            return f"table of {_type_of(arguments[1])}s"
    raise TypeError(f"a setting of type {annotation!r} has no words here yet")


def _default_of(field: FieldInfo) -> str:
    """Write a default as TOML would, `unset` where TOML has no word for it."""
    match field.get_default(call_default_factory=True):
        case None:
            return "unset"
        case Path() as path:
            return f"`{json.dumps(path.as_posix())}`"
        case tuple() as values:
            return f"`{json.dumps(list(values))}`"
        case value:
            return f"`{json.dumps(value)}`"


def _bounds_of(field: FieldInfo) -> str:
    found = []
    for constraint in field.metadata:
        found += [
            f"{sign} {_number(getattr(constraint, name))}"
            for name, sign in _SIGNS.items()
            if getattr(constraint, name, None) is not None
        ]
        pattern = getattr(constraint, "pattern", None)
        if pattern is not None:
            found.append(_KNOWN_PATTERNS.get(pattern, f"matches `{pattern}`"))
    return ", ".join(found)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _sentence_of(described: type[Section]) -> str:
    return _one_line(inspect.getdoc(described))


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    sys.stdout.write(render())
