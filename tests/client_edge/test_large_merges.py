"""A merge that takes a while to come in says how far it is, as files and uploads do."""

import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ALLOWS_ALL, free_port, write_text
from served import ServedRun

from benchmarks.proxy import ChaosProxy
from client_edge.connection.progress import Arriving
from client_edge.part.run import take_part
from splitfl.config.trees import ClientConfig, ServerConfig
from splitfl.telemetry.metrics import read_events


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_the_screen_says_how_much_of_a_merge_is_here(
    make_model: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make_model(hidden_size=512, intermediate_size=2800, num_attention_heads=4, head_dim=128)
    port = free_port()
    proxy = ChaosProxy(port)
    own = {"address": f"tcp://127.0.0.1:{port}", "runs_dir": tmp_path, "run_id": "run", "cache_dir": tmp_path / "cache"}
    server = {
        "server": {**own, "export_model": False},
        "model": {"model_name_or_path": str(model)},
        "train": {"top": "full", "bottom": "none", "backbone": "none"},
        "federation": {"num_rounds": 1, "local_steps": 1, "server_mode": "frozen"},
        "text": {"max_seq_length": 16},
        "link": {"heartbeat_interval": 0.3, "slowest_link_bytes_per_second": 1e6},
        "storage": {"fsync": "never"},
    }
    served = ServedRun(ServerConfig.from_tree(server, source="test"))
    served.start()
    data = write_text(tmp_path / "text.txt", num_lines=20, seed=0)
    folders = {"output_dir": tmp_path / "clients", "cache_dir": tmp_path / "client-cache"}
    own = {"client_id": "clinic", "server_address": f"tcp://127.0.0.1:{proxy.port}", **folders}
    tree = {"client": own, "data": {"path": data, "eval_fraction": 0.0}, "policy": ALLOWS_ALL}
    client = ClientConfig.from_tree(tree, source="test")
    thread = threading.Thread(target=lambda: take_part(client, accept=True), daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not any(event["event"] == "round_opened" for event in read_events(served.metrics_path)):
            assert time.monotonic() < deadline, "no round opens"
            time.sleep(0.02)
        proxy.harm["down"].bytes_per_second = 4e6
        thread.join(timeout=60)
        assert not thread.is_alive()
    finally:
        served.stop()
        proxy.close()
    said = re.findall(r"received ([\d.]+) MB of ([\d.]+) MB, ([\d.]+) MB/s", capfd.readouterr().err)
    assert said
    assert all(0 < float(here) < float(total) for here, total, _ in said)
    assert {total for _, total, _ in said} == {said[0][1]}
    assert 17 < float(said[0][1]) < 30
    assert all(2 < float(rate) < 6 for _, _, rate in said), said


def test_what_came_before_the_wait_does_not_count() -> None:
    said: list[str] = []
    arriving = Arriving(7_000_000, said.append)
    arriving.at(113_000_000, 9_000_000, now_s=0.0)
    arriving.at(113_000_000, 21_000_000, now_s=4.0)
    arriving.at(113_000_000, 121_000_000, now_s=8.0)  # all is here, and there is nothing to wait for
    assert said == ["received 14.0 MB of 113.0 MB, 3.0 MB/s"]


def test_a_connection_whose_beginning_was_not_seen() -> None:
    said: list[str] = []
    arriving = Arriving(None, said.append)
    arriving.at(50_000_000, 9_000_000, now_s=0.0)
    arriving.at(50_000_000, 19_000_000, now_s=5.0)
    assert said == ["received 10.0 MB of 50.0 MB, 2.0 MB/s"]
