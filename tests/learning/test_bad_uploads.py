"""Uploads that no merge may take, and clients that are not there: each ends in a sentence, and changes nothing.

All but two clients of one run break a rule each at the end of the round. Each is told which, and the others' merge goes
on without them.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, train_together, write_model, write_text
from safetensors.torch import load_file
from torch import Tensor

from client_edge.link.link import Link
from splitfl.errors import DataError, Incomplete, Refused
from splitfl.protocol.messages import Merged
from splitfl.telemetry.metrics import read_events

Layers = dict[str, Tensor]
Spoilt = tuple[Layers, dict[str, int]]


def train(folder: Path, *names: str, **federation: Any) -> Finished:
    usual = {"num_rounds": 1, "local_steps": 2, "per_device_train_batch_size": 2, "step_timeout": 2.0}
    settings = {
        "model": {"model_name_or_path": str(write_model(folder / "model"))},
        "federation": {**usual, "min_available_clients": len(names), **federation},
        "server": {"export_model": False, "max_clients": len(names)},
    }
    texts = {name: write_text(folder / f"{name}.txt", num_lines=8, seed=len(name)) for name in names}
    return train_together(
        folder, settings, {name: {"path": text, "eval_fraction": 0.0} for name, text in texts.items()}
    )


def other_shapes(layers: Layers, counts: dict[str, int]) -> Spoilt:
    """Return adapters of rank 4 where the run has 8."""
    return {name: layer[:4] if "lora_A" in name else layer[:, :4] for name, layer in layers.items()}, counts


def one_missing(layers: Layers, counts: dict[str, int]) -> Spoilt:
    return dict(list(layers.items())[1:]), counts


def with_value(value: float) -> Callable[[Layers, dict[str, int]], Spoilt]:
    def spoil(layers: Layers, counts: dict[str, int]) -> Spoilt:
        last = list(layers)[-1]
        return {**layers, last: torch.full_like(layers[last], value)}, counts

    return spoil


def from_nothing(layers: Layers, counts: dict[str, int]) -> Spoilt:
    return layers, {**counts, "num_examples": 0}


CASES: dict[str, tuple[Callable[[Layers, dict[str, int]], Spoilt], str]] = {
    "other-shapes": (
        other_shapes,
        r"8 layers whose shapes differ from this run's 8 merged layers: the first that differs is"
        r" \(4, 32\) where \(8, 32\) belongs",
    ),
    "a-layer-missing": (one_missing, r"7 layers whose shapes differ from this run's 8 merged layers: .*"),
    "not-a-number": (with_value(float("nan")), r"a tensor with values that are not finite \(NONFINITE_TENSOR\)"),
    "infinite": (with_value(float("-inf")), r"a tensor with values that are not finite \(NONFINITE_TENSOR\)"),
    "moved-too-far": (
        with_value(1e5),
        r"layers that no training here makes: .*lora_B.* has moved by 1e\+05 \(root mean square\) since the last merge,"
        r" more than the 0\.00\d+ that strategy.max_update = 10 allows",
    ),
    "far-too-large": (with_value(1e20), r"a tensor whose root mean square is 1e\+20, more than max_rms = 1e\+06"),
    "no-examples": (from_nothing, r"layers from 0 examples: an upload needs at least one"),
    "another-round": (lambda layers, counts: (layers, counts), "layers of round 2 in round 1"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of two clients who keep to the rules, and of one for each case that has its name."""
    merge = Link.merge

    def spoilt(self: Link, layers: Mapping[str, Tensor], **counts: int) -> Merged:
        case, opened = self.connection.client.client_id, self.session.open_round
        if case not in CASES or opened is None:
            return merge(self, layers, **counts)
        if case == "another-round":
            self.session.open_round = replace(opened, round_number=2)
        worse, more = CASES[case][0](dict(layers), counts)
        return merge(self, worse, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Link, "merge", spoilt)
        return train(tmp_path_factory.mktemp("uploads"), "ash", "birch", *CASES)


@pytest.mark.parametrize("case", CASES)
def test_who_breaks_a_rule_is_told_which(finished: Finished, case: str) -> None:
    with pytest.raises(Refused, match=f"{case} sent {CASES[case][1]}; violation 1 of 3"):
        raise finished.errors[case]


def test_the_others_go_on(finished: Finished) -> None:
    assert set(finished.errors) == set(CASES)
    events = list(read_events(finished.run_dir / "metrics.jsonl"))
    (merged,) = [event for event in events if event["event"] == "merged"]
    assert (merged["accepted"], sorted(merged["clients"]), merged["absent"]) == (True, ["ash", "birch"], sorted(CASES))
    assert sorted(event["client_id"] for event in events if event["event"] == "violation") == sorted(CASES)
    trained = load_file(finished.run_dir / "trained.safetensors")
    assert all(tensor.isfinite().all() and tensor.abs().max() < 1e3 for tensor in trained.values())


def test_all_clients_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send = Link.send_forward

    def gone(self: Link, hidden_BSD: Tensor, lengths_B: tuple[int, ...], **more: int) -> int:
        if more["step"] == 2:
            raise DataError("the disk with the text is gone")
        return send(self, hidden_BSD, lengths_B, **more)

    monkeypatch.setattr(Link, "send_forward", gone)
    finished = train(tmp_path, "ash", "birch", num_rounds=2, wait_timeout=3.0)
    assert isinstance(finished.errors["server"], Incomplete)
    assert "ended before its last round: waited 3 s (federation.wait_timeout) for 2 clients; ready: none" in str(
        finished.errors["server"]
    )
    merged = [event for event in read_events(finished.run_dir / "metrics.jsonl") if event["event"] == "merged"]
    assert [(merge["accepted"], merge["reason"]) for merge in merged] == [
        (False, "0 clients finished, min_train_clients = 1")
    ]
