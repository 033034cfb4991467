"""Where a client and the server are, found out after a start or a lost connection."""

from collections.abc import Callable, Mapping

from torch import Tensor

from client_edge.part.loop import Training, report_layers
from client_edge.part.step import Step
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Resumed


class Resuming:
    """Asks the server where both are, and brings this client there."""

    def __init__(self, training: Training, *, first_layers: Callable[[], Mapping[str, Tensor]]) -> None:
        """`first_layers` fetches what trains here as it was before any step."""
        self._edge = training.edge
        self._link = training.link
        self._journal = training.journal
        self._batches = training.batches
        self._own_log = training.own_log
        self._first_layers = first_layers

    def resume(self) -> None:
        """Go to where the server says this client is."""
        resumed = self._verdict()
        if resumed.verdict == "anew":
            self._begin_anew(resumed)
            counted = False
        else:
            self._settle(resumed)
            counted = resumed.counted_round > self._journal.place.held_round
        if resumed.layers:
            self._journal.loaded(self._link.unpack(resumed.layers), resumed.held_round, counted=counted)
            digest = report_layers(self._edge, self._link, resumed.held_round)
            self._own_log.caught_up(resumed.held_round, digest)
        if resumed.round_number:
            self._own_log.resumed_in(resumed.round_number)
        elif self._link.connection.run.federation.compares_rounds:
            self._journal.evaluates_again()

    def _verdict(self) -> Resumed:
        """Ask, and where the server has gone back, go back with it and ask once more."""
        resumed = self._ask()
        if resumed.verdict != "rewind":
            return resumed
        self._go_back(resumed)
        resumed = self._ask()
        if resumed.verdict == "rewind":
            raise RemoteProtocolError("the server wants this client to go back, and to go back again")
        return resumed

    def _ask(self) -> Resumed:
        place, pending = self._journal.place, self._journal.pending
        return self._link.connection.resume(
            held_round=place.held_round,
            step=place.step,
            commit_number=place.commit_number,
            pending_step=pending.step if pending else 0,
        )

    def _go_back(self, resumed: Resumed) -> None:
        self._own_log.rewound(resumed)
        if not self._journal.rewind(resumed.step, resumed.commit_number, resumed.held_round):
            self._edge.begin_again(self._first_layers())
            self._journal.begin_at(0, 0, "its records do not reach back that far", forgets=True)
        self._link.connection.agree_again()

    def _begin_anew(self, resumed: Resumed) -> None:
        self._own_log.rejoined(resumed)
        self._edge.discard()
        if not resumed.layers:  # nothing is merged, and all begin with the first ones
            self._edge.begin_again(self._first_layers())
        self._journal.begin_at(resumed.step, resumed.commit_number, resumed.reason)

    def _settle(self, resumed: Resumed) -> None:
        """Apply the step that was asked for if the server has, else forget it."""
        pending = self._journal.pending
        if pending is None or resumed.step != pending.step:
            self._journal.refused()
            return
        self._journal.acknowledged(commit_number=resumed.commit_number, clip_coefficient=resumed.clip_coefficient)
        self._own_log.stepped(Step.of(pending.step, pending.loss, self._batches.at(pending.step)))
