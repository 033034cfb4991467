"""What clients have measured of each round's layers, until it has been put together and said."""

from collections.abc import Iterator, Mapping

from splitfl.telemetry.measures import Measured, federated
from splitfl.telemetry.metrics import MetricsLog

# Rounds whose measurements are still put together when another client's come in; a run may have thousands.
_ROUNDS_KEPT = 8


class Measurements:
    """Keeps the ones before and after training, and the newest rounds'."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], dict[str, Measured]] = {}
        self._unsaid: set[tuple[str, int]] = set()

    def __len__(self) -> int:
        """How many groups of measurements are kept."""
        return len(self._found)

    def add(self, phase: str, round_number: int, client_id: str, measured: Measured) -> None:
        """Take what a client has measured; of a round that is no longer kept, nothing."""
        if phase == "round" and round_number <= self._newest_round() - _ROUNDS_KEPT:
            return
        self._found.setdefault((phase, round_number), {})[client_id] = measured
        self._unsaid.add((phase, round_number))

    def news(self) -> Iterator[tuple[str, int, Mapping[str, Measured]]]:
        """Yield phase, round and what all clients have measured, where that has changed since it was last asked."""
        for phase, round_number in self._found:
            if (phase, round_number) in self._unsaid:
                yield phase, round_number, self._found[phase, round_number]
        self._unsaid.clear()
        oldest = self._newest_round() - _ROUNDS_KEPT
        self._found = {key: found for key, found in self._found.items() if key[0] != "round" or key[1] > oldest}

    def _newest_round(self) -> int:
        return max((round_number for phase, round_number in self._found if phase == "round"), default=0)


class Sayer:
    """Says what all clients have measured together."""

    def __init__(self, metrics: MetricsLog) -> None:
        self._metrics = metrics
        self.measurements = Measurements()

    def say(self) -> None:
        """Say what has changed since this was last said."""
        for phase, round_number, clients in self.measurements.news():
            self._metrics.emit(
                "federated",
                phase=phase,
                round=round_number,
                num_clients=len(clients),
                measures=federated(clients),
            )
