"""What a client says of itself weighs no more than the server can know, or than a share of the merge."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, free_port, write_text
from served import ServedRun
from torch import Tensor

from client_edge.link.link import Link
from client_edge.part.run import take_part
from splitfl.config.trees import ClientConfig, ServerConfig
from splitfl.protocol.messages import Merged, RoundOpened, RoundsEnded
from splitfl.telemetry.metrics import Event, read_events

HUGE = 2**61
NAMES = ("ash", "birch", "mallory")
NUM_LINES = {"ash": 8, "birch": 12, "mallory": 9}


def claim(monkeypatch: pytest.MonkeyPatch, *, joining: bool = False, from_round: int = 0, **counts: int) -> None:
    """Have mallory say more than it has: when it joins, or only with its layers."""
    merge, open_round = Link.merge, Link.open_round

    def lie(self: Link, layers: Mapping[str, Tensor], **true: int) -> Merged:
        return merge(self, layers, **(true | counts if self.connection.client.client_id == "mallory" else true))

    def announce(self: Link, num_examples: int) -> RoundOpened | RoundsEnded:
        lies = joining and self.connection.client.client_id == "mallory" and self.session.round_number >= from_round
        return open_round(self, HUGE if lies else num_examples)

    monkeypatch.setattr(Link, "merge", lie)
    monkeypatch.setattr(Link, "open_round", announce)


@pytest.fixture
def train(make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path) -> Callable[..., Any]:
    model = make_model("llama")

    def run(*names: str, **settings: Any) -> list[Event]:
        usual = {"num_rounds": 1, "local_steps": 2, "per_device_train_batch_size": 2}
        tree = {
            **settings,
            "model": {"model_name_or_path": str(model)},
            "federation": {**usual, "min_available_clients": len(names), **settings.get("federation", {})},
            "server": {"export_model": False},
        }
        texts = {name: write_text(tmp_path / f"{name}.txt", num_lines=NUM_LINES[name], seed=1) for name in names}
        finished = federate(tree, {name: {"path": text, "eval_fraction": 0.0} for name, text in texts.items()})
        assert finished.errors == {}
        return list(read_events(finished.run_dir / "metrics.jsonl"))

    return run


def merges(events: list[Event]) -> list[Event]:
    return [event for event in events if event["event"] == "merged"]


def test_an_uploads_examples_are_those_that_were_announced(
    train: Callable[..., list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(monkeypatch, num_examples=HUGE)
    (merged,) = merges(train(*NAMES))
    assert (merged["clients"], merged["capped"]) == (NUM_LINES, {})


def test_an_uploads_tokens_are_those_of_its_steps(
    train: Callable[..., list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(monkeypatch, num_tokens=HUGE)
    events = train(*NAMES, federation={"weight_by": "num_tokens"})
    tokens = dict.fromkeys(NAMES, 0)
    for event in events:
        if event["event"] == "step":
            tokens[event["client_id"]] += event["num_label_tokens"]
    assert min(tokens.values()) > 0
    assert merges(events)[0]["clients"] == tokens


@pytest.mark.parametrize("server_mode", ["shared", "sequential", "per_client", "frozen"])
def test_who_announces_everything_is_no_more_than_half_of_three(
    train: Callable[..., list[Event]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    server_mode: str,
) -> None:
    claim(monkeypatch, joining=True, num_examples=HUGE)
    (merged,) = merges(train(*NAMES, federation={"server_mode": server_mode}))
    assert (merged["clients"], merged["capped"]) == ({**NUM_LINES, "mallory": 20}, {"mallory": HUGE})
    assert "mallory (20, held down from 2,305,843,009,213,693,952)" in capsys.readouterr().out


def test_the_share_is_the_operators(train: Callable[..., list[Event]], monkeypatch: pytest.MonkeyPatch) -> None:
    claim(monkeypatch, joining=True, num_examples=HUGE)
    (merged,) = merges(train(*NAMES, strategy={"max_client_weight": 0.4}))
    # 8 / 0.2 = 40 in all, of which birch and mallory are 0.4 each; birch had less
    assert merged["clients"] == {"ash": 8, "birch": 12, "mallory": pytest.approx(20 * 0.4 / 0.6)}


def test_fed_buff_bounds_a_client_whatever_it_uploads(
    train: Callable[..., list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(monkeypatch, joining=True, num_examples=HUGE, num_tokens=HUGE)
    events = train(
        *NAMES,
        federation={"strategy": "FedBuff", "server_mode": "sequential", "num_rounds": 4},
        strategy={"buffer_size": 6},
        optimizer={"lr_scheduler_type": "constant"},
    )
    everybodys = [merge for merge in merges(events) if merge["clients"].keys() == set(NAMES)]
    assert everybodys
    for merge in everybodys:
        assert merge["clients"]["mallory"] == pytest.approx(merge["clients"]["ash"] + merge["clients"]["birch"])
        assert merge["capped"].keys() == {"mallory"}


@pytest.mark.parametrize("durability", ["redo", "snapshot"])
def test_the_first_announcement_counts_over_a_restart(
    durability: str, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(monkeypatch, joining=True, from_round=1, num_examples=HUGE)
    own = {"runs_dir": tmp_path / "runs", "run_id": "run", "cache_dir": tmp_path / "cache", "export_model": False}
    address = f"tcp://127.0.0.1:{free_port()}"
    tree = {
        "model": {"model_name_or_path": str(make_model("llama"))},
        "federation": {
            "num_rounds": 8,
            "local_steps": 2,
            "min_available_clients": 3,
            "per_device_train_batch_size": 2,
        },
        "storage": {"durability": durability},
        "server": {**own, "address": address},
    }
    run = ServedRun(ServerConfig.from_tree(tree, source="test"))
    run.start()
    threads = []
    for name in NAMES:
        text = write_text(tmp_path / f"{name}.txt", num_lines=NUM_LINES[name], seed=1)
        client = {
            "client_id": name,
            "server_address": address,
            "output_dir": tmp_path / "clients",
            "cache_dir": tmp_path / "cache" / name,
        }
        config = ClientConfig.from_tree({"client": client, "data": {"path": text, "eval_fraction": 0.0}}, source="test")
        threads.append(
            threading.Thread(target=take_part, args=(config,), kwargs={"accept": True}, name=name, daemon=True)
        )
        threads[-1].start()
    deadline = time.monotonic() + 60
    while not merges(list(read_events(run.metrics_path))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.stop()
    assert len(merges(list(read_events(run.metrics_path)))) < 8, "it was over before it was stopped"
    run.start()
    for thread in threads:
        thread.join(timeout=60)
    events = list(read_events(run.metrics_path))
    assert [merge["clients"] for merge in merges(events)] == [NUM_LINES] * 8
    notes = [event["text"] for event in events if event["event"] == "note" and "examples" in event["text"]]
    assert set(notes) == {
        f"mallory says that it has {HUGE} examples; in a merge it weighs by the 9 that it announced when it joined this"
        " run"
    }
