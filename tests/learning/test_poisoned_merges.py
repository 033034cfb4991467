"""Layers that nobody can go on from: who moved them is named, and who was only given them is not punished."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, write_text
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


@pytest.fixture
def train(make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path) -> Callable[..., Any]:
    model = make_model("llama")

    def run(**federation: Any) -> Finished:
        usual = {"num_rounds": 3, "local_steps": 2, "per_device_train_batch_size": 2, "step_timeout": 2.0}
        settings = {
            "model": {"model_name_or_path": str(model)},
            "strategy": {"max_update": 1e9},  # what mallory does is within all bounds
            "federation": {**usual, "min_available_clients": 3, "min_train_clients": 2, **federation},
            "server": {"export_model": False},
        }
        texts = {name: write_text(tmp_path / f"{name}.txt", num_lines=8, seed=len(name)) for name in NAMES}
        return federate(settings, {name: {"path": text, "eval_fraction": 0.25} for name, text in texts.items()})

    return run


def poison(monkeypatch: pytest.MonkeyPatch, block: str, value: float = 1e5) -> None:
    """Have mallory upload huge adapters of one block after its first round."""
    merge = Link.merge

    def spoilt(self: Link, layers: Mapping[str, Tensor], **counts: int) -> Merged:
        if self._client.client_id == "mallory":
            layers = {
                name: torch.full_like(layer, value) if f"layers.{block}." in name else layer
                for name, layer in layers.items()
            }
        return merge(self, layers, **counts)

    monkeypatch.setattr(Link, "merge", spoilt)


def events_of(finished: Finished, kind: str) -> list[Event]:
    return [event for event in read_events(finished.run_dir / "metrics.jsonl") if event["event"] == kind]


@pytest.mark.parametrize(("block", "evaluate"), [("0", "ends"), ("0", "rounds"), ("3", "ends")])
@pytest.mark.parametrize("server_mode", ["shared", "sequential"])
def test_nobody_is_punished_for_layers_that_it_was_given(
    train: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, block: str, evaluate: str, server_mode: str
) -> None:
    poison(monkeypatch, block)
    finished = train(server_mode=server_mode, evaluate=evaluate)
    assert events_of(finished, "violation") == []
    error = finished.errors.pop("server")
    assert isinstance(error, Incomplete)
    said = str(error)
    assert "the layers of merge 1 are of no use: " in said
    assert "allows: mallory" in said, "who has moved them farthest comes first"
    assert "`splitfl rollback RUN_DIR --to 0` takes the run back to before that merge" in said
    stuck = {event["client_id"] for event in events_of(finished, "stuck")}
    assert len(stuck) >= 2
    for name, refused in finished.errors.items():
        assert isinstance(refused, Refused), (name, refused)
        assert (refused.code, "violation" in str(refused)) == ("OVER", False)
    assert set(finished.errors) >= HONEST
    assert [merge["accepted"] for merge in events_of(finished, "merged")] == [True]


def test_the_way_back_that_is_named_leads_to_before_the_merge(
    train: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, "0")
    finished = train()
    assert "--to 0" in str(finished.errors["server"])
    rollback(finished.run_dir, 0)
    store = Store.reading(finished.run_dir / STATE_DIR)
    fields = store.snapshot_of(store.generations()[-1]).fields
    assert (fields["num_merged"], fields["folded_round"], fields["folded"]) == (0, 0, {})


@pytest.mark.parametrize("what", ["activations", "loss"])
@pytest.mark.parametrize("server_mode", ["shared", "sequential"])
def test_one_that_makes_it_up_is_punished_and_the_others_go_on(
    train: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, what: str, server_mode: str
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
    finished = train(server_mode=server_mode, num_rounds=2)
    assert set(finished.errors) == {"mallory"}
    assert {event["client_id"] for event in events_of(finished, "violation")} == {"mallory"}
    assert [merge["accepted"] for merge in events_of(finished, "merged")] == [True] * 2
    assert set(events_of(finished, "merged")[-1]["clients"]) == HONEST
