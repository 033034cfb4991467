"""Disks that fill up in the middle of a run: a role that cannot write stops in a sentence, and goes on with room."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.town import Town

pytestmark = pytest.mark.slow

# records of some 60 KiB a step on both sides
LONG = {
    "federation__num_rounds": 1,
    "federation__local_steps": 60,
    "train__backbone": "full",
    "train__bottom": "full",
    "train__top": "full",
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 2 MiB, which takes a few dozen steps of the tiny model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)  # noqa: S607  # wherever it is


def make_room(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=200m", str(folder)], check=True)  # noqa: S607


def test_a_server_whose_disk_is_full(town: Callable[..., Town], small_disk: Path) -> None:
    run = town(1, server__runs_dir=small_disk, **LONG)
    run.run_dir = small_disk / "run"
    assert stops_and_goes_on(run, "server", small_disk) == 60


def test_a_server_that_has_no_room_for_its_run_begins_none(town: Callable[..., Town], small_disk: Path) -> None:
    run = town(1, server__runs_dir=small_disk, storage__keep_snapshots=1000, **LONG)
    code, said = run.end_of("server")
    assert code == 10
    assert "the run's model and snapshots take about" in said
    assert "make room, or set server.runs_dir to another disk" in said
    assert list(small_disk.iterdir()) == []


def test_a_client_whose_disk_is_full(town: Callable[..., Town], small_disk: Path) -> None:
    """It ends, and is waited for; with room again it goes on in the middle of its round."""
    run = town(1, own={"client.output_dir": small_disk}, **{**LONG, "federation__num_rounds": 2})
    run.client_dir = lambda name: small_disk / "run" / name  # type: ignore[method-assign]
    assert stops_and_goes_on(run, "clinic-0", small_disk) == 120


def stops_and_goes_on(run: Town, name: str, disk: Path) -> int:
    """Wait until it wants room, give it some, and let the run end; return the steps acknowledged."""
    code, said = run.end_of(name)
    assert (code, "make room" in said, "No space left" in said) == (10, True, True), said
    assert not list(disk.rglob("*.partial"))
    make_room(disk)
    run.start(name)
    run.keep_alive()
    verdict = run.verdict()
    assert verdict.problems == []
    assert run.differs_from_replay() == []
    return verdict.steps_acknowledged
