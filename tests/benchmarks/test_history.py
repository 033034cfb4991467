"""The history checker finds what is lost, counted twice, out of order or different: on histories broken on purpose."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, write_text

from benchmarks.history import Verdict, check
from server_backbone.compute.blocks_worker import ReducedStep
from server_backbone.compute.worker import Worker

Line = dict[str, Any]


def server(steps: int = 4) -> list[Line]:
    lines: list[Line] = [{"event": "started", "resumed": False, "commit_number": 0}]
    for step in range(1, steps + 1):
        members = [{"client_id": "a", "step": step, "num_label_tokens": 1}]
        lines.append({"event": "applied", "commit_number": step, "members": members, "digest": f"s{step}"})
        lines.append({"event": "acknowledged", "client_id": "a", "step": step, "commit_number": step})
    return lines


def client(steps: int = 4) -> list[Line]:
    lines: list[Line] = [{"event": "started", "resumed": False, "step": 0}]
    for step in range(1, steps + 1):
        lines.append({"event": "acknowledged", "step": step, "commit_number": step})
        lines.append({"event": "applied", "step": step, "commit_number": step, "digest": f"c{step}"})
    return lines


def verdict(tmp_path: Path, server_lines: list[Line], client_lines: list[Line], *, redo: bool = True) -> Verdict:
    paths = []
    for name, lines in (("s", server_lines), ("c", client_lines)):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return check(paths[0], {"a": paths[1]}, keeps_records=redo)


def test_a_good_history(tmp_path: Path) -> None:
    found = verdict(tmp_path, server(), client())
    assert found.problems == []
    assert (found.steps_acknowledged, found.commits) == (4, 4)


def swapped(lines: list[Line], one: int, other: int) -> list[Line]:
    lines[one], lines[other] = lines[other], lines[one]
    return lines


@pytest.mark.parametrize(
    ("server_lines", "client_lines", "count"),
    [
        ([*server(), server()[3]], client(), "steps_twice"),  # the server applies a commit again
        ([line for line in server() if line.get("digest") != "s2"], client(), "steps_lost"),
        (server(), [*client(), client()[4]], "steps_twice"),  # the client applies a step again
        (server(), [line for line in client() if line.get("digest") != "c2"], "steps_lost"),
        (server(), swapped(client(), 2, 6), "steps_reordered"),
        (swapped(server(), 1, 5), client(), "steps_twice"),
        ([*server(), {"event": "redone", "commit_number": 4, "digest": "other"}], client(), "digests_differ"),
        (server(), [*client(), {"event": "redone", "step": 4, "commit_number": 4, "digest": "x"}], "digests_differ"),
    ],
)
def test_what_is_broken_is_found(
    tmp_path: Path, server_lines: list[Line], client_lines: list[Line], count: str
) -> None:
    found = verdict(tmp_path, server_lines, client_lines)
    assert found.problems
    assert getattr(found, count) >= 1


def snapshot_at(number: int) -> Line:
    return {"event": "snapshot", "commit_number": number}


def started(**at: int) -> Line:
    return {"event": "started", "resumed": True, **at}


# killed after commit 4, back at the snapshot of commit 2, and on to 4 again
KILLED = [*server()[:5], snapshot_at(2), *server()[5:], started(commit_number=2), *server()[5:]]
BACK = [*client(), {"event": "rewound", "step": 2}, *client()[5:]]


def test_where_only_snapshots_are_durable_a_server_goes_back_to_the_last(tmp_path: Path) -> None:
    found = verdict(tmp_path, KILLED, BACK, redo=False)
    assert found.problems == []
    assert (found.steps_acknowledged, found.steps_undone, found.commits) == (4, 2, 4)
    assert verdict(tmp_path, KILLED, BACK).problems != []  # with records nothing may be undone


def test_a_client_that_was_killed_alone_begins_anew(tmp_path: Path) -> None:
    lines = [*client()[:7], started(step=0), {"event": "rejoined", "step": 3, "reason": ""}, *client()[7:]]
    found = verdict(tmp_path, server(), lines, redo=False)
    assert (found.problems, found.steps_undone) == ([], 3)
    assert verdict(tmp_path, server(), lines[:-1], redo=False).steps_lost == 1  # what came later counts


def test_a_server_that_goes_back_further_than_its_snapshot_has_lost_something(tmp_path: Path) -> None:
    lines = [*KILLED[:6], *server()[5:], started(commit_number=1), *server()[3:]]
    assert verdict(tmp_path, lines, BACK, redo=False).steps_lost == 1


def test_a_client_that_goes_on_without_its_server_is_found(tmp_path: Path) -> None:
    assert verdict(tmp_path, KILLED[:-2], BACK, redo=False).problems != []


@pytest.mark.parametrize("breaks", ["twice", "skipped"])
def test_a_server_that_is_broken_on_purpose(
    make_model: Callable[..., Path],
    federate: Callable[..., Finished],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    breaks: str,
) -> None:
    """The worker applies its third step twice, or not at all: the replay from the run's own log has other weights."""
    from server_backbone.replay import replay

    apply, count = Worker.apply, [0]

    def broken(self: Worker, step: ReducedStep) -> None:
        count[0] += 1
        again = replace(step, gradients={name: gradient.clone() for name, gradient in step.gradients.items()})
        if count[0] != 3 or breaks == "twice":
            apply(self, step)
        if count[0] == 3 and breaks == "twice":
            apply(self, again)

    monkeypatch.setattr(Worker, "apply", broken)
    finished = federate(
        {
            "model": {"model_name_or_path": str(make_model())},
            "federation": {"num_rounds": 1, "local_steps": 5},
            "storage": {"keep_snapshots": 0},
            "server": {"export_model": False},
        },
        {"a": {"path": write_text(tmp_path / "a.txt", num_lines=20, seed=1)}},
    )
    monkeypatch.undo()
    assert finished.errors == {}
    assert any("other weights" in problem for problem in replay(finished.run_dir).problems)
