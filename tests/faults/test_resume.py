"""Where clients go on: after lost disks, old copies, second processes, rollbacks and snapshots alone."""

import shutil
from collections.abc import Callable

import pytest
from faults.town import Town

from server_backbone.replay import replay, rollback
from splitfl.command_line import run_one
from splitfl.commands.purge import Purge

pytestmark = pytest.mark.slow


def kill(run: Town, name: str) -> None:
    run.processes[name].kill()
    run.processes[name].wait()


def test_a_client_that_lost_its_disk_waits_for_the_next_round(town: Callable[..., Town]) -> None:
    run = town(2, federation__local_steps=40)
    run.wait_for("step", 10)
    kill(run, "clinic-1")
    shutil.rmtree(run.client_dir("clinic-1"))
    run.start("clinic-1")
    run.wait_for("client_rejoins", 1)
    (event,) = run.events("client_rejoins")
    assert event["client_id"] == "clinic-1"
    assert "records end at step 0" in event["reason"]
    assert [run.end_of(name)[0] for name in ("server", *run.names)] == [0, 0, 0]
    first, second = run.report()["merges"]
    assert (first["absent"], second["absent"]) == (["clinic-1"], [])


def test_a_second_process_with_the_same_folder_is_refused_and_another_supersedes(town: Callable[..., Town]) -> None:
    run = town(1, federation__num_rounds=1, federation__local_steps=5000)
    run.wait_for("step", 5)
    first = run.processes["clinic-0"]
    run.start("clinic-0")
    code, said = run.end_of("clinic-0")
    assert (code, "in use by another process" in said) == (2, True)
    copy = run.config("clinic-0").read_text().replace("/clients'", "/copied'")
    run.config("clinic-0").write_text(copy)
    shutil.copytree(run.folder / "clients", run.folder / "copied")
    run.start("clinic-0")
    assert first.wait(timeout=40) == 8
    assert "SUPERSEDED" in first.said()
    assert "give each client a name of its own" in first.said()
    (reason,) = [line for line in first.said().splitlines() if "SUPERSEDED" in line]
    assert "keys" not in reason  # there are none in this run


@pytest.mark.parametrize(
    ("durability", "server_mode", "commits_in_round"),
    [("redo", "shared", 8), ("snapshot", "shared", 8), ("redo", "per_client", 16)],
)
def test_rolling_back_takes_the_clients_along(
    town: Callable[..., Town], durability: str, server_mode: str, commits_in_round: int
) -> None:
    run = town(
        2,
        pause={"server": f"commit-after-apply:{commits_in_round + 3}:60"},
        federation__num_rounds=3,
        federation__local_steps=8,
        federation__server_mode=server_mode,
        storage__durability=durability,
    )
    run.wait_until_it_pauses("server")
    run.stop("server")
    assert run.end_of("server")[0] == 0
    assert replay(run.run_dir).problems == []
    generation, commit = rollback(run.run_dir, 1)
    assert (generation, commit) == (1, commits_in_round)  # the first merge
    run.start("server")
    run.wait_for("client_rewinds", 2)
    assert [run.end_of(name)[0] for name in ("server", *run.names)] == [0, 0, 0]
    assert replay(run.run_dir).problems == []
    assert all(merge["equal"] for merge in run.report()["merges"])


@pytest.mark.parametrize(("server_mode", "commits_in_round"), [("shared", 12), ("per_client", 24)])
def test_snapshots_alone_go_back_to_the_last_merge_together(
    town: Callable[..., Town], server_mode: str, commits_in_round: int
) -> None:
    run = town(
        2,
        pause={"server": f"commit-after-apply:{commits_in_round + 3}:60"},
        federation__num_rounds=2,
        federation__local_steps=12,
        federation__server_mode=server_mode,
        storage__durability="snapshot",
    )
    run.wait_until_it_pauses("server")
    kill(run, "server")
    run.start("server")
    run.wait_for("client_rewinds", 2)
    assert [run.end_of(name)[0] for name in ("server", *run.names)] == [0, 0, 0]


def test_purging(town: Callable[..., Town], capsys: pytest.CaptureFixture[str]) -> None:
    run = town(1, pause={"clinic-0": "step-before-record:2:60"}, federation__num_rounds=1, federation__local_steps=3)
    run.wait_until_it_pauses("clinic-0")
    assert run_one("purge", Purge(), [str(run.run_dir), "--yes"]) == 2  # at work
    run.go_on("clinic-0")
    assert [run.end_of(name)[0] for name in ("server", "clinic-0")] == [0, 0]
    for folder in (run.run_dir, run.client_dir("clinic-0")):
        assert run_one("purge", Purge(), [str(folder)]) == 0
        assert (folder / "state").exists()
        assert run_one("purge", Purge(), [str(folder), "--yes"]) == 0
        assert not (folder / "state").exists()
        assert (folder / "metrics.jsonl").exists()
    assert "would be removed" in capsys.readouterr().out


def test_an_upload_that_cannot_be_read_is_asked_for_again(town: Callable[..., Town]) -> None:
    """As after a power failure on a disk that lost the file and kept the log."""
    run = town(1, crash={"server": "upload-after-record:1"}, federation__num_rounds=1, federation__local_steps=4)
    assert run.end_of("server")[0] == 137
    (upload,) = (run.run_dir / "uploads").iterdir()
    upload.write_bytes(upload.read_bytes()[:-1])
    run.start("server")
    assert [run.end_of(name)[0] for name in ("server", "clinic-0")] == [0, 0]
    assert [event for event in run.events("note") if "is asked for them again" in event["text"]]
    (merge,) = run.report()["merges"]
    assert list(merge["clients"]) == ["clinic-0"]
    assert run.verdict().problems == []
    assert run.differs_from_replay() == []
