"""Which loop a client trains in: that of `splitfl client`, or one of its own around `client_edge.connect`."""

from collections.abc import Mapping
from enum import Enum

from splitfl.config.kind import RunKind
from splitfl.config.trees import RunConfig
from splitfl.errors import ConfigError
from splitfl.telemetry.units import counted


class Loop(Enum):
    """Whose loop trains."""

    OF_ROUNDS = "splitfl client"
    OWN = "client_edge.connect"


_LOOPS: Mapping[RunKind, Loop] = {
    RunKind.ROUNDS: Loop.OF_ROUNDS,
    RunKind.TURNS: Loop.OF_ROUNDS,
    RunKind.OWN_LOOPS: Loop.OWN,
}


def check_loop(run: RunConfig, address: str, loop: Loop) -> None:
    """Raise `ConfigError` unless the server at this address serves a run that clients take part in with this loop."""
    if _LOOPS[run.kind] is loop:
        return
    match loop:
        case Loop.OF_ROUNDS:
            raise ConfigError(
                f"the run at {address} has no rounds (federation.num_rounds = 0): take part in it with"
                " client_edge.connect, in a loop of your own"
            )
        case Loop.OWN:
            raise ConfigError(
                f"{address} serves a run of {counted(run.federation.num_rounds, 'round')}: take part in it with"
                " `splitfl client`, or set federation.num_rounds = 0 on the server for a loop of your own"
            )
