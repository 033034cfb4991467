"""Rows of .csv, .tsv and .parquet files as fields; no error quotes a value, which is private text."""

import csv
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from splitfl.errors import DataError

TABLES = (".csv", ".tsv", ".parquet")

_DELIMITERS = ",;\t"
_LONGEST_CELL = min(sys.maxsize, 2**31 - 1)  # the module's own limit, 128 KiB, is shorter than a discharge letter
_ROWS_AT_ONCE = 256


def read_rows(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield (file and line or row, fields) of each row; raise `DataError` for what is not such a table."""
    return _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path)


def _csv(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            first = file.readline()
            names = next(csv.reader([first], delimiter=_delimiter(path, first)), [])
            _check_names(path, names)
            reader = csv.reader(file, delimiter=_delimiter(path, first), strict=True)
            for row in reader:
                where = f"{path}, line {reader.line_num + 1}"
                if len(row) != len(names) and row:
                    raise DataError(
                        f"{where}: {len(row)} cells where the header has {len(names)}; put cells that hold the"
                        " delimiter or a line break in double quotes"
                    )
                if row:
                    yield where, dict(zip(names, row, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}: not CSV: {error}; write UTF-8, with double quotes around cells") from None
        except UnicodeDecodeError:
            raise DataError(f"{path}: not UTF-8; save the file as UTF-8") from None


def _delimiter(path: Path, header: str) -> str:
    """Return a tab for .tsv, else what the header has most of: spreadsheets of many countries write semicolons."""
    return "\t" if path.suffix.lower() == ".tsv" else max(_DELIMITERS, key=header.count)


def _check_names(path: Path, names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if not names or "" in names or twice:
        found = f"{twice[0]!r} comes twice" if twice else "a column has no name"
        raise DataError(f"{path}: the first line must name the columns, each once: {found}")


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path}: .parquet files need pyarrow: pip install 'splitfl[parquet]', or save the file as .jsonl or .csv"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for fields in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", fields
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError):
        raise DataError(f"{path}: cannot be read as Parquet; write it anew with pandas, polars or pyarrow") from None
