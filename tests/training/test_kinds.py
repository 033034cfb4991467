"""The kind of a run is chosen once from its settings, and every table of parts knows every kind."""

from collections.abc import Mapping
from typing import Any

import pytest

from client_edge.loops import Loop, check_loop
from server_backbone import kinds as on_server
from server_backbone.backbones import backbone_parts
from splitfl.config.kind import BackboneKind, RunKind
from splitfl.config.trees import RunConfig
from splitfl.errors import ConfigError
from splitfl.training import kinds as shared
from splitfl.training.backbones import backbone_of

FED_BUFF: dict[str, Any] = {
    "federation": {"strategy": "FedBuff", "server_mode": "frozen"},
    "optimizer": {"lr_scheduler_type": "constant"},
}
OWN_LOOPS: dict[str, Any] = {"federation": {"num_rounds": 0, "server_mode": "frozen"}}
TREES: dict[RunKind, Mapping[str, Any]] = {
    RunKind.ROUNDS: {},
    RunKind.TURNS: FED_BUFF,
    RunKind.OWN_LOOPS: OWN_LOOPS,
}


def run_of(tree: Mapping[str, Any]) -> RunConfig:
    return RunConfig.from_tree(tree, source="test")


@pytest.mark.parametrize("kind", RunKind)
def test_a_runs_settings_say_its_kind_and_each_table_has_it(kind: RunKind) -> None:
    run = run_of(TREES[kind])
    assert run.kind is kind
    assert type(shared.shared_parts(run)).__name__ == type(on_server.server_parts(run)).__name__


def test_without_rounds_no_strategy_makes_turns() -> None:
    both = {**FED_BUFF, "federation": {**FED_BUFF["federation"], "num_rounds": 0}}
    assert run_of(both).kind is RunKind.OWN_LOOPS


@pytest.mark.parametrize("kind", RunKind)
def test_a_client_is_sent_to_the_loop_of_its_runs_kind(kind: RunKind) -> None:
    run = run_of(TREES[kind])
    fits, other = (Loop.OWN, Loop.OF_ROUNDS) if kind is RunKind.OWN_LOOPS else (Loop.OF_ROUNDS, Loop.OWN)
    check_loop(run, "tcp://box:5555", fits)
    with pytest.raises(ConfigError, match=r"tcp://box:5555 .*num_rounds = 0.*"):
        check_loop(run, "tcp://box:5555", other)


@pytest.mark.parametrize(
    ("server_mode", "backbone", "kind"),
    [
        ("shared", "lora", BackboneKind.ONE),
        ("sequential", "lora", BackboneKind.ONE),
        ("per_client", "lora", BackboneKind.COPIES),
        ("per_client", "none", BackboneKind.ONE),
        ("frozen", "lora", BackboneKind.ONE),
    ],
)
def test_for_whom_the_backbone_trains_is_known_to_each_table(
    server_mode: str, backbone: str, kind: BackboneKind
) -> None:
    run = run_of({"federation": {"server_mode": server_mode}, "train": {"backbone": backbone}})
    assert run.backbone_kind is kind
    assert type(backbone_of(run)).__name__ == type(backbone_parts(run)).__name__
