"""Records, log and snapshots against torn writes, flipped bits, full disks, kills and power failures."""

import json
import os
import random
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from durability.forgetful import ForgetfulDisk
from forked import Forked

from splitfl import __version__
from splitfl.durability.disk import Appending, RealDisk
from splitfl.durability.format import STATE_FORMAT
from splitfl.durability.record import Record
from splitfl.durability.store import Store, check_idle
from splitfl.errors import ConfigError, StorageError


def open_store(folder: Path, *, fsync: Literal["always", "interval", "never"] = "always", **more: Any) -> Store:
    return Store(folder, **{"fsync": fsync, "fsync_interval": 60.0, "keep": 2, **more})


def entry(number: int) -> Record:
    tensors = {"a": torch.full((3, 5), float(number)), "empty": torch.empty(0, 4), "b": torch.arange(7).bfloat16()}
    return Record(kind="commit", fields={"number": number, "who": ["ä", None, True, -1, 2.5]}, tensors=tensors)


def numbers(store: Store) -> list[int]:
    """The numbers that are left: the snapshot's, and its later entries'."""
    recovered = store.recover()
    assert recovered.snapshot is not None
    return [recovered.snapshot.fields["number"], *(each.fields["number"] for each in recovered.entries)]


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Two generations: snapshots 0 and 3, entries 1, 2 and 4, 5."""
    folder = tmp_path / "state"
    with open_store(folder) as store:
        for snapshot, entries in ((0, (1, 2)), (3, (4, 5))):
            store.snapshot(entry(snapshot))
            for number in entries:
                store.append(entry(number))
    return folder


class TestTwoVersions:
    """Records of another splitfl are refused with both numbers, and left as they are."""

    @pytest.mark.parametrize(
        ("said", "why"),
        [
            (
                '{"format": 3, "splitfl": "0.9.1"}',
                r"written by splitfl 0\.9\.1 in format 3, and this is splitfl .*format 2",
            ),
            (None, "written by an older splitfl in format 1"),
            ("{}", "not known which splitfl wrote"),
            ("", "not known which splitfl wrote"),
        ],
    )
    def test_another_form_is_refused(self, filled: Path, said: str | None, why: str) -> None:
        path = filled / "format.json"
        path.unlink() if said is None else path.write_text(said)
        before = {each.name: each.read_bytes() for each in filled.iterdir()}
        for opened in (open_store, Store.reading):
            with pytest.raises(ConfigError, match=why):
                opened(filled)
        assert {each.name: each.read_bytes() for each in filled.iterdir()} == before
        check_idle(filled)  # and the folder is free again

    def test_the_form_is_written_before_the_first_record(self, tmp_path: Path) -> None:
        with open_store(tmp_path / "state"):
            assert json.loads((tmp_path / "state" / "format.json").read_text()) == {
                "format": STATE_FORMAT,
                "splitfl": __version__,
            }
        with open_store(tmp_path / "state"):
            pass  # a process that died before its first snapshot

    def test_looking_writes_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "state").mkdir()
        Store.reading(tmp_path / "state")
        Store.reading(tmp_path / "nowhere")
        assert list((tmp_path / "state").iterdir()) == []


def test_what_was_written_is_read(filled: Path) -> None:
    with open_store(filled) as store:
        recovered = store.recover()
        assert recovered.notes == []
        found = list(recovered.entries)
        assert [each.fields for each in found] == [dict(entry(4).fields), dict(entry(5).fields)]
        for each, number in zip(found, (4, 5), strict=True):
            assert list(each.tensors) == ["a", "empty", "b"]
            assert all(torch.equal(each.tensors[name], tensor) for name, tensor in entry(number).tensors.items())
        store.append(entry(6))
    with open_store(filled) as store:
        assert numbers(store) == [3, 4, 5, 6]


def test_records_kept_by_number_outlast_generations_within_their_limit(filled: Path) -> None:
    with open_store(filled) as store:
        store.recover()
        for number in (2, 7, 5):
            store.keep(number, entry(number), 2)
        assert store.kept() == [5, 7]
        for number in (8, 9, 10):
            store.snapshot(entry(number))
    with open_store(filled) as store:
        assert store.kept() == [5, 7]
        assert store.kept_at(5).fields == dict(entry(5).fields)
        assert numbers(store) == [10]
        store.forget_kept(above=5)
        assert store.kept() == [5]


def test_everything_is_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with open_store(tmp_path / "state") as store:
            store.snapshot(entry(0))
            store.append(entry(1))
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "state").iterdir()}
    assert set(modes.values()) == {0o600}, modes
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def test_a_log_cut_off_anywhere(filled: Path) -> None:
    log = filled / "log-00000001.bin"
    whole = log.read_bytes()
    middle = len(whole) // 2
    for size in (*range(0, len(whole), 7), middle - 1, middle, middle + 1, len(whole) - 1):
        log.write_bytes(whole[:size])
        with open_store(filled) as store:
            left = numbers(store)
            assert left == [3, 4, 5][: len(left)]
            assert len(left) == 1 + size // middle
            store.append(entry(9))
        with open_store(filled) as store:
            assert numbers(store) == [*left, 9]


def test_a_flipped_bit_is_found_and_said(filled: Path) -> None:
    log, draw = filled / "log-00000001.bin", random.Random(1)
    whole = log.read_bytes()
    for _ in range(60):
        at = draw.randrange(len(whole))
        log.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        with open_store(filled) as store:
            recovered = store.recover()
            assert [each.fields["number"] for each in recovered.entries] == [4, 5][: at * 2 // len(whole)]
            assert "no whole record" in recovered.notes[0]
            assert (filled / f"{log.name}.damaged").exists()


def test_a_damaged_snapshot_has_a_predecessor(filled: Path) -> None:
    snapshot, draw = filled / "snapshot-00000001.bin", random.Random(2)
    whole = snapshot.read_bytes()
    for _ in range(30):
        at = draw.randrange(len(whole))
        snapshot.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        with open_store(filled) as store:
            assert numbers(store) == [0, 1, 2, 4, 5]
    for size in range(0, len(whole), 11):
        snapshot.write_bytes(whole[:size])
        with open_store(filled) as store:
            recovered = store.recover()
            assert "the generation before it is used" in recovered.notes[0]
            assert [each.fields["number"] for each in recovered.entries] == [1, 2, 4, 5]


def test_no_snapshot_that_can_be_read_is_an_error(filled: Path) -> None:
    for path in filled.glob("snapshot-*"):
        path.write_bytes(b"x" * 40)
    with open_store(filled) as store, pytest.raises(StorageError, match="none of 2 snapshots can be read"):
        store.recover()


def test_generations_are_bounded_and_the_last_two_stay(tmp_path: Path) -> None:
    with open_store(tmp_path / "state") as store:
        for number in range(0, 20, 2):
            store.snapshot(entry(number))
            store.append(entry(number + 1))
        assert store.generations() == [8, 9]
    assert len(list((tmp_path / "state").iterdir())) == 6  # two of each, the lock, and the form


def test_a_generation_that_is_held_stays_while_later_ones_go(tmp_path: Path) -> None:
    with open_store(tmp_path / "state") as store:
        held = store.snapshot(entry(0))
        for number in range(1, 5):
            store.snapshot(entry(number), holds=held)
        assert store.generations() == [0, 3, 4]
        assert numbers(store) == [4]
        store.snapshot(entry(5))
        assert store.generations() == [4, 5]


def test_rewinding(filled: Path) -> None:
    with open_store(filled) as store:
        store.rewind(0)
    with open_store(filled) as store:
        assert numbers(store) == [0]
        assert sorted(path.suffix for path in filled.iterdir() if "dropped" in path.name) == [".dropped"] * 3


def test_another_process_is_kept_out(filled: Path) -> None:
    with open_store(filled), pytest.raises(ConfigError, match="in use by another process"):
        open_store(filled)


def test_a_full_disk_leaves_the_last_good_record(tmp_path: Path) -> None:
    """A limit on the file's size stands in for the disk: writes fail in the middle of a record."""
    code = """
import resource, signal, sys, torch
from pathlib import Path
from splitfl.durability.record import Record
from splitfl.durability.store import Store, check_idle
from splitfl.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store(Path(sys.argv[1]), fsync="always", fsync_interval=1.0, keep=2)
big = lambda n: Record(kind="commit", fields={"number": n}, tensors={"a": torch.full((2500,), float(n))})
store.snapshot(big(0))
resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, 25_000))
store.append(big(1)); store.append(big(2))
for attempt in (lambda: store.append(big(3)), lambda: store.snapshot(Record(kind="s", fields={"number": 9},
        tensors={"a": torch.zeros(10_000)}))):
    try:
        attempt()
    except StorageError as error:
        print(error)
store.append(Record(kind="commit", fields={"number": 4}))
"""
    folder = tmp_path / "state"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.count("make room") == 2
    assert not list(folder.glob("*.partial"))
    with open_store(folder) as store:
        assert numbers(store) == [0, 1, 2, 4]


class _NoMoreFiles(RealDisk):
    """A disk on which files grow and are replaced, and none can be added."""

    def append(self, path: Path) -> Appending:
        if not path.exists():
            raise StorageError(f"{path}: no room for another file")
        return super().append(path)


def test_a_snapshot_without_room_for_its_log_hides_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with open_store(folder) as store:
        store.snapshot(entry(0))
        store.append(entry(1))
    with open_store(folder, disk=_NoMoreFiles()) as store:
        assert numbers(store) == [0, 1]
        with pytest.raises(StorageError, match="no room"):
            store.snapshot(entry(2))
        store.append(entry(3))
    with open_store(folder) as store:
        assert numbers(store) == [0, 1, 3]


def test_a_read_only_folder(filled: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    filled.chmod(0o500)
    with pytest.raises(StorageError):
        open_store(filled)


def test_kills_at_random(tmp_path: Path) -> None:
    """A process that was killed while it wrote has left all that it said was written, in order, and once."""
    code = """
import sys, torch
from pathlib import Path
from splitfl.durability.record import Record
from splitfl.durability.store import Store, check_idle
store = Store(Path(sys.argv[1]), fsync="never", fsync_interval=1.0, keep=2)
number = 0
for number in range(int(sys.argv[2]), 10**6):
    record = Record(kind="commit", fields={"number": number}, tensors={"a": torch.full((2000,), float(number))})
    if number % 20 == 0:
        store.snapshot(record)
    else:
        if number == int(sys.argv[2]):
            list(store.recover().entries)
        store.append(record)
    print(number, flush=True)
"""
    script, folder, begin, draw = tmp_path / "writer.py", tmp_path / "state", 0, random.Random(3)
    script.write_text(code, encoding="utf-8")
    for life in range(5):
        writer = Forked(script, str(folder), str(begin), said=tmp_path / f"{life}.said")
        deadline = time.monotonic() + 60
        while "\n" not in writer.printed():
            assert time.monotonic() < deadline, writer.said()
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.2))
        writer.kill()
        writer.wait()
        said = list(map(int, writer.printed().split()))
        with open_store(folder) as store:
            left = numbers(store)
        assert left == list(range(left[0], left[-1] + 1))
        assert left[-1] in (said[-1], said[-1] + 1)
        begin = left[-1] + 1


@pytest.mark.parametrize("fsync", ["always", "interval", "never"])
def test_power_failures(tmp_path: Path, fsync: Literal["always", "interval", "never"]) -> None:
    """With "always" nothing is lost that `append` returned for; with the others what is left is a beginning."""
    for seed in range(60):
        draw, disk = random.Random(seed), ForgetfulDisk(seed)
        folder, number, kept = tmp_path / str(seed), 0, [0]
        store = open_store(folder, fsync=fsync, disk=disk)
        store.snapshot(entry(0))
        for _ in range(30):
            number += 1
            if draw.random() < 0.15:
                store.snapshot(entry(number))
                kept = [number]
            else:
                store.append(entry(number))
                kept.append(number)
            if draw.random() < 0.2:
                disk.lose_power()
                os.close(store._lock)
                store = open_store(folder, fsync=fsync, disk=disk)
                left = numbers(store)
                assert left == kept[: len(left)]
                assert fsync != "always" or left == kept
                kept, number = left, left[-1]
        store.close()


def test_durable_false_costs_no_sync(tmp_path: Path) -> None:
    disk = ForgetfulDisk(1)
    with open_store(tmp_path, disk=disk) as store:
        store.snapshot(entry(0))
        store.append(entry(1), durable=False)
        assert disk.safe["log-00000000.bin"] == b""
        store.append(entry(2))
        assert disk.safe["log-00000000.bin"] == bytes(disk.written["log-00000000.bin"])


def test_damaged_lengths_allocate_nothing(filled: Path) -> None:
    log = filled / "log-00000001.bin"
    whole = bytearray(log.read_bytes())
    whole[8:16] = (1 << 62).to_bytes(8, "little")
    log.write_bytes(whole)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open_store(filled) as store:
        assert numbers(store) == [3]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def crashing(point: str) -> Callable[[], int]:
    code = "from splitfl.durability.crash import crash_point\nfor _ in range(5): crash_point('here')"
    environment = {**os.environ, "SPLITFL_CRASH": point}
    return lambda: subprocess.run([sys.executable, "-c", code], env=environment, timeout=30, check=False).returncode


def test_a_pause_ends_when_it_is_told_to(tmp_path: Path) -> None:
    """Either by its time, or by a file: then at once, the pauses after it too."""
    code = "from splitfl.durability.crash import crash_point\nfor _ in range(3): crash_point('here')"
    environment = {**os.environ, "SPLITFL_PAUSE": "here:1:0.1,here:2:60,here:3:60", "SPLITFL_GO": str(tmp_path / "go")}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert [process.stderr.readline() for _ in range(2)] == [b"paused at here\n"] * 2
        assert process.poll() is None
        (tmp_path / "go").touch()
        assert process.wait(30.0) == 0


@pytest.mark.parametrize(("point", "code"), [("here:5", 137), ("here:6", 0), ("there:1", 0), ("a:1,here:2", 137)])
def test_crash_points(point: str, code: int) -> None:
    assert crashing(point)() == code
