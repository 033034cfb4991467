"""What holds for every gate, whatever happens in which order; conversations are in tests/traces."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server_backbone.deciding.gates import Action, Apply, Gate, gate_for

ACTS: dict[str, Callable[[Gate, str, float], list[Action]]] = {
    "begins": lambda gate, client_id, now_s: gate.forward(client_id, 1, now_s),
    "asks": lambda gate, client_id, now_s: gate.commit(client_id, now_s),
    "is lost": lambda gate, client_id, now_s: gate.lost(client_id, now_s),
    "leaves": lambda gate, client_id, now_s: gate.finished(client_id, now_s),
    "time passes": lambda gate, _, now_s: gate.ticked(now_s),
}
OTHERS = ("the round opens", "the round closes", "comes back")


@pytest.mark.parametrize("server_mode", ["shared", "sequential", "per_client", "frozen"])
@settings(max_examples=1000, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*ACTS, *OTHERS]), st.sampled_from("ab")), min_size=2, max_size=30))
def test_a_step_is_of_those_who_have_asked_for_it_in_this_round_and_are_still_there(
    server_mode: str, acts: list[tuple[str, str]]
) -> None:
    gate, is_open, now_s = gate_for(server_mode, 10.0), False, 0.0
    asked: set[str] = set()
    for act, client_id in acts:
        now_s += 4.0
        actions: list[Action] = []
        match act:
            case "the round opens" if not is_open:
                is_open = True
                gate.round_opened("ab", 1)
            case "the round closes":
                is_open = False
                asked.clear()
                gate.round_closed()
            case "comes back":
                gate.returned(client_id)
            case "is lost" | "leaves":
                asked.discard(client_id)
                actions = ACTS[act](gate, client_id, now_s)
            case "asks":
                asked |= {client_id} if is_open else set()
                actions = ACTS[act](gate, client_id, now_s)
            case "begins" | "time passes":
                actions = ACTS[act](gate, client_id, now_s)
        for action in actions:
            if isinstance(action, Apply):
                assert set(action.client_ids) <= asked
                asked -= set(action.client_ids)
