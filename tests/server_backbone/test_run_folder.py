"""Which run a start is: known by what decides the weights, not by where it lies; every other difference is told."""

import os
from pathlib import Path
from typing import Any

import pytest

from server_backbone.records.entries import Prolonged
from server_backbone.records.prolonging import has_more_to_do, objection_to_rounds
from server_backbone.records.state import MemberState, RoundState, RunState
from server_backbone.run_folder import RunFolder, search
from splitfl.config.sections import FederationSection
from splitfl.config.trees import ServerConfig
from splitfl.errors import ConfigError

SHA, OTHER = "a1" * 32, "b2" * 32


def config_of(folder: Path, *, run_id: str = "", **settings: Any) -> ServerConfig:
    tree: dict[str, Any] = {
        "model": {"model_name_or_path": "llama"},
        "server": {"runs_dir": str(folder / "runs"), "run_id": run_id},
    }
    for name, value in settings.items():
        section, _, key = name.partition("__")
        if key:
            tree[section] = {**tree.get(section, {}), key: value}
        else:
            tree[section] = value
    return ServerConfig.from_tree(tree, source="test")


def begun(folder: Path, name: str, *, is_finished: bool = False, sha: str = SHA, **settings: Any) -> Path:
    """Begin a run and leave it interrupted, or finished."""
    run = search(config_of(folder, run_id=name, **settings), resumes=True).settle(sha)
    (run.path / "state").mkdir(parents=True)
    run.begin()
    if is_finished:
        run.finish()
    return run.path


def settled(folder: Path, *, sha: str = SHA, resumes: bool = True, **settings: Any) -> RunFolder:
    return search(config_of(folder, **settings), resumes=resumes).settle(sha)


class TestANewRun:
    def test_has_the_models_hash_and_the_schedules_horizon(self, tmp_path: Path) -> None:
        run = settled(tmp_path, federation__num_rounds=4, federation__local_steps=5)
        assert not run.is_resumed
        assert run.config.model.checkpoint_sha256 == SHA
        assert run.config.optimizer.num_training_steps == 20
        assert run.changes == []

    def test_keeps_a_horizon_of_its_own_and_says_where_nothing_is_learned(self, tmp_path: Path) -> None:
        run = settled(tmp_path, federation__num_rounds=4, federation__local_steps=5, optimizer__num_training_steps=12)
        assert run.config.optimizer.num_training_steps == 12
        (note,) = run.notes
        assert "its learning rate is 0 from step 13 of 20 on" in note

    @pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup"])
    def test_a_constant_rate_has_no_end(self, tmp_path: Path, schedule: str) -> None:
        run = settled(tmp_path, optimizer__num_training_steps=1, optimizer__lr_scheduler_type=schedule)
        assert run.notes == ()

    def test_a_model_that_is_pinned_must_be_that_one(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=f"checkpoint_sha256 = {OTHER}, but llama holds {SHA}"):
            settled(tmp_path, model__checkpoint_sha256=OTHER)

    def test_is_begun_beside_one_that_is_not_to_be_gone_on_with(self, tmp_path: Path) -> None:
        begun(tmp_path, "old")
        assert not settled(tmp_path, resumes=False).is_resumed
        with pytest.raises(ConfigError, match=r"holds a run: set server\.run_id to another name"):
            settled(tmp_path, resumes=False, run_id="old")


class TestTheSameRun:
    @pytest.mark.parametrize("run_id", ["old", ""])
    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"federation__step_timeout": 7.0}, [("federation.step_timeout", 120.0, 7.0)]),
            ({"federation__num_rounds": 9}, [("federation.num_rounds", 3, 9)]),
            ({"link__heartbeat_timeout": 20.0}, [("link.heartbeat_timeout", 8.0, 20.0)]),
            ({"storage__fsync": "never"}, [("storage.fsync", "always", "never")]),
            ({"storage__keep_snapshots": 0, "seed": 42}, [("storage.keep_snapshots", 2, 0)]),
            ({"server__num_threads": 3}, [("server.num_threads", 0, 3)]),
            ({"federation__evaluate": "rounds"}, [("federation.evaluate", "ends", "rounds")]),
            (
                {"model__model_name_or_path": "/srv/elsewhere/another"},
                [("model.model_name_or_path", "llama", "another")],
            ),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_goes_on_with_what_may_change(
        self, tmp_path: Path, run_id: str, settings: dict[str, Any], told: list[tuple[str, Any, Any]]
    ) -> None:
        path = begun(tmp_path, "old")
        run = settled(tmp_path, run_id=run_id, **settings)
        assert (run.path, run.is_resumed) == (path, True)
        assert [(change.name, change.before, change.now) for change in run.changes] == told
        run.begin()
        assert settled(tmp_path, run_id=run_id, **settings).changes == []

    def test_of_two_the_latest_goes_on(self, tmp_path: Path) -> None:
        for at, name in enumerate(("first", "second", "third")):
            path = begun(tmp_path, name)
            os.utime(path / "config.toml", (1e9 - at, 1e9 - at))
        assert settled(tmp_path).path.name == "first"

    def test_another_models_is_passed_over_for_one_of_this(self, tmp_path: Path) -> None:
        begun(tmp_path, "this")
        os.utime(begun(tmp_path, "other", sha=OTHER) / "config.toml", (4e9, 4e9))
        assert settled(tmp_path).path.name == "this"

    def test_its_horizon_stays_when_it_is_prolonged_and_that_is_said(self, tmp_path: Path) -> None:
        begun(tmp_path, "old", federation__num_rounds=2, federation__local_steps=10)
        run = settled(tmp_path, federation__num_rounds=5, federation__local_steps=10)
        assert run.is_resumed
        assert run.raises_num_rounds
        assert run.config.optimizer.num_training_steps == 20
        (note,) = run.notes
        assert "prolonged from 20 to 50 steps" in note
        assert "its learning rate is 0 from step 21 of 50 on" in note

    def test_its_horizon_is_set_anew_where_the_run_is_named_and_that_is_said(self, tmp_path: Path) -> None:
        begun(tmp_path, "old", federation__num_rounds=2)
        anew = {"federation__num_rounds": 5, "optimizer__num_training_steps": 50}
        run = settled(tmp_path, run_id="old", **anew)
        assert run.is_resumed
        assert run.config.optimizer.num_training_steps == 50
        assert "over 50 steps from now on, and no longer over 20" in run.notes[0]
        assert not settled(tmp_path, **anew).is_resumed

    def test_what_leaves_a_client_is_told_apart(self, tmp_path: Path) -> None:
        begun(tmp_path, "old")
        (note,) = settled(tmp_path, run_id="old", evaluation__measures=["rouge_l"]).notes
        assert "each is asked again: evaluation.measures (was [], is ['rouge_l'])" in note


class TestAnotherRun:
    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"seed": 7}, "seed (was 42, is 7)"),
            ({"model__bottom_layers": 0}, "model.bottom_layers (was 1, is 0)"),
            ({"lora__r": 16, "text__packing": True}, "lora.r (was 8, is 16); text.packing (was False, is True)"),
            ({"storage__durability": "snapshot"}, "storage.durability (was 'redo', is 'snapshot')"),
            (
                {"federation__num_rounds": 0, "federation__server_mode": "frozen"},
                "federation.num_rounds (was '1 or more', is 0)",
            ),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_is_refused_under_the_same_name_and_begun_with_a_note_under_none(
        self, tmp_path: Path, settings: dict[str, Any], told: str
    ) -> None:
        begun(tmp_path, "old")
        with pytest.raises(ConfigError) as caught:
            settled(tmp_path, run_id="old", **settings)
        assert told in str(caught.value)
        run = settled(tmp_path, **settings)
        assert not run.is_resumed
        assert told in run.notes[0]

    def test_another_model_under_the_same_name_is_refused(self, tmp_path: Path) -> None:
        begun(tmp_path, "old")
        with pytest.raises(ConfigError, match="was begun with another model than llama now holds"):
            settled(tmp_path, run_id="old", sha=OTHER)
        run = settled(tmp_path, sha=OTHER)
        assert not run.is_resumed
        assert "model.checkpoint_sha256 was a1a1a1a1a1a1…, is b2b2b2b2b2b2…" in run.notes[0]

    def test_one_that_differs_in_much_is_not_spoken_of(self, tmp_path: Path) -> None:
        begun(tmp_path, "old")
        many = {"seed": 1, "lora__r": 2, "lora__alpha": 3.0, "model__top_layers": 2}
        assert settled(tmp_path, **many).notes == ()

    def test_settings_of_another_splitfl_are_named(self, tmp_path: Path) -> None:
        path = begun(tmp_path, "old") / "config.toml"
        path.write_text(path.read_text() + "\n[quantum]\nentangled = true\n")
        with pytest.raises(ConfigError, match=r"does not take: .*unknown setting quantum.*the splitfl that began it"):
            settled(tmp_path, run_id="old")
        run = settled(tmp_path)
        assert not run.is_resumed
        assert "unknown setting quantum" in run.notes[0]


class TestAFinishedRun:
    def test_is_prolonged_by_more_rounds(self, tmp_path: Path) -> None:
        path = begun(tmp_path, "old", is_finished=True)
        run = settled(tmp_path, run_id="old", federation__num_rounds=4)
        assert run.raises_num_rounds
        run.begin()
        assert not (path / "finished").exists()

    @pytest.mark.parametrize("num_rounds", [2, 3])
    def test_is_not_gone_on_with_else(self, tmp_path: Path, num_rounds: int) -> None:
        begun(tmp_path, "old", is_finished=True)
        with pytest.raises(ConfigError, match=r"finished run of 3 rounds: raise federation\.num_rounds to prolong it"):
            settled(tmp_path, run_id="old", federation__num_rounds=num_rounds)

    def test_is_not_prolonged_without_being_named(self, tmp_path: Path) -> None:
        begun(tmp_path, "old", is_finished=True)
        assert not settled(tmp_path, federation__num_rounds=4).is_resumed

    def test_is_not_prolonged_without_its_state(self, tmp_path: Path) -> None:
        path = begun(tmp_path, "old", is_finished=True)
        (path / "state").rmdir()
        with pytest.raises(ConfigError, match="whose state was removed"):
            settled(tmp_path, run_id="old", federation__num_rounds=4)


def state_of(**values: Any) -> RunState:
    return RunState(**{"num_merged": 2, "members": {"a": MemberState(has_finished=True)}, **values})


OPEN = RoundState(number=3, first_step=21, num_steps=10, clients=("a",), trainers=("a",), step=21)


class TestHowManyRounds:
    @pytest.mark.parametrize(
        ("state", "num_rounds", "why"),
        [
            (state_of(), 1, "num_rounds = 1, but 2 rounds are merged: set it to 2 or more"),
            (state_of(round=OPEN), 2, "but 2 rounds are merged and round 3 is open: set it to 3 or more"),
            (state_of(turns={"a": OPEN}), 2, "round 3 is open"),
            (state_of(), 2, ""),
            (state_of(round=OPEN), 3, ""),
            (state_of(round=OPEN), 0, ""),
        ],
    )
    def test_no_fewer_than_there_are(self, state: RunState, num_rounds: int, why: str) -> None:
        federation = FederationSection(num_rounds=num_rounds, server_mode="frozen")
        assert why in objection_to_rounds(state, federation, is_raised=False)
        assert bool(why) == bool(objection_to_rounds(state, federation, is_raised=False))

    def test_no_more_once_it_was_stopped_early(self) -> None:
        state = state_of(has_ended=True, end_reason="eval_loss has not improved")
        assert "stopped early" in objection_to_rounds(state, FederationSection(num_rounds=9), is_raised=True)
        assert objection_to_rounds(state, FederationSection(num_rounds=9), is_raised=False) == ""

    def test_no_more_once_it_has_gone_back_to_its_best(self) -> None:
        federation = FederationSection(num_rounds=9, evaluate="rounds", load_best_model_at_end=True)
        assert "layers of its best round" in objection_to_rounds(state_of(has_ended=True), federation, is_raised=True)

    def test_more_for_those_who_had_finished(self) -> None:
        state = state_of(has_ended=True)
        assert has_more_to_do(state, 9, is_raised=True)
        assert not has_more_to_do(state, 9, is_raised=False)  # stopped early, and not gone on with
        assert has_more_to_do(state_of(), 3, is_raised=False)
        assert not has_more_to_do(state_of(), 2, is_raised=False)
        state = state.after(Prolonged(num_rounds=9))
        assert not state.has_ended
        assert not state.members["a"].has_finished
