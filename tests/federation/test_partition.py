"""Partitions: every record once, the same for a seed, and files that hold the same bytes."""

import itertools
import json
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.errors import ConfigError, DataError
from splitfl.federation.partition import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    Partitioner,
    partitioner_from,
    read_records,
    write_partitions,
)

Records = Sequence[Mapping[str, object]]

VALUES = st.one_of(st.sampled_from(["a", "b", "c"]), st.integers(0, 2), st.booleans())
RECORDS = st.lists(st.fixed_dictionaries({"organ": VALUES}), min_size=1, max_size=60)
SEEDS = st.integers(0, 2**31 - 1)


def of(*values: object) -> Records:
    return [{"organ": value} for value in values]


def holds_the_law(partitioner: Partitioner, records: Records) -> list[list[int]]:
    """Check that each record is in exactly one partition, in order, and that a second call says the same."""
    parts = partitioner.partition(records)
    assert sorted(itertools.chain.from_iterable(parts)) == list(range(len(records)))
    assert all(part == sorted(part) for part in parts)
    assert all(type(index) is int for part in parts for index in part)
    assert partitioner.partition(records) == parts
    return parts


@given(records=RECORDS, seed=SEEDS, data=st.data())
def test_iid_deals_evenly(records: Records, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(records)))
    sizes = [len(part) for part in holds_the_law(IidPartitioner(num_partitions=count, seed=seed), records)]
    assert len(sizes) == count
    assert max(sizes) - min(sizes) <= 1


@given(records=RECORDS)
def test_by_field_a_partition_is_a_value(records: Records) -> None:
    parts = holds_the_law(NaturalIdPartitioner(field="organ"), records)
    values = [{json.dumps(records[index]["organ"]) for index in part} for part in parts]
    assert all(len(value) == 1 for value in values)
    assert len(set().union(*values)) == len(parts)


@given(records=RECORDS, data=st.data())
def test_by_field_a_value_is_never_torn(records: Records, data: st.DataObject) -> None:
    num_values = len({json.dumps(record["organ"]) for record in records})
    count = data.draw(st.integers(1, num_values))
    parts = holds_the_law(NaturalIdPartitioner(field="organ", num_partitions=count), records)
    values = [{json.dumps(records[index]["organ"]) for index in part} for part in parts]
    assert sum(len(value) for value in values) == num_values
    assert len(parts) == count
    assert all(parts)


@given(records=RECORDS, data=st.data())
def test_by_field_the_order_of_arrival_has_no_say(records: Records, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(records))
    partitioner = NaturalIdPartitioner(field="organ", num_partitions=1)
    whole = NaturalIdPartitioner(field="organ")

    def values(records: Records) -> list[list[str]]:
        return [[json.dumps(records[index]["organ"]) for index in part] for part in whole.partition(records)]

    assert values(shuffled) == values(records)
    assert partitioner.partition(shuffled) == [list(range(len(records)))]


@settings(deadline=None)
@given(records=RECORDS, seed=SEEDS, alpha=st.floats(0.3, 1e6), data=st.data())
def test_dirichlet_fills_every_partition(records: Records, seed: int, alpha: float, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, min(3, max(1, len(records) // 8))))
    parts = holds_the_law(DirichletPartitioner(num_partitions=count, field="organ", alpha=alpha, seed=seed), records)
    assert len(parts) == count
    assert all(parts)


def test_values_are_dealt_from_the_largest() -> None:
    records = of(*"aaaa", *"bbb", *"cc", *"dd", "e")
    parts = NaturalIdPartitioner(field="organ", num_partitions=2).partition(records)
    # a | b, then c to the smaller (b), then d to a, then e to b
    assert parts == [[0, 1, 2, 3, 9, 10], [4, 5, 6, 7, 8, 11]]


def test_one_and_its_name_are_two_values() -> None:
    assert len(NaturalIdPartitioner(field="organ").partition(of(1, "1", True, 1))) == 3


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet:organ:1.0"])
def test_the_seed_decides(partitioner: str) -> None:
    records = of(*"ab" * 20)
    drawn = [partitioner_from(partitioner, 3, seed).partition(records) for seed in range(4)]
    assert len({str(parts) for parts in drawn}) == 4


def test_small_alpha_skews_and_large_alpha_does_not() -> None:
    records = of(*"ab" * 500)

    def largest_share(alpha: float) -> float:
        """Return the mean share that the commoner label has in a partition: 0.5 is no skew, 1 is all."""
        partitioner = DirichletPartitioner(num_partitions=4, field="organ", alpha=alpha, seed=3)
        shares = [sum(index % 2 for index in part) / len(part) for part in partitioner.partition(records)]
        return sum(max(share, 1 - share) for share in shares) / len(shares)

    assert largest_share(0.1) > 0.8
    assert largest_share(1000.0) < 0.55


def test_dirichlet_draws_again_until_all_are_large_enough() -> None:
    records = of(*"ab" * 20)
    hard = {
        seed: DirichletPartitioner(num_partitions=4, field="organ", alpha=1.0, seed=seed, min_partition_size=6)
        for seed in range(10)
    }
    easy = {seed: DirichletPartitioner(num_partitions=4, field="organ", alpha=1.0, seed=seed) for seed in range(10)}
    assert all(len(part) >= 6 for partitioner in hard.values() for part in partitioner.partition(records))
    # without the rule some of the same seeds give smaller ones, so the rule is what made the difference
    assert any(len(part) < 6 for partitioner in easy.values() for part in partitioner.partition(records))


def test_dirichlet_gives_up_with_a_remedy() -> None:
    partitioner = DirichletPartitioner(num_partitions=4, field="organ", alpha=1e-6, seed=1, min_partition_size=2)
    with pytest.raises(ConfigError, match=r"none of 1000 draws with alpha 1e-06 .*; raise alpha"):
        partitioner.partition(of(*"a" * 8))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("iid", IidPartitioner(num_partitions=2, seed=5)),
        ("field:organ", NaturalIdPartitioner(field="organ", num_partitions=2)),
        ("field:a:b", NaturalIdPartitioner(field="a:b", num_partitions=2)),
        ("dirichlet:organ:0.5", DirichletPartitioner(num_partitions=2, field="organ", alpha=0.5, seed=5)),
        ("dirichlet:a:b:2", DirichletPartitioner(num_partitions=2, field="a:b", alpha=2.0, seed=5)),
    ],
)
def test_a_spec_names_a_partitioner(spec: str, expected: Partitioner) -> None:
    assert partitioner_from(spec, 2, 5) == expected


def test_by_field_alone_needs_no_count() -> None:
    assert partitioner_from("field:organ", None, 5) == NaturalIdPartitioner(field="organ")
    with pytest.raises(ConfigError, match=r"'iid' needs the number of partitions"):
        partitioner_from("iid", None, 5)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("dirichlett:organ:1", r"did you mean dirichlet:NAME:ALPHA\?; known: iid, field:NAME, dirichlet:NAME:ALPHA"),
        ("IID", r"did you mean iid\?"),
        ("zzz", r"unknown partitioner 'zzz'; known: iid"),
        ("", r"unknown partitioner ''; known"),
        ("field", r"unknown partitioner 'field'; did you mean field:NAME\?"),
        ("field:", r"unknown partitioner 'field:'"),
        ("iid:organ", r"unknown partitioner 'iid:organ'"),
        ("dirichlet:organ", r"unknown partitioner 'dirichlet:organ'"),
        ("dirichlet:organ:much", r"alpha 'much' is no number"),
        ("dirichlet:organ:0", r"alpha of dirichlet must be positive and finite, got 0\.0"),
        ("dirichlet:organ:-1", r"alpha of dirichlet must be positive"),
        ("dirichlet:organ:nan", r"alpha of dirichlet must be positive"),
        ("dirichlet:organ:inf", r"alpha of dirichlet must be positive"),
    ],
)
def test_a_wrong_spec_is_explained(spec: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        partitioner_from(spec, 2, 5)


@pytest.mark.parametrize("spec", ["iid", "field:organ", "dirichlet:organ:1"])
def test_counts_are_checked(spec: str) -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        partitioner_from(spec, 0, 5)
    with pytest.raises(ConfigError, match="2 records cannot fill 3 partitions"):
        partitioner_from(spec, 3, 5).partition(of("a", "b"))


def test_no_records_fill_no_partition() -> None:
    with pytest.raises(ConfigError, match="0 records cannot fill 1 partition "):
        NaturalIdPartitioner(field="organ").partition([])


def test_the_smallest_size_is_checked() -> None:
    with pytest.raises(ConfigError, match="min_partition_size must be at least 1, got 0"):
        DirichletPartitioner(num_partitions=2, field="organ", alpha=1.0, seed=1, min_partition_size=0)


def test_too_few_values_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"field 'organ' has 2 values, fewer than 3 partitions"):
        NaturalIdPartitioner(field="organ", num_partitions=3).partition(of("a", "b", "a"))


@pytest.mark.parametrize("spec", ["field:clinic", "dirichlet:clinic:1"])
def test_a_missing_field_names_those_there(spec: str) -> None:
    records = [{"clinic": "a"}, {"organ": "b", "text": "private words"}]
    with pytest.raises(ConfigError, match=r"record 2 has no field 'clinic'; .*: 'organ', 'text'") as caught:
        partitioner_from(spec, 1, 5).partition(records)
    assert "private" not in str(caught.value)


@pytest.mark.parametrize("value", [None, ["a"], {"a": 1}])
def test_a_field_to_deal_by_is_a_plain_value(value: object) -> None:
    with pytest.raises(ConfigError, match=r"field 'organ' of record 1 is no string or number"):
        NaturalIdPartitioner(field="organ").partition(of(value))


def test_files_hold_the_lines_byte_for_byte(tmp_path: Path) -> None:
    lines = [b'{"text":  "a \\u00e9"}\r\n', b'{"text": "b \xe2\x80\xa8"}\n', b'{"text": "c"}']
    path = tmp_path / "all.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\n" + lines[1] + b"  \n" + lines[2])
    assert read_records(path) == [{"text": "a \u00e9"}, {"text": "b \u2028"}, {"text": "c"}]
    written = write_partitions(path, tmp_path / "new" / "parts", [[2, 0], [1]])
    assert [target.name for target in written] == ["partition-0.jsonl", "partition-1.jsonl"]
    assert [target.read_bytes() for target in written] == [lines[2] + b"\n" + lines[0], lines[1]]


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=20), seed=SEEDS)
def test_partitions_hold_all_records_again(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    path = folder / "all.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8")
    records = read_records(path)
    assert [record["text"] for record in records] == texts
    parts = IidPartitioner(num_partitions=min(3, len(texts)), seed=seed).partition(records)
    written = write_partitions(path, folder / "out", parts)
    assert [read_records(target) for target in written] == [[records[index] for index in part] for part in parts]


def test_plain_lines_are_records_of_text(tmp_path: Path) -> None:
    path = tmp_path / "all.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_records(path) == [{"text": "one"}, {"text": "two"}]
    assert [target.read_bytes() for target in write_partitions(path, tmp_path / "p", [[1], [0]])] == [
        b"two\n",
        b"one\n",
    ]


def test_only_the_user_may_read_a_partition_even_where_a_file_was(tmp_path: Path) -> None:
    path = tmp_path / "all.txt"
    path.write_text("one\n", encoding="utf-8")
    older = tmp_path / "p" / "partition-0.txt"
    older.parent.mkdir()
    older.write_text("old", encoding="utf-8")
    older.chmod(0o644)
    (written,) = write_partitions(path, tmp_path / "p", [[0]])
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert written.read_bytes() == b"one\n"


def test_names_of_many_partitions_sort_by_number(tmp_path: Path) -> None:
    path = tmp_path / "all.txt"
    path.write_text("x\n" * 11, encoding="utf-8")
    written = write_partitions(path, tmp_path / "p", [[index] for index in range(11)])
    assert written == sorted(written)
    assert written[0].name == "partition-00.txt"


@pytest.mark.parametrize("index", [2, -1])
def test_an_index_without_a_line_is_refused(tmp_path: Path, index: int) -> None:
    path = tmp_path / "all.txt"
    path.write_text("one\ntwo\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"all\.txt: 2 records, but a partition holds index {index}"):
        write_partitions(path, tmp_path / "p", [[0], [index]])
    assert not (tmp_path / "p").exists()


def test_a_source_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "partition-1.txt"
    path.write_text("one\ntwo\n", encoding="utf-8")
    with pytest.raises(DataError, match="a partition would overwrite it"):
        write_partitions(path, tmp_path, [[0], [1]])
    assert path.read_text(encoding="utf-8") == "one\ntwo\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "all.txt"
    path.write_text("one\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"all\.txt/p: cannot be written: Not a directory"):
        write_partitions(path, path / "p", [[0]])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", '{"text": "private words"}\n{"text": "private words}\n', r"line 2: not JSON: Unterminated string"),
        ("a.jsonl", '["private words"]\n', r"line 1: not an object but an array"),
        ("a.xlsx", "private words\n", r"unknown suffix '\.xlsx'"),
        ("a.txt", "", r"an empty file"),
    ],
)
def test_a_bad_file_is_named_and_never_quoted(tmp_path: Path, name: str, content: str, reason: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=reason) as caught:
        read_records(path)
    assert "private" not in str(caught.value)


def test_partitioning_needs_no_torch() -> None:
    code = "import sys, splitfl.federation.partition; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
