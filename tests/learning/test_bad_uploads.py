"""Uploads that no merge may take, and clients that are not there: each ends in a sentence, and changes nothing.

One client of three breaks a rule at the end of the round. It is told which, and the others' merge goes on without it.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, write_text
from safetensors.torch import load_file
from torch import Tensor

from client_edge.link.link import Link
from splitfl.errors import DataError, Incomplete, Refused
from splitfl.protocol.messages import Merged
from splitfl.telemetry.metrics import read_events

Layers = dict[str, Tensor]
Spoilt = tuple[Layers, dict[str, int]]


@pytest.fixture
def train(make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path) -> Callable[..., Any]:
    model = make_model("llama")

    def run(*names: str, **federation: Any) -> Finished:
        usual = {"num_rounds": 1, "local_steps": 2, "per_device_train_batch_size": 2, "step_timeout": 2.0}
        settings = {
            "model": {"model_name_or_path": str(model)},
            "federation": {**usual, "min_available_clients": len(names), **federation},
            "server": {"export_model": False},
        }
        texts = {name: write_text(tmp_path / f"{name}.txt", num_lines=8, seed=len(name)) for name in names}
        return federate(settings, {name: {"path": text, "eval_fraction": 0.0} for name, text in texts.items()})

    return run


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
    "other shapes": (
        other_shapes,
        r"8 layers whose shapes are not those of this run's 8 merged layers: the first that differs is"
        r" \(4, 32\) where \(8, 32\) belongs",
    ),
    "a layer missing": (one_missing, r"7 layers whose shapes are not those of this run's 8 merged layers: .*"),
    "not a number": (with_value(float("nan")), r"a tensor with values that are not finite \(NONFINITE_TENSOR\)"),
    "infinite": (with_value(float("-inf")), r"a tensor with values that are not finite \(NONFINITE_TENSOR\)"),
    "moved too far": (
        with_value(1e5),
        r"layers that no training here makes: .*lora_B.* has moved by 1e\+05 \(root mean square\) since the last merge,"
        r" more than the 0\.00\d+ that strategy.max_update = 10 allows",
    ),
    "far too large": (with_value(1e20), r"a tensor whose root mean square is 1e\+20, more than max_rms = 1e\+06"),
    "no examples": (from_nothing, r"layers from 0 examples: an upload needs at least one behind it"),
}


def spoil_what_mallory_uploads(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Layers, dict[str, int]], Spoilt], *, round_number: int = 1
) -> None:
    merge = Link.merge

    def spoilt(self: Link, layers: Mapping[str, Tensor], **counts: int) -> Merged:
        opened = self.session.open_round
        if self._client.client_id != "mallory" or opened is None:
            return merge(self, layers, **counts)
        self.session.open_round = replace(opened, round_number=round_number)
        worse, more = spoil(dict(layers), counts)
        return merge(self, worse, **more)

    monkeypatch.setattr(Link, "merge", spoilt)


def check_others_went_on(finished: Finished, sentence: str) -> None:
    assert set(finished.errors) == {"mallory"}
    with pytest.raises(Refused, match=f"mallory sent {sentence}; violation 1 of 3"):
        raise finished.errors["mallory"]
    events = list(read_events(finished.run_dir / "metrics.jsonl"))
    (merged,) = [event for event in events if event["event"] == "merged"]
    assert (merged["accepted"], sorted(merged["clients"]), merged["absent"]) == (True, ["ash", "birch"], ["mallory"])
    assert [event["client_id"] for event in events if event["event"] == "violation"] == ["mallory"]
    trained = load_file(finished.run_dir / "trained.safetensors")
    assert all(tensor.isfinite().all() and tensor.abs().max() < 1e3 for tensor in trained.values())


@pytest.mark.parametrize("case", CASES)
def test_an_upload_that_cannot_be_merged(
    train: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    spoil, sentence = CASES[case]
    spoil_what_mallory_uploads(monkeypatch, spoil)
    check_others_went_on(train("ash", "birch", "mallory"), sentence)


def test_an_upload_for_another_round(train: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_what_mallory_uploads(monkeypatch, lambda layers, counts: (layers, counts), round_number=2)
    check_others_went_on(train("ash", "birch", "mallory"), "layers of round 2 in round 1")


def test_all_clients_go(train: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch) -> None:
    send = Link.send_forward

    def gone(self: Link, hidden_BSD: Tensor, lengths_B: tuple[int, ...], **more: int) -> int:
        if more["step"] == 2:
            raise DataError("the disk with the text is gone")
        return send(self, hidden_BSD, lengths_B, **more)

    monkeypatch.setattr(Link, "send_forward", gone)
    finished = train("ash", "birch", num_rounds=2, wait_timeout=5.0)
    assert isinstance(finished.errors["server"], Incomplete)
    assert "ended before its last round: waited 5 s (federation.wait_timeout) for 2 clients; ready: none" in str(
        finished.errors["server"]
    )
    merged = [event for event in read_events(finished.run_dir / "metrics.jsonl") if event["event"] == "merged"]
    assert [(merge["accepted"], merge["reason"]) for merge in merged] == [
        (False, "0 clients finished, min_train_clients = 1")
    ]
