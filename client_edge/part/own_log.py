"""What a client writes into its own metrics.jsonl: how its part goes, and what that takes."""

import time
from collections.abc import Mapping
from typing import Any

from client_edge.layers.edge import Edge
from client_edge.link.files import Files
from client_edge.part.step import Step
from client_edge.part.totals import Totals
from splitfl.config.run import differences
from splitfl.config.trees import RunConfig
from splitfl.protocol.messages import Merged, Resumed, RoundOpened, RoundsEnded
from splitfl.telemetry.measures import event_of
from splitfl.telemetry.memory import peak_rss_bytes
from splitfl.telemetry.metrics import MetricsLog


class OwnLog:
    """One client's own events; its cost is counted from `begun_s` of `time.monotonic` on."""

    def __init__(self, metrics: MetricsLog, client_id: str, edge: Edge, files: Files, *, begun_s: float) -> None:
        self._metrics = metrics
        self._client_id = client_id
        self._edge = edge
        self._files = files
        self._connection = files.connection
        self._begun_s = begun_s
        self._round_number = 0

    def started(self, *, device: str, resumed: bool) -> None:
        """Log which run this is, and whether this client goes on with it."""
        welcome, run = self._connection.welcome, self._connection.run
        self._metrics.emit(
            "run_started",
            run_id=welcome.run_id,
            model=run.model.model_name_or_path,
            server_mode=run.federation.server_mode,
            num_rounds=run.federation.num_rounds,
            local_steps=run.federation.local_steps,
            fingerprint=welcome.fingerprint,
            device=device,
            resumed=resumed,
        )

    def note(self, text: str) -> None:
        """Log a sentence for the user."""
        self._emit("note", text=text)

    def waiting(self, text: str) -> None:
        """Log what is waited for."""
        self._emit("waiting", text=text)

    def settings_changed(self, before: RunConfig, run: RunConfig) -> None:
        """Log the settings that a server has come back with."""
        changes = [
            {"name": name, "before": then, "now": now}
            for name, then, now in differences(before.operation(), run.operation())
        ]
        self._emit("settings_changed", changes=changes)

    def rewound(self, resumed: Resumed) -> None:
        """Log that this client goes back, with the server."""
        self._emit("rewound", step=resumed.step, reason=resumed.reason)

    def rejoined(self, resumed: Resumed) -> None:
        """Log that the others have gone on without this client."""
        self._emit("rejoined", reason=f"{resumed.reason}: it takes part again from the next round on")

    def resumed_in(self, round_number: int) -> None:
        """Count the steps from here on to this round."""
        self._round_number = round_number

    def round_opened(self, round_: RoundOpened) -> None:
        """Log the round; `trainers` is empty when we sit it out."""
        self._round_number = round_.round_number
        self._emit(
            "round_opened",
            round=round_.round_number,
            trainers=[self._client_id] if round_.num_steps else [],
            first_step=round_.first_step,
            num_steps=round_.num_steps,
        )

    def stepped(self, step: Step) -> None:
        """Log the step."""
        self._emit(
            "step",
            round=self._round_number,
            step=step.step,
            loss=step.loss,
            num_label_tokens=step.num_label_tokens,
            num_tokens=step.num_tokens,
            num_positions=step.num_positions,
            compute_seconds=self._edge.compute.seconds,
            bytes_sent=self._connection.bytes_sent,
            bytes_received=self._connection.bytes_received,
        )

    def merged(self, merged: Merged, digest: str) -> None:
        """Log the merge."""
        self._emit("loaded", round=merged.round_number, accepted=merged.accepted, reason=merged.reason, digest=digest)

    def caught_up(self, round_number: int, digest: str) -> None:
        """Log layers of a merge that was made while this client was away."""
        self._emit("loaded", round=round_number, accepted=True, reason="", digest=digest)

    def rounds_ended(self, ended: RoundsEnded) -> None:
        """Log why, and which round's layers these are."""
        self._emit("rounds_ended", reason=ended.reason, best_round=ended.best_round)

    def evaluated(
        self, phase: str, round_number: int, measured: Mapping[str, float], also: Mapping[str, float]
    ) -> None:
        """Log what was measured, and the losses on further texts."""
        self._emit("evaluated", phase=phase, round=round_number, **event_of(measured), also=dict(also))

    def says_goodbye(self, round_number: int) -> None:
        """Log that the totals are about to be handed over."""
        self._emit("says_goodbye", round=round_number)

    def done(self, totals: Mapping[str, Any]) -> None:
        """Log the totals of the whole part."""
        self._emit("client_done", **totals)

    def stopped(self, step: int) -> None:
        """Write what this process has taken, for the one that goes on."""
        self._emit("client_stopped", step=step, **self.totals().as_fields())

    def totals(self) -> Totals:
        """Return what this process has taken up to now."""
        return Totals(
            bytes_sent=self._connection.bytes_sent,
            bytes_received=self._connection.bytes_received,
            bytes_of_files=self._files.bytes_fetched,
            peak_rss_bytes=peak_rss_bytes(),
            wall_seconds=time.monotonic() - self._begun_s,
            compute_seconds=self._edge.compute.seconds,
        )

    def _emit(self, event: str, **fields: Any) -> None:
        self._metrics.emit(event, client_id=self._client_id, **fields)
