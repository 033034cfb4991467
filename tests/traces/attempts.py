"""What a session would make of a message: tried on a copy, and what it refuses must change nothing."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from traces.clinic import ALWAYS, CALLS, IN_OWN_LOOPS, Clinic
from traces.sentences import sentence

from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol.messages import Message
from splitfl.session.server_session import Reply


def outcome(session: Any, message: Message) -> str:
    """Say what a session of either side would do with a message; the session itself does not see it."""
    tried = copy.deepcopy(session)
    before = state_of(tried)
    try:
        taken = tried.receive(message)
    except RemoteProtocolError as error:
        check_unchanged(before, state_of(tried))
        return f"refused: {error}"
    if isinstance(taken, Reply):
        return f"answered: {sentence(taken.message)}"
    return "ignored" if taken is None else "taken"


def calls(clinic: Clinic) -> Iterator[str]:
    """Say what a client may send now, and what it may not."""
    left_out = ALWAYS if clinic.has_own_loop else (*ALWAYS, *IN_OWN_LOOPS)
    for verb, call in CALLS.items():
        if verb in left_out:
            continue
        tried = copy.deepcopy(clinic)
        before = state_of(tried.session)
        try:
            yield f"{verb}: {sentence(call(tried, {}))}"
        except LocalProtocolError as error:
            check_unchanged(before, state_of(tried.session))
            yield f"{verb}: may not: {error}"


def state_of(session: Any) -> Mapping[str, str]:
    """Return all of a session's state in a form that compares, but for how often something was said for nothing."""
    state = {name: value for name, value in vars(session).items() if name != "_num_idle"}
    return {name: repr(sorted(value) if isinstance(value, set) else value) for name, value in state.items()}


def check_unchanged(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Raise unless both states are the same."""
    changed = [name for name in after if before[name] != after[name]]
    assert not changed, f"what is refused has changed {changed} of a session"
