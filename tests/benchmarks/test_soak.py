"""The soak finds what grows; that a real run is flat is for `make soak`."""

from pathlib import Path

import pytest

from benchmarks.soak import Metrics, Record, Sample, disk_per_commit, judge
from splitfl.errors import Incomplete

COMMITS = 1000
NOISE = (0, 3_000_000, 1_000_000, 2_000_000)
"""An allocator's gaps, bytes."""


def record(*, leak: int = 0, descriptor_every: int = 0, fatter: int = 0) -> Record:
    """A server and a client over 1,000 commits: bytes leaked a commit, a descriptor, more bytes in late steps."""
    seen = Record()
    for commit in range(1, COMMITS + 1):
        for number, name in enumerate(("server", "clinic-0")):
            held = 400_000_000 + NOISE[(commit + number) % 4] + (leak * commit if name == "server" else 0)
            more = commit // descriptor_every if descriptor_every else 0
            seen.samples[name].append(
                Sample(commit=commit, rss_bytes=held, uss_bytes=held, descriptors=20 + more, threads=4)
            )
        before = seen.traffic["clinic-0"][-1] if commit > 1 else (0, 0, 0)
        sent = 10_000 + (5_000 if commit % 10 == 0 else 0) + (fatter if commit > COMMITS // 2 else 0)
        seen.traffic["clinic-0"].append((commit, before[1] + sent, before[2] + 10_000))
        seen.disk.append((commit, {"server_metrics": 500 * commit, "server_state": 8_000}))
    return seen


def broken(seen: Record) -> set[tuple[str, str]]:
    return {(held.who, held.what) for held in judge(seen) if not held.is_flat}


def test_what_is_flat_is_flat() -> None:
    assert broken(record()) == set()


def test_a_leak_is_found_and_its_rate() -> None:
    seen = record(leak=30_000)
    assert broken(seen) == {("server", "rss_bytes"), ("server", "uss_bytes")}
    (found,) = [held for held in judge(seen) if (held.who, held.what) == ("server", "rss_bytes")]
    assert found.per_commit == pytest.approx(30_000, rel=0.01)


def test_a_descriptor_now_and_then_is_found_and_one_in_passing_is_not() -> None:
    assert broken(record(descriptor_every=300)) == {("server", "descriptors"), ("clinic-0", "descriptors")}
    assert broken(record(descriptor_every=900)) == set()


def test_steps_that_send_more_are_found_beside_merges_that_do() -> None:
    assert broken(record(fatter=1_000)) == {("clinic-0", "bytes_sent_per_step")}


def test_what_grows_on_disk_is_a_rate() -> None:
    assert disk_per_commit(record()) == {"server_metrics": 500.0, "server_state": 0.0}


def test_a_run_that_was_too_short_is_no_verdict() -> None:
    seen = record()
    seen.samples = {name: samples[-1:] for name, samples in seen.samples.items()}  # type: ignore[assignment]
    with pytest.raises(Incomplete, match="let it run longer"):
        judge(seen)


def test_events_are_read_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    assert metrics.new() == []
    path.write_bytes(b'{"event": "a"}\n{"event": "b"}\n{"eve')
    assert [event["event"] for event in metrics.new()] == ["a", "b"]
    assert metrics.new() == []
    path.write_bytes(b'{"event": "a"}\n{"event": "b"}\n{"event": "c"}\n')
    assert [event["event"] for event in metrics.new()] == ["c"]
