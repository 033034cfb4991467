"""Layers that nobody can go on from: who moved them is named, and who was only given them is not punished."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, train_together, write_model, write_text
from torch import Tensor

from client_edge.link.link import Link
from server_backbone.host import STATE_DIR
from server_backbone.replay import rollback
from splitfl.durability.store import Store
from splitfl.errors import Incomplete, Refused
from splitfl.protocol.messages import Merged
from splitfl.telemetry.metrics import Event, read_events

NAMES = ("ash", "birch", "mallory")
HONEST = {"ash", "birch"}


def train(folder: Path, **federation: Any) -> Finished:
    usual = {"num_rounds": 3, "local_steps": 2, "per_device_train_batch_size": 2, "step_timeout": 2.0}
    settings = {
        "model": {"model_name_or_path": str(write_model(folder / "model"))},
        "strategy": {"max_update": 1e9},  # mallory stays within all bounds
        "federation": {**usual, "min_available_clients": 3, "min_train_clients": 2, **federation},
        "server": {"export_model": False},
    }
    texts = {name: write_text(folder / f"{name}.txt", num_lines=8, seed=len(name)) for name in NAMES}
    return train_together(
        folder, settings, {name: {"path": text, "eval_fraction": 0.25} for name, text in texts.items()}
    )


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """Have mallory upload huge adapters of one block after its first round; each of these runs is made once."""
    merge = Link.merge

    @cache
    def run(block: str, evaluate: str, server_mode: str) -> Finished:
        def spoilt(self: Link, layers: Mapping[str, Tensor], **counts: int) -> Merged:
            if self.connection.client.client_id == "mallory":
                layers = {
                    name: torch.full_like(layer, 1e5) if f"layers.{block}." in name else layer
                    for name, layer in layers.items()
                }
            return merge(self, layers, **counts)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Link, "merge", spoilt)
            return train(tmp_path_factory.mktemp("poisoned"), evaluate=evaluate, server_mode=server_mode)

    return run


# Every two values of different axes meet: the block, when it is evaluated, the mode.
RUNS = [
    ("0", "ends", "shared"),
    ("0", "rounds", "sequential"),
    ("3", "ends", "sequential"),
    ("3", "rounds", "shared"),
]


def events_of(finished: Finished, kind: str) -> list[Event]:
    return [event for event in read_events(finished.run_dir / "metrics.jsonl") if event["event"] == kind]


@pytest.mark.parametrize(("block", "evaluate", "server_mode"), RUNS)
def test_nobody_is_punished_for_layers_that_it_was_given(
    poisoned: Callable[..., Finished], block: str, evaluate: str, server_mode: str
) -> None:
    finished = poisoned(block, evaluate, server_mode)
    assert events_of(finished, "violation") == []
    error = finished.errors["server"]
    assert isinstance(error, Incomplete)
    said = str(error)
    assert "the layers of merge 1 are of no use: " in said
    assert "allows: mallory" in said, "who has moved them farthest comes first"
    assert "`splitfl rollback RUN_DIR --to 0` takes the run back to before that merge" in said
    stuck = {event["client_id"] for event in events_of(finished, "stuck")}
    assert len(stuck) >= 2
    for name, refused in finished.errors.items() - {("server", error)}:
        assert isinstance(refused, Refused), (name, refused)
        assert (refused.code, "violation" in str(refused)) == ("OVER", False)
    assert set(finished.errors) >= HONEST
    assert [merge["accepted"] for merge in events_of(finished, "merged")] == [True]


def test_the_way_back_that_is_named_leads_to_before_the_merge(poisoned: Callable[..., Finished]) -> None:
    finished = poisoned(*RUNS[0])
    assert "--to 0" in str(finished.errors["server"])
    rollback(finished.run_dir, 0)
    store = Store.reading(finished.run_dir / STATE_DIR)
    fields = store.snapshot_of(store.generations()[-1]).fields
    assert (fields["num_merged"], fields["folded_round"], fields["folded"]) == (0, 0, {})


@pytest.mark.parametrize("what", ["activations", "loss"])
@pytest.mark.parametrize("server_mode", ["shared", "sequential"])
def test_one_that_makes_it_up_is_punished_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, server_mode: str
) -> None:
    forward, commit = Link.send_forward, Link.commit

    def is_lying(link: Link) -> bool:
        return link.connection.client.client_id == "mallory" and link.session.round_number >= 1

    def send_forward(self: Link, hidden_BSD: Tensor, lengths_B: tuple[int, ...], **more: Any) -> int:
        if is_lying(self) and what == "activations":
            hidden_BSD = torch.full_like(hidden_BSD, float("nan"))
        return forward(self, hidden_BSD, lengths_B, **more)

    def lie(self: Link, **more: Any) -> Any:
        return commit(self, **(more | ({"loss": float("nan")} if is_lying(self) and what == "loss" else {})))

    monkeypatch.setattr(Link, "send_forward", send_forward)
    monkeypatch.setattr(Link, "commit", lie)
    finished = train(tmp_path, server_mode=server_mode, num_rounds=2)
    assert set(finished.errors) == {"mallory"}
    assert {event["client_id"] for event in events_of(finished, "violation")} == {"mallory"}
    assert [merge["accepted"] for merge in events_of(finished, "merged")] == [True] * 2
    assert set(events_of(finished, "merged")[-1]["clients"]) == HONEST
