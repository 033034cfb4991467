"""A small run as its events tell it."""

from typing import Any

import pytest

CLIENTS = ("clinic-a", "clinic-b")
DIGEST = "ab12" * 16


class Recorder:
    """Collects events a second apart."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def say(self, event: str, **fields: Any) -> None:
        now_s = float(len(self.events))
        self.events.append({"event": event, "time": 1_800_000_000.0 + now_s, "elapsed_s": now_s, **fields})


@pytest.fixture
def events() -> list[dict[str, Any]]:
    """Two clients, two rounds of two steps, shared backbone; clinic-b evaluates 0.5 above clinic-a."""
    recorder = Recorder()
    recorder.say(
        "run_started",
        run_id="run-1",
        model="tiny",
        server_mode="shared",
        num_rounds=2,
        local_steps=2,
        fingerprint="f0" * 32,
        pid=77,
        versions={"splitfl": "0.1.0"},
        device="cpu",
        num_threads=2,
        machine="Linux",
        settings={"seed": 42, "server": {"runs_dir": "/secret/place/runs", "address": "ipc:///secret/place/s.sock"}},
    )
    for client_id in CLIENTS:
        recorder.say("client_joined", client_id=client_id)
    _evaluate(recorder, "before", 0, 3.0)
    for round_ in (1, 2):
        _round(recorder, round_)
    _evaluate(recorder, "after", 2, 2.0)
    for number, client_id in enumerate(CLIENTS):
        recorder.say(
            "client_done",
            client_id=client_id,
            num_examples=10 + number,
            num_truncated=number,
            bytes_sent=5_000_000,
            bytes_received=4_000_000,
            peak_rss_bytes=600_000_000,
            wall_seconds=20.5,
            compute_seconds=7.25,
        )
        recorder.say("client_left", client_id=client_id, reason="done")
    recorder.say(
        "run_finished",
        wall_seconds=33.0,
        peak_rss_bytes=900_000_000,
        bytes_sent=8_000_000,
        bytes_received=10_000_000,
        compute_seconds=11.0,
        pid=77,
        model_dir="runs/run-1/model",
        complete=True,
    )
    return recorder.events


def _evaluate(recorder: Recorder, phase: str, round_: int, loss: float) -> None:
    for number, client_id in enumerate(CLIENTS):
        also = {"general": loss + 1} if phase == "after" else {}
        eval_loss = loss + number / 2
        recorder.say(
            "evaluated",
            client_id=client_id,
            phase=phase,
            round=round_,
            eval_loss=eval_loss,
            num_eval_examples=4,
            also=also,
        )


def _round(recorder: Recorder, round_: int) -> None:
    first_step = 2 * round_ - 1
    recorder.say("round_opened", round=round_, trainers=list(CLIENTS), first_step=first_step, num_steps=2)
    for step in (first_step, first_step + 1):
        for client_id in CLIENTS:
            recorder.say(
                "step",
                client_id=client_id,
                round=round_,
                step=step,
                commit_number=step,
                loss=3.0 - step / 4,
                num_label_tokens=100,
                num_tokens=150,
                num_positions=200,
                learning_rate=1e-3,
                clip_coefficient=1.0,
                bytes_sent=step * 1_000_000,
                bytes_received=step * 900_000,
            )
    recorder.say(
        "merged",
        round=round_,
        accepted=True,
        reason="",
        clients={"clinic-a": 10, "clinic-b": 11},
        absent=[],
        num_tensors=8,
        digest=DIGEST,
    )
    for client_id in CLIENTS:
        recorder.say("loaded", client_id=client_id, round=round_, digest=DIGEST)
