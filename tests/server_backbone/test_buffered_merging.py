"""Layers of past merges: kept while somebody needs them, gone afterwards, and missed in time when a disk lost them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packed import UNAGREED, packed

from server_backbone.deciding.rounds import Merge
from server_backbone.deciding.uploads import by_client, owner_of
from server_backbone.merging.buffered import BufferedMerging
from server_backbone.merging.layers import Layers
from server_backbone.merging.merging import Made
from server_backbone.merging.uploads import Uploads
from server_backbone.merging.versions import Versions
from server_backbone.records.entries import Buffered, TurnEnded
from server_backbone.records.state import BufferedUpload, MemberState, RoundState, RunState
from splitfl.config.sections import FederationSection, StrategySection
from splitfl.federation.strategies.fed_buff import FedBuff
from splitfl.protocol.messages import Upload


def merging_in(folder: Path, max_staleness: int = 0) -> BufferedMerging:
    first = {"x": torch.tensor([0.0])}
    layers = Layers(FedBuff(FederationSection(), StrategySection(), seed=0), first)
    uploads = Uploads(list(first), folder, "uniform", UNAGREED)
    return BufferedMerging(layers, uploads, Versions(folder), max_staleness=max_staleness)


def state(num_merged: int, *, turns: Mapping[str, int] = {}, buffer: Mapping[str, int] = {}) -> RunState:
    """Return where a run stands: the merge that each open turn, and each upload in the buffer, began with."""
    return RunState(
        num_merged=num_merged,
        members={name: MemberState() for name in {*turns, *map(owner_of, buffer)}},
        turns={name: turn(name, begun) for name, begun in turns.items()},
        buffer={
            name: BufferedUpload(client_id=owner_of(name), begun=begun, weight=1) for name, begun in buffer.items()
        },
    )


def turn(client_id: str, begun: int) -> RoundState:
    """Return a turn of one step whose first step has the merge's number."""
    alone = (client_id,)
    return RoundState(number=begun + 1, first_step=begun, num_steps=1, clients=alone, trainers=alone, step=begun)


def upload(merging: BufferedMerging, client_id: str, value: float, at: RunState) -> str:
    layers = (packed(torch.tensor([value]), 1 << 10),)
    spooled = merging.spool(client_id, Upload(round_number=1, num_examples=1, num_tokens=1, layers=layers), at)
    assert isinstance(spooled.entry, Buffered)
    return spooled.name


def merge_of(*names: str, at: RunState, closes: bool = False) -> Merge:
    return Merge(round_number=at.num_merged + 1, uploaded=tuple(names), absent=(), reason="", closes=closes)


def merge(merging: BufferedMerging, *names: str, at: RunState) -> Made:
    merging.retire(merge_of(*names, at=at), at)
    return merging.merge(merge_of(*names, at=at), at)


def versions(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "versions").iterdir())


@pytest.fixture
def merging(tmp_path: Path) -> BufferedMerging:
    """Three merges on: 0, then 10, 20, 30; "slow" is at work since the first of them."""
    merging = merging_in(tmp_path)
    for number, value in enumerate((10.0, 20.0, 30.0)):
        slow = {"slow": 1} if number else {}
        name = upload(merging, "fast", value, state(number, turns={"fast": number}))
        done = merge_of(name, at=state(number))
        merge(merging, name, at=state(number, turns=slow, buffer={name: number}))
        merging.forget(done, state(number + 1, turns=slow))
    return merging


def test_a_late_change_is_taken_from_where_it_began(merging: BufferedMerging, tmp_path: Path) -> None:
    assert versions(tmp_path) == ["1.safetensors", "2.safetensors"]
    name = upload(merging, "slow", 14.0, state(3, turns={"slow": 1}))  # begun at 10
    made = merge(merging, name, at=state(3, buffer={name: 1}))
    assert merging.layers.held["x"].item() == pytest.approx(30 + 4 / 3**0.5)
    assert (made.entry.taken, made.entry.closes) == ([name], False)


def test_what_nobody_needs_is_forgotten(merging: BufferedMerging, tmp_path: Path) -> None:
    at = state(3, turns={"other": 3})
    merging.retire(merge_of(at=at), at)
    assert versions(tmp_path) == ["3.safetensors"]
    merging.forget(merge_of(at=at, closes=True), state(4))
    assert versions(tmp_path) == []


def test_layers_that_are_too_old_are_not_kept(merging: BufferedMerging, tmp_path: Path) -> None:
    strict = merging_in(tmp_path, max_staleness=2)
    at = state(3, turns={"slow": 1})
    strict.retire(merge_of(at=at), at)  # slow's upload will be 3 merges old
    assert versions(tmp_path) == []


def test_uploads_that_wait_are_kept_and_those_merged_are_not(merging: BufferedMerging, tmp_path: Path) -> None:
    at = state(3, turns={"a.b": 3, "a": 3})
    waiting = upload(merging, "a", 1.0, at)
    merged = upload(merging, "a.b", 1.0, at)
    merging.forget(merge_of(merged, at=at), state(4, buffer={waiting: 3}))
    assert [path.name for path in (tmp_path / "uploads").iterdir()] == [f"{waiting}.safetensors"]


@pytest.mark.parametrize(("max_staleness", "why"), [(1, "begun 2 merges ago"), (0, "cannot be read any more")])
def test_an_upload_that_no_merge_can_take_is_dropped(
    merging: BufferedMerging, tmp_path: Path, max_staleness: int, why: str
) -> None:
    (tmp_path / "versions" / "1.safetensors").unlink()
    given = Upload(round_number=1, num_examples=1, num_tokens=1, layers=(packed(torch.tensor([1.0]), 1 << 10),))
    spooled = merging_in(tmp_path, max_staleness).spool("slow", given, state(3, turns={"slow": 1}))
    assert why in spooled.objection
    assert spooled.entry == TurnEnded(client_id="slow")


def test_an_upload_whose_beginning_is_lost_is_named_at_a_restart(merging: BufferedMerging, tmp_path: Path) -> None:
    turns = state(3, turns={"slow": 1, "fast": 3})
    slow, fast = upload(merging, "slow", 14.0, turns), upload(merging, "fast", 31.0, turns)
    (tmp_path / "versions" / "1.safetensors").write_bytes(b"torn")
    again, at = merging_in(tmp_path), state(3, buffer={slow: 1, fast: 3})
    assert again.restore(merging.layers.held, {}, at) == [slow]
    assert merge(again, fast, at=state(3, buffer={fast: 3})).entry.weights == {fast: 1}


def test_however_often_one_uploads_it_is_no_more_than_its_share(merging: BufferedMerging) -> None:
    buffer: dict[str, int] = {}
    for client_id, step in (("fast", 1), ("fast", 3), ("fast", 5), ("fast", 7), ("slow", 1), ("other", 1)):
        at = state(3, turns={client_id: 3})
        at = replace(at, turns={client_id: replace(at.turns[client_id], first_step=step)})
        buffer[upload(merging, client_id, 14.0, at)] = 3
    made = merge(merging, *buffer, at=state(3, buffer=buffer))
    fast = dict.fromkeys(("fast@1", "fast@3", "fast@5", "fast@7"), 0.5)
    assert made.entry.weights == {**fast, "slow@1": 1, "other@1": 1}
    assert by_client(made.entry.weights) == {"fast": 2, "slow": 1, "other": 1}
    assert made.lowered == {"fast": 4}
