"""With `durability = "snapshot"` steps are in no log: after a kill all go back together, and end with the same bits."""

import random
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from faults.town import Town
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {"federation__num_rounds": 2, "federation__local_steps": 8, "storage__keep_snapshots": 2}
MODES: dict[str, dict[str, Any]] = {
    "shared": {},
    "per_client": {"federation__server_mode": "per_client"},
    "frozen": {"federation__server_mode": "frozen", "train__backbone": "none"},
}


def stop(run: Town, name: str) -> None:
    run.processes[name].send_signal(signal.SIGTERM)
    assert run.end_of(name)[0] == 0


def kill(run: Town, *names: str) -> None:
    for name in names:
        run.processes[name].kill()
    for name in names:
        run.processes[name].wait(10)
    for name in names:
        run.start(name)


def weights(run: Town) -> dict[str, torch.Tensor]:
    return load_file(run.run_dir / "trained.safetensors")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, torch.Tensor]]:
    """Return the weights of a run with nothing happening to it, made once for each mode."""
    made: dict[str, dict[str, torch.Tensor]] = {}

    def run(like: Town, mode: str) -> dict[str, torch.Tensor]:
        if mode not in made:
            settings = {name.replace("__", "."): value for name, value in {**SETTINGS, **MODES[mode]}.items()}
            town = Town(tmp_path_factory.mktemp(mode), like.model, len(like.names), settings)
            try:
                town.keep_alive()
                made[mode] = weights(town)
            finally:
                town.end()
        return made[mode]

    return run


def settle(run: Town, expected: dict[str, torch.Tensor]) -> None:
    run.keep_alive()
    assert [sorted(merge["clients"]) for merge in run.events("merged")] == [run.names] * 2
    assert run.events("client_rejoins") == []
    found = weights(run)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("mode", MODES)
def test_a_server_that_is_killed_after_it_was_stopped_in_the_same_round(
    town: Callable[..., Town], undisturbed: Callable[..., Any], mode: str
) -> None:
    """It goes back to where it was stopped, and so do the clients, which lived on."""
    run = town(2, **SETTINGS, **MODES[mode], storage__durability="snapshot")
    run.wait_for("step", 6)
    stop(run, "server")
    run.start("server")
    run.wait_for("step", 10)
    kill(run, "server")
    settle(run, undisturbed(run, mode))


def test_clients_that_were_stopped_more_often_than_snapshots_are_kept(
    town: Callable[..., Town], undisturbed: Callable[..., Any]
) -> None:
    """They still have the layers of the last merge, to which a server goes back that is killed."""
    run = town(2, **SETTINGS, storage__durability="snapshot")
    run.wait_for("merged", 1)
    for at in (20, 24, 28):
        run.wait_for("step", at)
        for name in run.names:
            stop(run, name)
            run.start(name)
    kill(run, "server")
    settle(run, undisturbed(run, "shared"))


@pytest.mark.parametrize("mode", MODES)
def test_all_are_killed_at_once(town: Callable[..., Town], undisturbed: Callable[..., Any], mode: str) -> None:
    run = town(2, **SETTINGS, **MODES[mode], storage__durability="snapshot")
    for kind, at in (("step", 6), ("loaded", 2)):  # when all have loaded a merge, all have saved it
        run.wait_for(kind, at)
        kill(run, "server", *run.names)
    settle(run, undisturbed(run, mode))


@pytest.mark.parametrize("mode", [*MODES, "sequential"])
def test_kills_at_random(town: Callable[..., Town], mode: str) -> None:
    """Also of one client alone, which begins anew with the next round: the histories and a quiet replay agree."""
    draw = random.Random(mode)
    settings = {**SETTINGS, "federation__server_mode": mode, "federation__num_rounds": 4, "storage__keep_snapshots": 0}
    run = town(3, **settings, storage__durability="snapshot")
    for victims in (["clinic-1"], ["server"], ["clinic-0"], ["server", "clinic-2"], ["clinic-2"]):
        before = len(run.events("step"))
        run.wait_for("step", before + draw.randint(2, 9))
        kill(run, *victims)
    run.keep_alive()
    verdict = run.verdict()
    assert verdict.problems == []
    assert (verdict.steps_lost, verdict.steps_twice) == (0, 0)
    assert verdict.steps_undone > 0
    assert run.events("client_rejoins") != []
    assert run.differs_from_replay() == []
