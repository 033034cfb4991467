"""Reads a file of settings, with `--set section.key=value` laid over it, and writes one."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ValidationError

from splitfl.config.explain import explain
from splitfl.config.section import Section, is_section
from splitfl.errors import ConfigError


class Config(Section):
    """A whole tree: read it with `load`, see `fingerprint` for comparing two."""

    command: ClassVar[str]
    needs: ClassVar[str]
    """The sections that such a file has at least, as a person is told."""

    @classmethod
    def of_the_other_role(cls) -> "type[Config] | None":
        """Return the tree of the other role's file; None where this is no role's file."""
        return None

    @classmethod
    def load(cls, path: Path | None, overrides: Iterable[str] = ()) -> Self:
        """Read TOML, lay `section.key=value` strings over it; raise `ConfigError` naming the setting and the rule."""
        laid_over = tuple(overrides)
        source = "--set" if path is None else f"{path} with --set" if laid_over else str(path)
        return cls.from_tree(_read_tree(path, laid_over, cls), source=source)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], *, source: str) -> Self:
        """Build the tree from plain values; `source` is named in the error."""
        if foreign := _of_the_other_role(cls, tree):
            raise ConfigError(f"{source} {foreign}")
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(f"{source}: {explain(cls, error)}") from None


def to_toml(config: Config) -> str:
    """Write the tree as TOML that `load` reads back to an equal tree; unset paths are left out."""
    import tomlkit

    return tomlkit.dumps(config.model_dump(mode="json", exclude_none=True))


def role_of(path: Path, overrides: Iterable[str] = ()) -> str:
    """Tell whose file this is by its sections: "client" if it has `[client]` or `[data]`, else "server"."""
    return "client" if {"client", "data", "policy"} & _read_tree(path, overrides).keys() else "server"


def _read_tree(path: Path | None, overrides: Iterable[str], config: type[Config] | None = None) -> dict[str, Any]:
    tree = {} if path is None else _read_toml(path)
    for override in overrides:
        _lay_over(tree, override, config)
    return tree


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; --config names a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def _lay_over(tree: dict[str, Any], override: str, config: type[Config] | None) -> None:
    """Set one `section.key=value`; the value is TOML, or plain text where it is not or where text is wanted."""
    name, equals, text = override.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write --set section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    # no setting is a date, but a name may look like one, or like a number
    if isinstance(value, date | time) or (not isinstance(value, str) and _is_text(config, [*sections, key])):
        value = text.strip()
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
        tree = inner
    tree[key] = value


def _is_text(tree: type[Section] | None, where: Sequence[str]) -> bool:
    """Tell whether a setting is text, so that `--set` need not quote a value that looks like a number."""
    for part in where[:-1]:
        field = tree.model_fields.get(part) if tree is not None else None
        tree = field.annotation if field is not None and is_section(field.annotation) else None
    field = tree.model_fields.get(where[-1]) if tree is not None else None
    return field is not None and field.annotation in (str, Path, Path | None)


def _of_the_other_role(tree: type[Config], given: Mapping[str, Any]) -> str:
    """Say that this is the other role's file, or that it has sections of the other role's; "" where it has not."""
    others = tree.of_the_other_role()
    if others is None:
        return ""
    names = [name for name in given if name in others.model_fields and name not in tree.model_fields]
    foreign = [f"[{name}]" for name in names if isinstance(given[name], Mapping)] or names
    if not foreign:
        return ""
    named = " and ".join([", ".join(foreign[:-1]), foreign[-1]] if len(foreign) > 1 else foreign)
    if any(name in tree.model_fields for name in given):
        return f"is a {tree.command}'s file, and {named} belongs in a {others.command}'s: move it there"
    return (
        f"is a {others.command}'s file (it has {named}): `splitfl {others.command}` takes it, and `splitfl"
        f" {tree.command}` one with {tree.needs}"
    )
