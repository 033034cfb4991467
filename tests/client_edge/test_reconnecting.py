"""A connection that is lost again and again: the client counts, waits longer each time, and ends when it has said."""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port, write_text
from own_loop.host import LORA, adamw, batches, train
from served import ServedRun
from transport.relay import Cutter

import client_edge
from client_edge.connection.connection import Connection
from client_edge.connection.setbacks import Setbacks
from client_edge.consent.gate import OpenGate
from client_edge.link.files import Files
from client_edge.part.run import take_part
from splitfl.config.trees import ClientConfig, ServerConfig
from splitfl.errors import PeerGone
from splitfl.telemetry.metrics import read_events

TIMEOUT_S = 3.0


@pytest.fixture
def serve(tmp_path: Path, make_model: Callable[..., Path]) -> Iterator[Callable[..., ServedRun]]:
    runs: list[ServedRun] = []

    def start(**federation: Any) -> ServedRun:
        own = {
            "address": f"tcp://127.0.0.1:{free_port()}",
            "runs_dir": tmp_path / "runs",
            "run_id": "run",
            "cache_dir": tmp_path / "cache",
            "export_model": False,
        }
        tree = {
            "server": own,
            "model": {"model_name_or_path": str(make_model())},
            "lora": LORA,
            "text": {"max_seq_length": 64},
            "storage": {"fsync": "never"},
            "federation": {"per_device_train_batch_size": 16, **federation},
        }
        runs.append(ServedRun(ServerConfig.from_tree(tree, source="test")))
        runs[-1].start()
        return runs[-1]

    yield start
    for run in runs:
        run.stop()


def port_of(run: ServedRun) -> int:
    return int(run.config.server.address.rsplit(":", 1)[1])


def retries(said: list[str]) -> list[int]:
    return [int(number) for text in said for number in re.findall(r"retry (\d+)", text)]


def check(said: list[str], cutter: Cutter) -> None:
    numbers = retries(said)
    assert numbers == list(range(1, len(numbers) + 1))  # one series, that only goes up
    assert 4 <= len(numbers) <= 12  # hundreds without the pauses
    pauses = [after - before for before, after in pairwise(cutter.cut_at_s)]
    assert max(pauses[3:]) > 2 * min(pauses)
    assert cutter.cut_at_s[-1] - cutter.cut_at_s[0] < 4 * TIMEOUT_S


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_link_that_no_large_message_passes(
    serve: Callable[..., ServedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Joining passes, 16 x 60 tokens of 32 floats do not: without progress one series of failures, that ends."""
    server = serve(num_rounds=1, local_steps=2)
    data = write_text(tmp_path / "text.txt", num_lines=40, seed=0, lengths=(60, 60))
    # the files are fetched directly, so that the way down is cut at activations
    folders = {"output_dir": tmp_path / "clients", "cache_dir": tmp_path / "client-cache"}
    client = {"client_id": "clinic", "server_address": server.config.server.address, **folders}
    looks = ClientConfig.from_tree({"client": client}, source="test")
    with_files = Files(Connection(looks.client, OpenGate(looks.client, looks.policy)))
    for name in with_files.connection.welcome.file_names:
        with_files.fetch(name, tmp_path / "client-cache" / "received")
    with_files.connection.close()
    cutter = Cutter(port_of(server), **{f"{way}_bytes": 60_000})
    said: list[str] = []
    monkeypatch.setattr("client_edge.part.run._teller", lambda _console, _client_id: said.append)
    client |= {"server_address": f"tcp://127.0.0.1:{cutter.port}", "reconnect_timeout": TIMEOUT_S}
    config = ClientConfig.from_tree({"client": client, "data": {"path": data, "eval_fraction": 0.0}}, source="test")
    with pytest.raises(PeerGone, match=r"gave up on .* after 3 s \(client.reconnect_timeout\)") as caught:
        take_part(config, accept=True)
    assert caught.value.exit_code == 7
    assert "resume at step 1" in str(caught.value)
    cutter.close()
    check([text for text in said if "retry" in text], cutter)
    assert [event for event in read_events(server.metrics_path) if event["event"] == "step"] == []


def test_a_loop_of_the_clients_own_too(serve: Callable[..., ServedRun], tmp_path: Path) -> None:
    server = serve(num_rounds=0, server_mode="sequential")
    folders = {"output_dir": tmp_path / "clients", "cache_dir": tmp_path / "client-cache"}
    cutter = Cutter(port_of(server), up_bytes=60_000)
    address = f"tcp://127.0.0.1:{cutter.port}"
    model = client_edge.connect(address, client_id="clinic", reconnect_timeout=TIMEOUT_S, accept=True, **folders)
    with pytest.raises(PeerGone, match="gave up on"):
        train(model, adamw(model), batches(1, rows=16, length=60))
    client_edge.disconnect(model)
    cutter.close()
    assert 4 <= len(cutter.cut_at_s) <= 12
    assert cutter.cut_at_s[-1] - cutter.cut_at_s[0] < 4 * TIMEOUT_S


class TestSetbacks:
    def test_pauses_grow_and_end(self) -> None:
        setbacks = Setbacks()
        pauses = []
        for number in range(1, 12):
            setbacks.lost(now_s=0.0)
            assert setbacks.count == number
            pauses.append(setbacks.pause_s)
        assert pauses[0] == 0.0
        assert pauses[1:] == sorted(pauses[1:])
        assert pauses[-1] == 5.0

    def test_only_what_was_never_reached_before_is_progress(self) -> None:
        setbacks = Setbacks()
        setbacks.lost(now_s=0.0)
        setbacks.answered()
        assert setbacks.count == 0
        for _ in range(5):  # always the same first micro-batch, and never the second
            setbacks.lost(now_s=1.0)
            setbacks.answered()
        assert setbacks.count == 5
        setbacks.answered()
        assert setbacks.count == 0
        setbacks.lost(now_s=2.0)
        setbacks.reached("step", 1)
        assert setbacks.count == 0
        setbacks.lost(now_s=3.0)
        setbacks.reached("step", 1)
        assert setbacks.count == 1
        setbacks.answered()  # the first of the next step
        assert setbacks.count == 0

    def test_a_quiet_wait_for_others_is_no_failure(self) -> None:
        setbacks = Setbacks()
        setbacks.lost(now_s=10.0)
        setbacks.waited(600.0)
        setbacks.lost(now_s=615.0)
        assert setbacks.failing_s(now_s=620.0) == 10.0
