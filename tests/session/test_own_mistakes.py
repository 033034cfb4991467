"""What a session says to our own mistakes, which no conversation of tests/traces makes."""

from collections.abc import Callable

import pytest
from sample_messages import opened, terms

from splitfl.errors import LocalProtocolError
from splitfl.protocol.messages import Committed, Ready
from splitfl.session.client_session import ClientSession
from splitfl.session.server_session import ServerSession

COMMITTED = Committed(step=1, commit_number=1, clip_coefficient=0.5, durable_step=1)


def ready() -> ServerSession:
    session = ServerSession(terms())
    session.receive(Ready(round_number=0, num_examples=5))
    return session


def training() -> ServerSession:
    session = ready()
    session.opened(opened())
    return session


@pytest.mark.parametrize(
    ("session", "act", "rule"),
    [
        (ServerSession(terms()), lambda session: session.opened(opened()), "a round opened for a client that is IDLE"),
        (ready(), lambda session: session.committed(COMMITTED), "a step was committed for a client that is READY"),
        (ready(), lambda session: session.step_closed(2, "late"), "a step was closed for a client that is READY"),
        (training(), lambda session: session.opened(opened()), "a round opened for a client that is TRAINING"),
        (training(), lambda session: session.rounds_ended(), "the rounds end for a client that is TRAINING"),
    ],
    ids=["opened", "committed", "closed", "opened again", "ended"],
)
def test_what_the_server_does_at_the_wrong_time_is_its_own_error(
    session: ServerSession, act: Callable[[ServerSession], object], rule: str
) -> None:
    before = repr(vars(session))
    with pytest.raises(LocalProtocolError, match=rule):
        act(session)
    assert repr(vars(session)) == before


def test_a_client_sits_out_no_round_but_an_open_one() -> None:
    with pytest.raises(LocalProtocolError, match="sitting out a round that is not open"):
        ClientSession(terms()).sit_out()
