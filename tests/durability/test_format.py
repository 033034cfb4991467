"""What is written down keeps its meaning, or bears another number."""

from dataclasses import fields
from typing import Any

import pytest

from client_edge.records.place import Place
from server_backbone.deciding.standing import Standing
from server_backbone.records.state import BufferedUpload, MemberState, RoundState, RunState
from splitfl.durability.format import STATE_FORMAT

# What snapshots hold in each format, in order: a copy, so that a change of either is seen.
_FORMAT = 2
_FIELDS: dict[type[Any], str] = {
    RunState: (
        "fingerprint commit_number weights_of num_merged round turns buffer members durable_step held_round "
        "last_merge measured folded folded_round standing has_ended end_reason ends_with"
    ),
    RoundState: "number first_step num_steps clients trainers step uploaded out rates finished tokens paths moved",
    BufferedUpload: "client_id begun weight moved",
    MemberState: (
        "step commit_number clip_coefficient next_step has_finished num_examples counted_round num_label_tokens"
    ),
    Standing: "judged_round value best_round best_value rounds_without_improvement",
    Place: "held_round step commit_number round_tokens evaluated",
}


@pytest.mark.parametrize("state", _FIELDS, ids=lambda state: state.__name__)
def test_the_number_is_raised_with_what_snapshots_hold(state: type[Any]) -> None:
    assert STATE_FORMAT == _FORMAT
    assert [field.name for field in fields(state)] == _FIELDS[state].split(), (
        "raise STATE_FORMAT, since an older splitfl cannot read this, and copy number and names here"
    )
