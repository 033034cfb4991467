"""Layers of past merges: kept while somebody needs them, gone afterwards, and missed in time when a disk lost them."""

from pathlib import Path

import pytest
import torch
from packed import UNAGREED, packed

from server_backbone.merging.buffered import BufferedMerger
from splitfl.config.sections import FederationSection, StrategySection
from splitfl.federation.strategies.fed_buff import FedBuff
from splitfl.protocol.messages import Upload


def merger_in(folder: Path, first: float = 0.0) -> BufferedMerger:
    rule = FedBuff(FederationSection(), StrategySection(), seed=0)
    return BufferedMerger(rule, {"x": torch.tensor([first])}, folder, "uniform", UNAGREED)


def upload(merger: BufferedMerger, name: str, value: float) -> None:
    layers = (packed(torch.tensor([value]), 1 << 10),)
    merger.spool(name, Upload(round_number=1, num_examples=1, num_tokens=1, layers=layers))


def versions(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "versions").iterdir())


@pytest.fixture
def merger(tmp_path: Path) -> BufferedMerger:
    """Three merges on: 0, then 10, 20, 30; a client is at work since the first."""
    merger = merger_in(tmp_path)
    for number, value in enumerate((10.0, 20.0, 30.0)):
        name = f"fast@{number}"
        upload(merger, name, value)
        merger.stand(number, {name: number})
        merger.retire({1} if number else ())
        merger.merge([name])
        merger.forget_uploads()
        merger.stand(number + 1, {})
    return merger


def test_a_late_change_is_taken_from_where_it_began(merger: BufferedMerger, tmp_path: Path) -> None:
    assert versions(tmp_path) == ["1.safetensors"]
    upload(merger, "slow@1", 14.0)  # begun at 10
    merger.stand(3, {"slow@1": 1})
    assert merger.staleness_of("slow@1") == 2
    merger.merge(["slow@1"])
    assert merger.layers()["x"].item() == pytest.approx(30 + 4 / 3**0.5)


def test_what_nobody_needs_is_forgotten(merger: BufferedMerger, tmp_path: Path) -> None:
    merger.retire({3})
    assert versions(tmp_path) == ["3.safetensors"]
    assert not merger.has(1)
    assert merger.has(0)
    merger.retire(())
    assert versions(tmp_path) == []


def test_uploads_that_wait_are_kept_and_those_merged_are_not(merger: BufferedMerger, tmp_path: Path) -> None:
    for name in ("a.b@1", "a@1"):
        upload(merger, name, 1.0)
    merger.forget_uploads(["a@1"])
    assert [path.name for path in (tmp_path / "uploads").iterdir()] == ["a@1.safetensors"]


def test_an_upload_whose_beginning_is_lost_is_named_at_a_restart(merger: BufferedMerger, tmp_path: Path) -> None:
    upload(merger, "slow@1", 14.0)
    upload(merger, "fast@9", 31.0)
    (tmp_path / "versions" / "1.safetensors").write_bytes(b"torn")
    again = merger_in(tmp_path)
    again.stand(3, {"slow@1": 1, "fast@9": 3})
    assert again.restore(merger.layers(), {}, {"slow@1": 1, "fast@9": 1}) == ["slow@1"]
    assert again.merge(["fast@9"]).used == {"fast@9": 1}


def test_however_often_one_uploads_it_is_no_more_than_its_share(merger: BufferedMerger) -> None:
    for name in ("fast@1", "fast@3", "fast@5", "fast@7", "slow@1", "other@1"):
        upload(merger, name, 14.0)
    merger.stand(3, dict.fromkeys(("fast@1", "fast@3", "fast@5", "fast@7", "slow@1", "other@1"), 3))
    weighed = merger.merge(["fast@1", "fast@3", "fast@5", "fast@7", "slow@1", "other@1"])
    assert weighed.used == {**dict.fromkeys(("fast@1", "fast@3", "fast@5", "fast@7"), 0.5), "slow@1": 1, "other@1": 1}
    assert weighed.lowered == {"fast": 4}
