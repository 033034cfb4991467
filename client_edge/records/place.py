"""Where a client is in a run, and what it has asked for there."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from splitfl.durability.record import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a client is in a run."""

    held_round: int = 0
    """Number of the merge whose layers it holds."""
    step: int = 0
    """The last step it has applied."""
    commit_number: int = 0
    round_tokens: int = 0
    """Label tokens of its steps since the last merge."""
    evaluated: int = -1
    """The last merge after which it has evaluated; 0 is before the first round, -1 not at all."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pending:
    """A step that the server was asked for."""

    step: int
    num_label_tokens: int
    loss: float
    gradients: Mapping[str, Tensor]

    def to_record(self) -> Record:
        """Return what the log has of it."""
        fields = {"step": self.step, "num_label_tokens": self.num_label_tokens, "loss": self.loss}
        return Record(kind="step", fields=fields, tensors=self.gradients)
