"""One client's way through a run, over as many connections as it takes."""

from collections.abc import Callable

from client_edge.connection.endings import ServerStops
from client_edge.part.loop import Training
from client_edge.part.resuming import Resuming
from client_edge.part.totals import Totals
from splitfl.config.trees import RunConfig
from splitfl.errors import PeerGone, Refused
from splitfl.protocol.messages import Why


class _GoesOn(Exception):  # noqa: N818  # no error: the run was prolonged while its end was under way
    """There are further rounds."""


class Participation:
    """Resume, train, evaluate, hand over the totals.

    Each part may lose the connection at any point: `_persist` makes a new one, settles where client and server are, and
    does the part again from there.
    """

    def __init__(
        self,
        training: Training,
        resuming: Resuming,
        *,
        earlier: Totals,
        parted_after: int,
    ) -> None:
        """`earlier` is what processes before this one have taken, `parted_after` the merge after which one parted."""
        self._training = training
        self._resuming = resuming
        self._earlier = earlier
        self._link = training.link
        self._connection = training.link.connection
        self._journal = training.journal
        self._own_log = training.own_log
        self._has_said_goodbye = parted_after == self._journal.place.held_round >= self._num_rounds

    def run(self) -> None:
        """Do it all."""
        self._connection.on_waiting = self._own_log.waiting
        self._connection.on_settings = self._adopt
        try:
            self._persist(self._resuming.resume, resumes=False)
        except (PeerGone, Refused) as gone:
            if not self._was_done_before(gone):
                raise
            self._own_log.note(f"the run was over before this client came back to it: {gone}")
        else:
            self._train_to_the_end()
        self._journal.finished()

    def save(self) -> None:
        """Write down where this client is, for a later start."""
        self._journal.stopped()

    def stopped(self) -> int:
        """Write down where this client is and what it has taken; return the step that it goes on with."""
        self.save()
        self._own_log.stopped(self._journal.place.step)
        return self._journal.place.step + 1

    def _train_to_the_end(self) -> None:
        while True:
            self._persist(self._train)
            try:
                self._take_leave()
                return
            except _GoesOn:
                self._own_log.note("the run has more rounds than it had: training goes on")

    def _train(self) -> None:
        self._has_said_goodbye = False
        self._training.run()

    def _take_leave(self) -> None:
        """Evaluate once more and hand over the totals; all that counts is merged, so the server may have ended."""
        try:
            self._persist(self._training.evaluations.after, is_last=True)
            self._persist(self._say_goodbye, is_last=True)
        except (PeerGone, Refused) as gone:
            if not self._may_end_without(gone):
                raise
            self._own_log.note(f"the run was over before the server took leave of this client: {gone}")

    def _say_goodbye(self) -> None:
        examples = self._training.batches.dataset
        totals = {
            "num_examples": len(examples),
            "num_truncated": examples.num_truncated,
            **self._earlier.and_then(self._own_log.totals()).as_fields(),
        }
        self._has_said_goodbye = True
        self._own_log.says_goodbye(self._journal.place.held_round)
        self._link.goodbye({name: float(value) for name, value in totals.items()})
        self._own_log.done(totals)

    def _persist(self, part: Callable[[], None], *, resumes: bool = True, is_last: bool = False) -> None:
        """Do a part of the run, over as many connections as it takes.

        Raises `_GoesOn` ahead of a part that is the run's last, if a server that has come back has more rounds.
        """
        is_lost = False
        while True:
            try:
                if is_lost and resumes:
                    self._resuming.resume()
                    if is_last and not self._link.session.is_parting:
                        raise _GoesOn
                part()
                return
            except PeerGone as gone:
                is_lost = True
                self._reconnect(gone)

    def _reconnect(self, gone: PeerGone) -> None:
        if isinstance(gone, ServerStops):
            self._journal.stopped()
        if self._journal.pending is None:  # a step that was asked for keeps its gradients
            self._training.edge.discard()
        patience_s = 2 * self._connection.run.link.heartbeat_timeout if self._has_said_goodbye else None
        self._connection.reconnect(gone, resume_at=self._journal.place.step + 1, within_s=patience_s)

    def _adopt(self, before: RunConfig, run: RunConfig) -> None:
        """Go on with the settings of a server that has come back with others."""
        self._journal.adopt(run.storage)
        self._own_log.settings_changed(before, run)

    @property
    def _num_rounds(self) -> int:
        return self._connection.run.federation.num_rounds

    def _may_end_without(self, gone: PeerGone | Refused) -> bool:
        """Tell whether nothing is lost with this answer: the run has gone through, or our goodbye went unanswered."""
        code = gone.code if isinstance(gone, Refused) else ""  # none where nobody, or another run, answers there
        return code == Why.FINISHED if code else self._has_said_goodbye

    def _was_done_before(self, gone: PeerGone | Refused) -> bool:
        """Tell whether the run is over for a client that was away, and that had done everything."""
        return self._journal.place.held_round >= self._num_rounds and self._may_end_without(gone)
