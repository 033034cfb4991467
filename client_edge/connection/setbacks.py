"""Losses of the connection without progress between them: how many, since when, and the pause before the next try.

Joining again is no progress, or a message that never gets through would be tried for ever. Progress is something that
was never reached before: a step, a round, a piece of a file, or one more answer within a step.
"""

from splitfl.protocol.messages import (
    BackwardDone,
    Committed,
    Declined,
    ForwardDone,
    Kept,
    Merged,
    Message,
    RoundOpened,
    WentBack,
)

_PAUSE_LEAST_S = 0.1
_PAUSE_MOST_S = 5.0


class Setbacks:
    """The losses of one client; the caller owns the clock."""

    def __init__(self) -> None:
        self.count = 0
        """Losses since the last progress."""
        self._since_s = 0.0
        self._waited_s = 0.0
        self._furthest: dict[str, int] = {}
        self._answers = 0
        """Answers on this connection since a step or round was reached."""
        self._most_answers = 0

    @property
    def pause_s(self) -> float:
        """Seconds to wait before the next try: none for the first, then twice as long each time."""
        return min(_PAUSE_MOST_S, _PAUSE_LEAST_S * 2 ** min(self.count - 1, 10)) if self.count > 1 else 0.0

    def lost(self, *, now_s: float) -> None:
        """Take note of a connection that was lost or could not be made."""
        if not self.count:
            self._since_s, self._waited_s = now_s, 0.0
        self.count += 1
        self._answers = 0

    def failing_s(self, *, now_s: float) -> float:
        """Return how long it has been failing; waiting for others on a connection that carries does not count."""
        return now_s - self._since_s - self._waited_s if self.count else 0.0

    def waited(self, seconds: float) -> None:
        """Take note of a wait for others, with nothing on its way either way."""
        self._waited_s += seconds

    def heard(self, message: Message) -> None:
        """Take note of what a message says of progress."""
        match message:
            case ForwardDone() | BackwardDone() | Kept() | WentBack() | Declined():
                self.answered()
            case Committed(step=step):
                self.reached("step", step)
            case RoundOpened(round_number=number):
                self.reached("round", number)
            case Merged(round_number=number):
                self.reached("merge", number)

    def reached(self, what: str, number: int) -> None:
        """Take note of a step, round or byte; of one below the furthest so far only that it comes again."""
        if number <= self._furthest.get(what, -1):
            return
        self._furthest[what] = number
        self._answers = self._most_answers = 0
        self.count = 0

    def answered(self) -> None:
        """Take note of an answer to a micro-batch."""
        self._answers += 1
        if self._answers > self._most_answers:
            self._most_answers = self._answers
            self.count = 0

    def goes_back(self) -> None:
        """Forget how far it was: steps are to be done again."""
        self._furthest.clear()
        self._answers = self._most_answers = 0
