"""What `splitfl check` finds: sentences for people, and the numbers in them for machines."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at and is well; a fault is raised as an error instead."""

    topic: str
    sentences: tuple[str, ...]
    numbers: Mapping[str, object] = field(default_factory=dict)


Check: TypeAlias = Callable[[Path, Sequence[str]], Iterator[Finding]]
"""A role's entry in the group `splitfl.checks`: from a config file and overrides to findings, in the order in which
they are made. They end when all is looked at, or with a `SplitflError` that says what is wrong."""
