"""Files of the welcome: several pieces on their way at once, progress that is said, and nothing fetched twice."""

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port
from served import ServedRun
from transport.relay import Cutter, Lag

from benchmarks.proxy import ChaosProxy
from client_edge.connection.connection import Connection
from client_edge.connection.progress import Progress
from client_edge.consent.gate import OpenGate
from client_edge.link.files import Files
from client_edge.link.link import Link
from client_edge.link.partial import PartialFile
from splitfl.config.own import ClientSection, PolicySection
from splitfl.config.trees import ServerConfig
from splitfl.errors import PeerGone, Refused
from splitfl.models.source import WEIGHTS_FILE
from splitfl.protocol.messages import Probe, TensorFrames

FRAME_BYTES = 1 << 16


@pytest.fixture
def run(tmp_path: Path, make_model: Callable[..., Path]) -> Iterator[ServedRun]:
    """A server with some megabytes to give."""
    model = make_model(hidden_size=256, intermediate_size=1024, num_attention_heads=4, head_dim=64)
    own = {"address": f"tcp://127.0.0.1:{free_port()}", "runs_dir": tmp_path, "run_id": "run"}
    tree = {
        "server": {**own, "cache_dir": tmp_path / "cache"},
        "model": {"model_name_or_path": str(model)},
        "link": {"frame_bytes": FRAME_BYTES},
        "storage": {"fsync": "never"},
    }
    served = ServedRun(ServerConfig.from_tree(tree, source="test"))
    served.start()
    yield served
    served.stop()


def port_of(run: ServedRun) -> int:
    return int(run.config.server.address.rsplit(":", 1)[1])


def files_at(port: int, tmp_path: Path, **more: Any) -> Files:
    tell = more.pop("tell", lambda _: None)
    section = {"client_id": "clinic", "server_address": f"tcp://127.0.0.1:{port}", "output_dir": tmp_path, **more}
    client = ClientSection(**section)
    return Files(Connection(client, OpenGate(client, PolicySection()), tell=tell))


def check(path: Path, files: Files) -> int:
    size, digest = files._announced(WEIGHTS_FILE)
    assert path.stat().st_size == size
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert list(path.parent.glob(".*.partial")) == []
    return size


def test_a_long_link_is_filled(run: ServedRun, tmp_path: Path) -> None:
    """One piece a round trip of 0.2 s would take 0.2 s times the number of pieces."""
    lag = Lag(port_of(run), 0.1)
    files = files_at(lag.port, tmp_path)
    begun_s = time.monotonic()
    size = check(files.fetch(WEIGHTS_FILE, tmp_path / "received"), files)
    assert time.monotonic() - begun_s < 0.5 * 0.2 * (size / FRAME_BYTES)
    files.connection.close()
    lag.close()


def test_a_lost_connection_costs_no_byte_twice(run: ServedRun, tmp_path: Path) -> None:
    cutter = Cutter(port_of(run), down_bytes=3_000_000)
    files = files_at(cutter.port, tmp_path)
    size = check(files.fetch(WEIGHTS_FILE, tmp_path / "received"), files)
    assert 1 <= len(cutter.cut_at_s) <= size // 2_000_000
    assert files.connection.bytes_received < size + len(cutter.cut_at_s) * 600_000 + 200_000
    files.connection.close()
    cutter.close()


def test_another_start_goes_on_where_the_last_one_was(run: ServedRun, tmp_path: Path) -> None:
    cutter = Cutter(port_of(run), down_bytes=3_000_000)
    files = files_at(cutter.port, tmp_path, reconnect_timeout=1e-9)
    with pytest.raises(PeerGone, match="gave up"):
        files.fetch(WEIGHTS_FILE, tmp_path / "received")
    files.connection.close()
    cutter.close()
    (partial,) = (tmp_path / "received").glob(".*.partial")
    here = partial.stat().st_size
    assert here > 2_000_000
    again = files_at(port_of(run), tmp_path)
    size = check(again.fetch(WEIGHTS_FILE, tmp_path / "received"), again)
    assert again.connection.bytes_received < size - here + 200_000
    again.connection.close()


def test_what_was_left_and_is_wrong_is_fetched_again(run: ServedRun, tmp_path: Path) -> None:
    files = files_at(port_of(run), tmp_path)
    digest = files._announced(WEIGHTS_FILE)[1]
    with PartialFile(tmp_path / "received", digest, 1 << 20) as part:
        part.write(b"something else")
    check(files.fetch(WEIGHTS_FILE, tmp_path / "received"), files)
    files.connection.close()


def test_two_clients_of_one_cache_do_not_disturb_each_other(tmp_path: Path) -> None:
    with PartialFile(tmp_path, "abc", 10) as first, PartialFile(tmp_path, "abc", 10) as second:
        first.write(b"12345")
        second.write(b"67")
        assert (first.num_bytes, second.num_bytes) == (5, 2)
    assert [path.name for path in tmp_path.iterdir()] == [".abc.partial"]
    with PartialFile(tmp_path, "abc", 10) as third:
        assert third.num_bytes == 5
        assert third.digest() == hashlib.sha256(b"12345").hexdigest()
    with PartialFile(tmp_path, "abc", 4) as fourth:  # longer than it may be
        assert fourth.num_bytes == 0


def test_progress_is_said_on_a_slow_link(run: ServedRun, tmp_path: Path) -> None:
    proxy = ChaosProxy(port_of(run))
    said: list[str] = []
    files = files_at(proxy.port, tmp_path, tell=said.append)
    size = files._announced(WEIGHTS_FILE)[0]
    proxy.harm["down"].bytes_per_second = size / 5
    check(files.fetch(WEIGHTS_FILE, tmp_path / "received"), files)
    assert 1 <= len(said) <= 4
    assert said[0].startswith("received ")
    assert said[0].endswith("/s")
    files.connection.close()
    proxy.close()


def test_progress_in_words() -> None:
    said: list[str] = []
    progress = Progress("sent", 113_000_000, said.append, begun_at=0, now_s=0.0)
    progress.at(5_000_000, now_s=2.0)
    progress.at(12_000_000, now_s=4.0)
    progress.at(13_000_000, now_s=5.0)
    progress.at(24_000_000, now_s=8.0)
    assert said == ["sent 12.0 MB of 113.0 MB, 3.0 MB/s", "sent 24.0 MB of 113.0 MB, 3.0 MB/s"]


def test_a_full_frame_goes_both_ways_and_not_for_ever(run: ServedRun, tmp_path: Path) -> None:
    files = files_at(port_of(run), tmp_path)
    for _ in range(4):
        num_bytes, seconds = Link(files.connection).probe()
        assert num_bytes == FRAME_BYTES
        assert 0 < seconds < 5
    with pytest.raises(Refused, match="5 probes"):
        Link(files.connection).probe()
    files.connection.close()


def test_a_probe_is_one_frame(run: ServedRun, tmp_path: Path) -> None:
    files = files_at(port_of(run), tmp_path)
    two = TensorFrames(dtype="u8", shape=(2,), buffers=(b"a", b"b"))
    files.connection.send(Probe(content=two))
    with pytest.raises(Refused, match="a probe that is not one frame of bytes"):
        files.connection.answer("nothing", Probe)
    files.connection.close()
