"""The benchmark that ends processes at points: each point is one that a process comes by, and a run through one."""

from pathlib import Path

import pytest

from benchmarks.chaos import MATERIALS
from benchmarks.points import CLIENTS, SERVER, Points, points_of

ROOT = Path(__file__).resolve().parents[2]
ROLES = {"server": ("server_backbone", "splitfl"), "client": ("client_edge", "splitfl")}


def named(*packages: str) -> set[str]:
    """The points that the code of these packages has."""
    texts = [path.read_text() for package in packages for path in (ROOT / package).rglob("*.py")]
    return {text.split('"')[0] for each in texts for text in each.split('crash_point("')[1:]}


@pytest.mark.parametrize("durability", ["redo", "snapshot"])
def test_every_point_is_in_the_code(durability: str) -> None:
    server = {point for mode in ("shared", "frozen") for point in points_of(mode, durability)["server"]}
    clients = {point for points in CLIENTS[durability] for point in points}
    assert {point.split(":")[0] for point in server} <= named(*ROLES["server"])
    assert {point.split(":")[0] for point in clients} <= named(*ROLES["client"])
    assert len(SERVER[durability]) >= 9


@pytest.mark.slow
def test_a_run_that_is_ended_at_a_point(tmp_path: Path) -> None:
    ends = {"server": ["merge-after-record:1"]}
    runs = [
        Points(
            tmp_path / name, MATERIALS["tiny"], server_mode="shared", durability="redo", num_clients=1, points=points
        )
        for name, points in (("undisturbed", {}), ("ended", ends))
    ]
    for run in runs:
        run.train(within_s=50.0)
    found = runs[1].results(runs[0])
    assert found["problems"] == []
    assert (found["kills_server"], found["kills_client"], found["steps_acknowledged"]) == (1, 0, 8)
    assert (found["replay_bit_identical"], found["weights_of_the_undisturbed_run"]) == (True, True)
