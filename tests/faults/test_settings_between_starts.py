"""Settings that are changed while the server is down: the run goes on, is prolonged, or is refused by name.

Real processes: the server is stopped in the middle of a run, its file is changed, and it is started again with clients
that have stayed, and with clients that are started again.
"""

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_text
from faults.town import Town
from safetensors.torch import load_file

from server_backbone.replay import replay

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "federation__num_rounds": 2,
    "federation__local_steps": 10,
    "optimizer__num_training_steps": 40,
    "optimizer__learning_rate": 0.01,
}


def change(run: Town, name: str, **settings: Any) -> None:
    """Change what a process's file says, or add to it."""
    path = run.config(name)
    text = path.read_text()
    for setting, value in settings.items():
        section, _, key = setting.partition("__")
        line = f"{key} = {json.dumps(value)}"
        without = re.sub(rf"(?m)(^\[{section}\]$(?:\n(?!\[).*)*?)\n{key} = .*$", r"\1", text)
        if f"[{section}]" not in without:
            without += f"\n[{section}]\n"
        text = without.replace(f"[{section}]", f"[{section}]\n{line}")
    path.write_text(text)


def stop(run: Town, name: str = "server") -> None:
    run.processes[name].send_signal(signal.SIGTERM)
    assert run.end_of(name)[0] == 0


def at_commit(number: int) -> dict[str, str]:
    """Have the server pause after a commit, so that it is stopped there however fast the machine is."""
    return {"server": f"commit-after-apply:{number}:60"}


def stop_there(run: Town) -> None:
    """Stop the server where it pauses."""
    run.wait_until_it_pauses("server")
    run.stop("server")
    assert run.end_of("server")[0] == 0


def all_end_well(run: Town) -> None:
    for name in ("server", *run.names):
        code, said = run.end_of(name, 90.0)
        assert code == 0, f"{name}: {said}"


def weights(run: Town) -> dict[str, torch.Tensor]:
    return load_file(run.run_dir / "trained.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Town]:
    """Return a run with nothing happening to it, made once for each number of rounds."""
    made: dict[tuple[int, str], Town] = {}

    def run(model: Path, num_rounds: int, server_mode: str = "shared") -> Town:
        if (num_rounds, server_mode) not in made:
            folder = tmp_path_factory.mktemp(f"quiet-{num_rounds}-{server_mode}")
            settings = {name.replace("__", "."): value for name, value in SETTINGS.items()}
            other = {"federation.num_rounds": num_rounds, "federation.server_mode": server_mode}
            town = Town(folder, model, 2, {**settings, **other})
            try:
                all_end_well(town)
            finally:
                town.end()
            made[num_rounds, server_mode] = town
        return made[num_rounds, server_mode]

    return run


OPERATION: dict[str, Any] = {
    "federation__step_timeout": 17.5,
    "federation__round_timeout": 300.0,
    "federation__wait_timeout": 90.0,
    "federation__per_device_eval_batch_size": 3,
    "federation__min_train_clients": 2,
    "link__heartbeat_timeout": 4.5,
    "link__heartbeat_interval": 0.4,
    "link__frame_bytes": 8192,
    "link__max_in_flight": 1,
    "link__max_rms": 1e5,
    "link__max_caches": 3,
    "link__max_cache_tokens": 20000,
    "link__cache_timeout": 60.0,
    "link__slowest_link_bytes_per_second": 2e7,
    "storage__fsync": "interval",
    "storage__fsync_interval": 0.5,
    "storage__snapshot_steps": 7,
    "storage__keep_named": 4,
}


def test_every_operation_changes_at_once_and_the_run_is_the_undisturbed_one(
    town: Callable[..., Town], quiet: Callable[..., Town], tmp_path: Path
) -> None:
    """One client stays, and reconnects; the other is started again."""
    run = town(2, **SETTINGS, pause=at_commit(5))
    stop_there(run)
    stop(run, "clinic-1")
    change(run, "server", **OPERATION)
    run.start("server")
    run.start("clinic-1")
    all_end_well(run)
    (event,) = run.events("settings_changed")
    told = {each["name"].replace(".", "__"): each["now"] for each in event["changes"]}
    assert told == OPERATION
    assert "settings  " in (run.folder / "server-3.out").read_text()
    assert_same(weights(run), weights(quiet(tmp_path / "model", 2)))
    assert run.verdict().problems == []
    assert replay(run.run_dir).problems == []


IDENTITY: list[tuple[str, Any, str]] = [
    ("seed", 7, "seed (was 42, is 7)"),
    ("lora__r", 16, "lora.r (was 8, is 16)"),
    ("optimizer__learning_rate", 0.02, "optimizer.learning_rate (was 0.01, is 0.02)"),
    ("storage__durability", "snapshot", "storage.durability (was 'redo', is 'snapshot')"),
]


def test_another_identity_is_refused_by_name_and_the_run_goes_on_with_its_own(
    town: Callable[..., Town], quiet: Callable[..., Town], tmp_path: Path
) -> None:
    run = town(2, **SETTINGS, pause=at_commit(5))
    stop_there(run)
    own = run.config("server").read_text()
    for setting, value, told in IDENTITY:
        if setting == "seed":
            run.config("server").write_text(f"seed = {value}\n{own}")
        else:
            change(run, "server", **{setting: value})
        run.start("server")
        code, said = run.end_of("server")
        assert (code, told in said) == (2, True), said
        run.config("server").write_text(own)
    run.start("server")
    all_end_well(run)
    assert_same(weights(run), weights(quiet(tmp_path / "model", 2)))


def test_another_model_under_the_same_name_is_refused_and_the_same_elsewhere_goes_on(
    town: Callable[..., Town], make_model: Callable[..., Path], quiet: Callable[..., Town], tmp_path: Path
) -> None:
    run = town(2, **SETTINGS, pause=at_commit(5))
    stop_there(run)
    before = (run.run_dir / "config.toml").read_text()
    other = make_model(seed=1, name="v2/model")
    change(run, "server", model__model_name_or_path=str(other))
    run.start("server")
    code, said = run.end_of("server")
    assert (code, "was begun with another model than" in said) == (2, True), said
    assert (run.run_dir / "config.toml").read_text() == before
    # the whole folder copied as to another machine, where the model lies elsewhere and is called otherwise
    original = quiet(tmp_path / "model", 2)
    shutil.copytree(tmp_path / "model", tmp_path / "moved" / "llama")
    (tmp_path / "model").rename(tmp_path / "not-to-be-found")
    shutil.copytree(run.run_dir, tmp_path / "elsewhere" / "run")
    run.run_dir.rename(tmp_path / "left-behind")
    run.run_dir = tmp_path / "elsewhere" / "run"
    change(
        run,
        "server",
        model__model_name_or_path=str(tmp_path / "moved" / "llama"),
        server__runs_dir=str(tmp_path / "elsewhere"),
        server__cache_dir=str(tmp_path / "another-cache"),
    )
    run.start("server")
    all_end_well(run)
    assert_same(weights(run), weights(original))
    (event,) = run.events("settings_changed")
    told = {each["name"]: (each["before"], each["now"]) for each in event["changes"]}
    assert told["model.model_name_or_path"] == ("model", "llama")


@pytest.mark.parametrize(
    ("when", "server_mode"),
    [
        ("in a round", "shared"),
        ("after the end", "shared"),
        ("after the end", "per_client"),
        ("at the last merge", "shared"),
        ("at the last goodbye", "shared"),
    ],
)
def test_more_rounds_prolong_a_run_to_what_it_would_have_been_with_them(
    town: Callable[..., Town], quiet: Callable[..., Town], tmp_path: Path, when: str, server_mode: str
) -> None:
    points = {"at the last merge": "merge-after-record:2", "at the last goodbye": "goodbye-before-farewell:1"}
    crash = {"server": points[when]} if when in points else {}
    pause = at_commit(13) if when == "in a round" else {}
    run = town(2, crash=crash, pause=pause, **SETTINGS, federation__server_mode=server_mode)
    if when == "in a round":
        stop_there(run)
    elif when == "after the end":
        all_end_well(run)
        assert (run.run_dir / "finished").exists()
    else:
        assert run.end_of("server")[0] == 137
    change(run, "server", federation__num_rounds=4)
    run.start("server")
    for name in run.names:
        if run.processes[name].poll() is not None:
            run.start(name)
    all_end_well(run)
    assert_same(weights(run), weights(quiet(tmp_path / "model", 4, server_mode)))
    assert run.verdict().problems == []
    assert replay(run.run_dir).problems == []
    report = run.report()
    assert (report["complete"], report["num_rounds"]) == (True, 4)
    # who was to say that it had loaded the second merge's layers may have said so to the server that was killed
    assert all(merge["equal"] for merge in report["merges"] if merge["round"] != 2)


def test_a_run_that_was_prolonged_exports_what_it_has_now(town: Callable[..., Town]) -> None:
    run = town(1, **SETTINGS, server__export_model="true")
    all_end_well(run)
    before = load_file(run.run_dir / "model" / "model.safetensors")
    change(run, "server", federation__num_rounds=3)
    run.start("server")
    run.start("clinic-0")
    all_end_well(run)
    after = load_file(run.run_dir / "model" / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(before[name], after[name])
    assert sorted(path.name for path in run.run_dir.iterdir() if path.name.startswith(".model")) == []


def test_a_schedule_that_has_ended_is_said_and_can_be_set_anew(town: Callable[..., Town]) -> None:
    settings = {**SETTINGS, "optimizer__num_training_steps": 0}
    run = town(1, **settings)
    all_end_well(run)
    assert "num_training_steps = 20" in (run.run_dir / "config.toml").read_text()
    done = weights(run)
    change(run, "server", federation__num_rounds=3)
    run.start("server")
    run.start("clinic-0")
    all_end_well(run)
    assert "its learning rate is 0 from step 21 of 30 on" in (run.folder / "server-2.out").read_text()
    assert_same(weights(run), done)
    assert [event["learning_rate"] for event in run.events("step")][20:] == [0.0] * 10
    change(run, "server", federation__num_rounds=4, optimizer__num_training_steps=40)
    run.start("server")
    run.start("clinic-0")
    all_end_well(run)
    said = " ".join((run.folder / "server-4.out").read_text().split())
    assert "runs over 40 steps from now on, and no longer over 20" in said
    rates = [event["learning_rate"] for event in run.events("step")][30:]
    assert rates == pytest.approx([0.01 * (40 - at) / 40 for at in range(30, 40)])
    assert replay(run.run_dir).problems == []
    assert run.differs_from_replay() == []


def test_a_schedule_that_is_set_anew_in_the_middle_of_a_round_can_be_trained_again(town: Callable[..., Town]) -> None:
    """The replay knows the horizon of each start; SCAFFOLD's controls divide by the learning rates of a round."""
    scaffold = {"federation__strategy": "SCAFFOLD", "federation__weight_by": "uniform", "optimizer__optim": "sgd"}
    run = town(
        1, **SETTINGS, **scaffold, federation__server_mode="sequential", pause={"server": "commit-after-apply:14:60"}
    )
    run.wait_until_it_says("server", "paused at commit-after-apply")
    run.processes["server"].kill()
    run.processes["server"].wait()
    stop(run, "clinic-0")
    change(run, "server", optimizer__num_training_steps=60)
    run.start("server")
    run.start("clinic-0")
    all_end_well(run)
    rates = [event["learning_rate"] for event in run.events("step")]
    assert rates[:13] == pytest.approx([0.01 * (40 - at) / 40 for at in range(13)])
    assert rates[-6:] == pytest.approx([0.01 * (60 - at) / 60 for at in range(14, 20)])
    assert run.verdict().problems == []
    assert run.differs_from_replay() == []


def test_fewer_rounds_than_were_merged_are_refused_and_as_many_end_it(town: Callable[..., Town]) -> None:
    run = town(2, **{**SETTINGS, "federation__num_rounds": 5}, pause=at_commit(22))
    stop_there(run)
    before = (run.run_dir / "config.toml").read_text()
    change(run, "server", federation__num_rounds=2)
    run.start("server")
    code, said = run.end_of("server")
    assert (code, "2 rounds are merged and round 3 is open: set it to 3 or more" in said) == (2, True), said
    assert (run.run_dir / "config.toml").read_text() == before
    change(run, "server", federation__num_rounds=3)
    run.start("server")
    all_end_well(run)
    assert [merge["round"] for merge in run.report()["merges"]] == [1, 2, 3]


def test_a_run_that_was_stopped_early_is_not_prolonged(town: Callable[..., Town], tmp_path: Path) -> None:
    held_out = {"data.eval_path": write_text(tmp_path / "held-out.txt", num_lines=8, seed=77)}
    run = town(
        1,
        own=held_out,
        **SETTINGS | {"federation__num_rounds": 8, "federation__local_steps": 2, "optimizer__learning_rate": 1.0},
        federation__evaluate="rounds",
        federation__early_stopping_patience=1,
        optimizer__lr_scheduler_type="constant",
    )
    all_end_well(run)
    assert run.report()["stopped_early"]
    change(run, "server", federation__num_rounds=12)
    run.start("server")
    code, said = run.end_of("server")
    assert (code, "was stopped early, and more rounds would change nothing" in said) == (2, True), said
    assert (run.run_dir / "finished").exists()


def test_another_run_under_the_same_name_finds_no_old_part_of_a_client(town: Callable[..., Town]) -> None:
    run = town(1, **SETTINGS, pause=at_commit(4))
    stop_there(run)
    stop(run, "clinic-0")
    shutil.rmtree(run.run_dir)
    change(run, "server", lora__r=4)
    run.start("server")
    run.start("clinic-0")
    code, said = run.end_of("clinic-0")
    assert (code, "another run of the same name" in said, "lora.r (was 8, is 4)" in said) == (2, True, True), said
    shutil.rmtree(run.client_dir("clinic-0") / "state")
    run.start("clinic-0")
    all_end_well(run)


def test_what_leaves_a_client_is_not_changed_under_its_hands(town: Callable[..., Town]) -> None:
    """A client that is there ends, by name; it takes part again when it is started again."""
    run = town(1, **SETTINGS, pause=at_commit(4))
    stop_there(run)
    change(run, "server", federation__evaluate="rounds")
    run.start("server")
    code, said = run.end_of("clinic-0")
    assert (code, "federation.evaluate (was 'ends', is 'rounds')" in said) == (8, True), said
    run.start("clinic-0")
    all_end_well(run)
    assert "each is asked again" in " ".join((run.folder / "server-2.out").read_text().split())
