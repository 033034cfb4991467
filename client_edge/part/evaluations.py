"""When the layers held are measured, and who is told."""

import math

from client_edge.link.link import Link
from client_edge.measuring.evaluator import Evaluator
from client_edge.part.own_log import OwnLog
from client_edge.records.journal import Journal
from client_edge.text.own_text import Text
from splitfl.telemetry.measures import ALSO


class Evaluations:
    """One client's evaluations: before the first round, after rounds where that is asked for, and at the end."""

    def __init__(self, evaluator: Evaluator, text: Text, link: Link, journal: Journal, own_log: OwnLog) -> None:
        self._evaluator = evaluator
        self._text = text
        self._link = link
        self._journal = journal
        self._own_log = own_log

    def between_rounds(self) -> None:
        """Measure the layers held, once, where that is to be done."""
        place = self._journal.place
        if place.evaluated < 0:
            self._measure("before")
        elif place.evaluated < place.held_round and self._link.connection.run.federation.evaluate == "rounds":
            self._measure("round")
        else:
            return
        self._journal.evaluated()

    def after(self) -> None:
        """Measure the layers that the run ends with, and their loss on the further texts."""
        self._measure("after")

    def _measure(self, phase: str) -> None:
        if self._text.held_out is None:
            return
        measured = self._evaluator.measure(self._text.held_out)
        further = self._text.also.items() if phase == "after" else ()
        also = {name: self._evaluator.loss(dataset) for name, dataset in further}
        round_number = self._journal.place.held_round
        finite = {ALSO + name: loss for name, loss in also.items() if math.isfinite(loss)}
        self._link.report("evaluated", phase=phase, round_number=round_number, metrics=measured | finite)
        self._own_log.evaluated(phase, round_number, measured, also)
