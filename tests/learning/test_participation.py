"""Who is drawn to train, over a restart of the server; and who joins when all is over."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import free_port, write_text
from served import ServedRun

from client_edge.part.run import take_part
from splitfl.config.sections import FederationSection, StrategySection
from splitfl.config.trees import ClientConfig, ServerConfig
from splitfl.federation.strategies.fed_avg import FedAvg
from splitfl.telemetry.metrics import Event, read_events

NAMES = [f"clinic-{number}" for number in range(4)]
NUM_ROUNDS = 10  # more than are over before the test has stopped the server


@pytest.fixture
def run(tmp_path: Path, make_model: Callable[..., Path]) -> ServedRun:
    """A server of ten rounds in which half of the clients train."""
    tree = {
        "model": {"model_name_or_path": str(make_model("llama"))},
        "federation": {
            "num_rounds": NUM_ROUNDS,
            "local_steps": 3,
            "fraction_train": 0.5,
            "min_available_clients": 4,
            "per_device_train_batch_size": 2,
        },
        "server": {
            "address": f"tcp://127.0.0.1:{free_port()}",
            "runs_dir": tmp_path / "runs",
            "run_id": "run",
            "cache_dir": tmp_path / "cache",
            "export_model": False,
        },
    }
    return ServedRun(ServerConfig.from_tree(tree, source="test"))


def events(run: ServedRun, kind: str) -> list[Event]:
    return [event for event in read_events(run.metrics_path) if event["event"] == kind]


def clients(run: ServedRun, tmp_path: Path) -> list[threading.Thread]:
    threads = []
    for number, name in enumerate(NAMES):
        own = {"client_id": name, "server_address": run.config.server.address, "output_dir": tmp_path / "clients"}
        text = write_text(tmp_path / f"{number}.txt", num_lines=8, seed=number)
        tree = {
            "client": {**own, "cache_dir": tmp_path / "cache" / name},
            "data": {"path": text, "eval_fraction": 0.0},
        }
        config = ClientConfig.from_tree(tree, source="test")
        threads.append(
            threading.Thread(target=take_part, args=(config,), kwargs={"accept": True}, name=name, daemon=True)
        )
        threads[-1].start()
    return threads


def test_who_is_drawn_to_train_follows_from_the_seed_over_a_restart(run: ServedRun, tmp_path: Path) -> None:
    run.start()
    threads = clients(run, tmp_path)
    deadline = time.monotonic() + 100
    while not events(run, "merged"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.stop()
    assert len(events(run, "merged")) < NUM_ROUNDS, "it was over before it was stopped"
    run.start()
    for thread in threads:
        thread.join(timeout=100)
    assert len(events(run, "merged")) == NUM_ROUNDS
    draw = FedAvg(FederationSection(fraction_train=0.5), StrategySection(), seed=run.config.seed).configure_train
    drawn = {event["round"]: event["trainers"] for event in events(run, "round_opened")}
    assert drawn == {number: draw(number, NAMES) for number in range(1, NUM_ROUNDS + 1)}
    assert len({tuple(trainers) for trainers in drawn.values()}) > 1
