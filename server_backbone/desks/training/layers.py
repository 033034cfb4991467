"""Everyone's layers: what clients hold, or get when they hold others."""

from dataclasses import dataclass, field

from server_backbone.door.members import Member
from server_backbone.engine.engine import Engine
from server_backbone.kinds import ServerParts
from splitfl.protocol.messages import TensorFrames


@dataclass(kw_only=True, eq=False)
class CommonLayers:
    """The layers of the last merge, or of that with which the run has ended."""

    kind: ServerParts
    engine: Engine

    held_round: int = field(default=0, init=False)
    """What clients hold: the number of the last merge, or the one above it once the run ends with an earlier one's."""
    layers: tuple[TensorFrames, ...] = field(default=(), init=False)
    """None before the first merge, since all begin with the same."""

    def __post_init__(self) -> None:
        self.layers = self._layers_after(0)

    def restore(self) -> None:
        """Hold what the log ends with."""
        state = self.engine.view.state
        self.held_round, self.layers = state.held_round, self._layers_after(state.num_merged)

    def become(self, held_round: int, layers: tuple[TensorFrames, ...]) -> None:
        """Hold others."""
        self.held_round, self.layers = held_round, layers

    def missed_by(self, member: Member) -> tuple[TensorFrames, ...]:
        """Return the layers for a client that holds others, none for one that has them."""
        return () if member.held_round == self.held_round else self.layers

    def counted_round(self, client_id: str) -> int:
        """Return the last merge that a client's layers are in."""
        known = self.engine.view.state.members.get(client_id)
        return known.counted_round if known is not None else 0

    def _layers_after(self, num_merged: int) -> tuple[TensorFrames, ...]:
        """Describe everyone's layers; the first ones only where a client comes back to them, since all begin so."""
        return self.engine.describe_layers() if self.kind.holds_layers(num_merged) else ()
