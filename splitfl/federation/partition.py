"""Deals the records of one file to the clients of a simulation: evenly, by a field's values, or with skewed labels.

The names come from flwr-datasets. A partitioner returns, for each client, the ascending indices of its records. Every
record goes to exactly one client, and the same seed gives the same partitions.
"""

import difflib
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from splitfl.errors import ConfigError, DataError
from splitfl.federation.records import is_table, name_fields, read_file, read_lines
from splitfl.telemetry.units import counted

FORMS = ("iid", "field:NAME", "dirichlet:NAME:ALPHA")

_MAX_DRAWS = 1000

Records = Sequence[Mapping[str, object]]


class Partitioner(Protocol):
    """Deals records to clients."""

    def partition(self, records: Records) -> list[list[int]]:
        """Return the ascending indices of each partition's records; raise `ConfigError` if they cannot be dealt so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IidPartitioner:
    """Shuffles and deals evenly: sizes differ by one at most."""

    num_partitions: int
    seed: int

    def __post_init__(self) -> None:
        _check_count(self.num_partitions)

    def partition(self, records: Records) -> list[list[int]]:
        """Return the partitions; raise `ConfigError` if there are more of them than records."""
        _check_enough(len(records), self.num_partitions)
        order = np.random.default_rng(self.seed).permutation(len(records))
        return [sorted(part.tolist()) for part in np.array_split(order, self.num_partitions)]


@dataclass(frozen=True, slots=True, kw_only=True)
class NaturalIdPartitioner:
    """Keeps records with the same value of `field` together: a partition per value, in the order of the values.

    With `num_partitions`, values go from the largest to the smallest to the partition that is smallest by then.
    """

    field: str
    num_partitions: int | None = None

    def __post_init__(self) -> None:
        if self.num_partitions is not None:
            _check_count(self.num_partitions)

    def partition(self, records: Records) -> list[list[int]]:
        """Return the partitions; raise `ConfigError` for a record without `field`, or too few values."""
        _check_enough(len(records), self.num_partitions or 1)
        groups = _indices_by_value(records, self.field)
        if self.num_partitions is None:
            return list(groups.values())
        if len(groups) < self.num_partitions:
            raise ConfigError(
                f"field {self.field!r} has {len(groups)} values, fewer than {self.num_partitions} partitions;"
                " ask for fewer partitions, or deal with iid"
            )
        return _deal(groups, self.num_partitions)


@dataclass(frozen=True, slots=True, kw_only=True)
class DirichletPartitioner:
    """Skews labels: each label's records are split by proportions drawn from Dirichlet(alpha) over the partitions.

    It is the label skew of Hsu et al. 2019 (arXiv:1909.06335), drawn label by label as in Yurochkin et al. 2019
    (arXiv:1905.12022) and flwr-datasets. Small `alpha` gives each partition few labels; large `alpha` is close to iid.
    Proportions are drawn again until every partition has `min_partition_size` records, 1000 times at most.
    """

    num_partitions: int
    field: str
    alpha: float
    seed: int
    min_partition_size: int = 1

    def __post_init__(self) -> None:
        _check_count(self.num_partitions)
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"alpha of dirichlet must be positive and finite, got {self.alpha}; 0.1 is much skew")
        if self.min_partition_size < 1:
            raise ConfigError(f"min_partition_size must be at least 1, got {self.min_partition_size}")

    def partition(self, records: Records) -> list[list[int]]:
        """Return the partitions; raise `ConfigError` for a record without `field`, or if no draw fills them all."""
        _check_enough(len(records), self.num_partitions, self.min_partition_size)
        groups = _indices_by_value(records, self.field)
        random = np.random.default_rng(self.seed)
        for _ in range(_MAX_DRAWS):
            parts = self._draw(groups, random)
            if min(len(part) for part in parts) >= self.min_partition_size:
                return parts
        raise ConfigError(
            f"none of {_MAX_DRAWS} draws with alpha {self.alpha} gave each of {self.num_partitions} partitions"
            f" {self.min_partition_size} of {counted(len(records), 'record')}; raise alpha or ask for fewer partitions"
        )

    def _draw(self, groups: Mapping[str, list[int]], random: np.random.Generator) -> list[list[int]]:
        parts: list[list[int]] = [[] for _ in range(self.num_partitions)]
        for indices in groups.values():
            proportions = random.dirichlet(np.full(self.num_partitions, self.alpha))
            cuts = (np.cumsum(proportions)[:-1] * len(indices)).astype(np.int64)
            for part, share in zip(parts, np.split(random.permutation(indices), cuts), strict=True):
                part.extend(share.tolist())
        return [sorted(part) for part in parts]


def partitioner_from(spec: str, num_partitions: int | None, seed: int) -> Partitioner:
    """Build the partitioner that `spec` names: one of `FORMS`; raise `ConfigError` for any other.

    Only `field:NAME` can do without `num_partitions`: it then makes a partition per value.
    """
    name, _, rest = spec.partition(":")
    field, _, alpha = rest.rpartition(":")
    if name == "field" and rest:
        return NaturalIdPartitioner(field=rest, num_partitions=num_partitions)
    if spec != "iid" and not (name == "dirichlet" and field):
        raise ConfigError(f"unknown partitioner {spec!r}{_nearest(name)}; known: {', '.join(FORMS)}")
    if num_partitions is None:
        raise ConfigError(f"partitioner {spec!r} needs the number of partitions; only field:NAME finds it in the data")
    if spec == "iid":
        return IidPartitioner(num_partitions=num_partitions, seed=seed)
    return DirichletPartitioner(num_partitions=num_partitions, field=field, alpha=_alpha(spec, alpha), seed=seed)


def read_records(path: Path) -> list[Mapping[str, object]]:
    """Read a file of records, one for each line that is not blank, or row; raise `DataError` with the line."""
    return [record.fields for record in read_file(path)]


def write_partitions(path: Path, out_dir: Path, parts: Sequence[Sequence[int]]) -> list[Path]:
    """Write each partition's lines of `path` byte for byte to a file of its own that only this user may read.

    The rows of a table become lines of JSON. Indices count the lines that are not blank, as `read_records` does. A last
    line without a line feed gets one. Raises `DataError` if `path` has no line of an index, or `out_dir` cannot be
    written or would have `path` overwritten.
    """
    suffix = ".jsonl" if is_table(path) else path.suffix
    lines = list(map(_json_line, read_records(path))) if is_table(path) else [line.content for line in read_lines(path)]
    for index in itertools.chain.from_iterable(parts):
        if not 0 <= index < len(lines):
            raise DataError(
                f"{path}: {counted(len(lines), 'record')}, but a partition holds index {index}; partition it again"
            )
    width = len(str(len(parts) - 1))
    written = [out_dir / f"partition-{number:0{width}}{suffix}" for number in range(len(parts))]
    if path.resolve() in [target.resolve() for target in written]:
        raise DataError(f"{path}: a partition would overwrite it; choose another folder than {out_dir}")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for target, part in zip(written, parts, strict=True):
            _write_privately(target, b"".join(_ended(lines[index]) for index in part))
    except OSError as error:
        raise DataError(f"{out_dir}: cannot be written: {error.strerror}; choose another folder") from None
    return written


def _write_privately(target: Path, content: bytes) -> None:
    # A new file, so that neither the mode nor the readers of an older one are inherited.
    target.unlink(missing_ok=True)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _json_line(fields: Mapping[str, object]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, default=str).encode()  # a table may hold dates


def _ended(line: bytes) -> bytes:
    return line if line.endswith(b"\n") else line + b"\n"


def _indices_by_value(records: Records, field: str) -> dict[str, list[int]]:
    """Group record indices by the field's value, in the order of the values, so that no result hangs on arrival."""
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(_value(record, field, index), []).append(index)
    return dict(sorted(groups.items()))


def _value(record: Mapping[str, object], field: str, index: int) -> str:
    """Write the value as JSON, which keeps 1 and "1" apart."""
    if field not in record:
        raise ConfigError(f"record {index + 1} has no field {field!r}; the fields there are: {name_fields(record)}")
    value = record[field]
    if not isinstance(value, str | int | float):
        raise ConfigError(f"field {field!r} of record {index + 1} is no string or number; name a field that is")
    return json.dumps(value)


def _deal(groups: Mapping[str, list[int]], num_partitions: int) -> list[list[int]]:
    parts: list[list[int]] = [[] for _ in range(num_partitions)]
    for indices in sorted(groups.values(), key=len, reverse=True):  # a stable sort: equals stay in the order of values
        min(parts, key=len).extend(indices)
    return [sorted(part) for part in parts]


def _check_count(num_partitions: int) -> None:
    if num_partitions < 1:
        raise ConfigError(f"the number of partitions must be at least 1, got {num_partitions}")


def _check_enough(num_records: int, num_partitions: int, each: int = 1) -> None:
    if num_records < num_partitions * each:
        raise ConfigError(
            f"{counted(num_records, 'record')} cannot fill {counted(num_partitions, 'partition')} with at least"
            f" {each} each;"
            " ask for fewer partitions or add records"
        )


def _alpha(spec: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"partitioner {spec!r}: alpha {text!r} is no number; write dirichlet:NAME:0.5") from None


def _nearest(name: str) -> str:
    forms = {form.partition(":")[0]: form for form in FORMS}
    close = difflib.get_close_matches(name.lower(), forms, n=1)
    return f"; did you mean {forms[close[0]]}?" if close else ""
