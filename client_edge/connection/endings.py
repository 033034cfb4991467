"""How a wait ends other than with its answer: by an error, or because the run went on without this client."""

from splitfl.errors import PeerGone, Refused
from splitfl.protocol.messages import Merged, Message, Refusal, Shutdown, StepRefused, Why


class RoundClosed(Exception):  # noqa: N818  # no error: the round went on without this client's upload
    """The server closed the round while this client was still at work in it."""

    def __init__(self, merged: Merged) -> None:
        super().__init__(merged.reason)
        self.merged = merged


class StepClosed(Exception):  # noqa: N818  # no error: the step is given up, and the loop goes on
    """The server went on without this client's open step."""

    def __init__(self, refusal: StepRefused) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


class ServerStops(PeerGone):
    """The server is being stopped in order; it resumes when it is started again."""


class NoAnswer(PeerGone):
    """Nobody answered a Hello in time."""


class ComputeFailed(PeerGone):
    """The server lives and could not do what was asked for; it may be able to the next time."""


class SessionLost(PeerGone):
    """The server lives and knows nothing of this session any more."""


def check_goes_on(message: Message, address: str) -> None:
    """Raise what a refusal or a shutdown means; any other message passes."""
    match message:
        case Refusal(code=Why.NO_SESSION, reason=reason):
            raise SessionLost(reason)
        case Refusal(code=Why.FAILED, reason=reason):
            raise ComputeFailed(reason)
        case Refusal(code=code, reason=reason):
            raise Refused(f"{reason} ({code})", code=code)
        case Shutdown(resume_at=step):
            raise ServerStops(f"{address} is being stopped, and goes on at step {step} when it is back")
