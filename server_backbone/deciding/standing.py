"""Which round was the best so far, and for how long none has been better: pure."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from splitfl.config.sections import FederationSection
from splitfl.telemetry.measures import MEASURES, Measured, complete, federated
from splitfl.telemetry.units import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the comparison of rounds has come to."""

    judged_round: int = 0
    """The last round that was compared."""
    value: float | None = None
    """Its measure over all clients; None where nobody has measured."""
    best_round: int = 0
    """0 while none was."""
    best_value: float = 0.0
    rounds_without_improvement: int = 0

    def after(self, round_number: int, value: float | None, federation: FederationSection) -> "Standing":
        """Compare a round by its measure over all clients; None, where nobody has measured, changes nothing.

        As transformers has it, any better value makes the best round. Only one that is better by more than
        `early_stopping_threshold` ends the rounds without improvement.
        """
        if value is None:
            return replace(self, judged_round=round_number, value=None)
        sign = 1 if MEASURES[federation.metric_for_best_model].greater_is_better else -1
        gain = sign * (value - self.best_value)
        is_better = not self.best_round or gain > 0
        is_improvement = not self.best_round or gain > federation.early_stopping_threshold
        return Standing(
            judged_round=round_number,
            value=value,
            best_round=round_number if is_better else self.best_round,
            best_value=value if is_better else self.best_value,
            rounds_without_improvement=0 if is_improvement else self.rounds_without_improvement + 1,
        )

    def reason_to_stop(self, federation: FederationSection) -> str:
        """Say why there should be no further round, "" if there should."""
        patience, stalled = federation.early_stopping_patience, self.rounds_without_improvement
        if not patience or stalled < patience:
            return ""
        return (
            f"{federation.metric_for_best_model} has not improved for {counted(stalled, 'round')}"
            " (early_stopping_patience ="
            f" {patience}); the best was {self.best_value:.4f} after round {self.best_round}"
        )


def value_of(measured: Mapping[str, Measured], federation: FederationSection) -> float | None:
    """Return the measure that rounds are compared by, over all clients' held-out text; None if no client has it."""
    figures: dict[str, Any] = federated({client_id: complete(each) for client_id, each in measured.items()})
    found = figures.get(federation.metric_for_best_model)
    return None if found is None else float(found["value"])
