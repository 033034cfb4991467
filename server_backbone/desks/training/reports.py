"""Reports: which layers a client has loaded, and what it has measured of them."""

from dataclasses import dataclass
from typing import ClassVar

from server_backbone.desks.desk import Desk, Effects, Evaluates, WorkQueue
from server_backbone.desks.training.endings import Endings
from server_backbone.desks.training.layers import CommonLayers
from server_backbone.desks.training.measurements import Sayer
from server_backbone.door.members import Connection
from server_backbone.engine import work
from server_backbone.engine.engine import Engine
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Message, Report
from splitfl.telemetry.measures import ALSO, complete, event_of
from splitfl.telemetry.metrics import MetricsLog


@dataclass(kw_only=True, eq=False)
class Reports(Desk):
    """`Report`."""

    common: CommonLayers
    endings: Endings
    engine: Engine
    queue: WorkQueue
    metrics: MetricsLog
    sayer: Sayer

    takes: ClassVar[tuple[type[Message], ...]] = (Report,)

    def receive(self, connection: Connection, message: Message, now_s: float) -> Effects:
        """Say what a client reports, and keep it for the comparison of rounds."""
        client_id = connection.member.client_id
        if isinstance(message, Report):
            self._take(client_id, message)
        return [Evaluates(client_id=client_id)]

    def _take(self, client_id: str, report: Report) -> None:
        if report.round_number > self.common.held_round:
            raise RemoteProtocolError(f"a report of round {report.round_number}, which is not merged")
        if report.topic == "loaded":
            self.metrics.emit("loaded", client_id=client_id, round=report.round_number, digest=report.digest)
            return
        if report.phase != "after":
            measured = {name: value for name, value in report.metrics.items() if not name.startswith(ALSO)}
            self.queue.put(work.NoteMeasured(client_id=client_id, round_number=report.round_number, measured=measured))
        also = {name.removeprefix(ALSO): value for name, value in report.metrics.items() if name.startswith(ALSO)}
        round_number = self.engine.view.state.ends_with if self._is_of_the_best(report) else report.round_number
        self.sayer.measurements.add(report.phase, round_number, client_id, complete(report.metrics))
        self.metrics.emit(
            "evaluated",
            client_id=client_id,
            phase=report.phase,
            round=round_number,
            **event_of(report.metrics),
            also=also,
        )

    def _is_of_the_best(self, report: Report) -> bool:
        """Tell whether a report is of the round that the run ends with, whose number clients do not know."""
        return self.endings.have_ended and report.phase == "after" and self.engine.view.state.ends_with > 0
