"""Records of a run's log that no event tells of: a server may be killed after it has written one.

At most the last merge and the last step of each client can be missing. The next one waits for the answer, and the event
is written where the answer is given.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from server_backbone.deciding.uploads import by_client
from server_backbone.records.state import RunState
from splitfl.protocol.tensors import digest_of
from splitfl.telemetry.metrics import Event

Untold = tuple[str, dict[str, Any]]


def untold(state: RunState, events: Sequence[Event], layers: Mapping[str, Tensor]) -> Iterator[Untold]:
    """Give the missing events, a name and fields each; of a step, its loss was in the client's message and is None.

    `layers` are everyone's, read only if their merge is missing.
    """
    yield from _steps(state, events)
    told = {event["round"] for event in events if event["event"] == "merged"}
    if state.last_merge and state.num_merged not in told:
        yield (
            "merged",
            {
                "round": state.num_merged,
                "accepted": state.last_merge["accepted"],
                "reason": state.last_merge["reason"],
                "clients": by_client(state.last_merge["weights"]),
                "moved": state.last_merge["moved"],
                "absent": [],
                "num_tensors": len(layers),
                "digest": digest_of(layers.values()),
                **{name: state.last_merge[name] for name in ("uploads",) if name in state.last_merge},
            },
        )


def _steps(state: RunState, events: Sequence[Event]) -> Iterator[Untold]:
    told = {(event["client_id"], event["commit_number"]) for event in events if event["event"] == "step"}
    for client_id, member in sorted(state.members.items()):
        round_ = state.round_of(client_id)
        if round_ is None or member.step < round_.first_step or (client_id, member.commit_number) in told:
            continue
        yield (
            "step",
            {
                "client_id": client_id,
                "round": round_.number,
                "step": member.step,
                "commit_number": member.commit_number,
                "loss": None,
                "num_label_tokens": member.num_label_tokens,
                "clip_coefficient": member.clip_coefficient,
                "bytes_sent": 0,  # counted anew by each process
                "bytes_received": 0,
            },
        )
