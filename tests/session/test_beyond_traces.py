"""What a session holds to where no conversation of tests/traces leads: our own mistakes, and a wait nobody meets."""

from collections.abc import Callable

import pytest
from sample_messages import layers, opened, terms

from splitfl.errors import LocalProtocolError
from splitfl.protocol.messages import Committed, Ready, Resume
from splitfl.session.client_session import ClientSession
from splitfl.session.round_rules import OWN_ROUNDS
from splitfl.session.server_session import Applied, Phase, ServerSession

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


def test_one_whose_upload_waits_for_a_merge_of_uploads_as_they_come_waits_too() -> None:
    """The server hands out such a merge before it answers a `Resume`, so that nobody has met this yet."""
    session = ServerSession(terms(micro_batches=1, rounds=OWN_ROUNDS))
    applied = Applied(step=4, commit_number=14)
    session.restore(applied=applied, round_=opened(3, num_steps=4), next_step=5, awaits_merge=True)
    assert session.phase is Phase.MERGING
    claim = Resume(held_round=2, step=4, commit_number=14, pending_step=0)
    found = session.resume(claim, held_round=7, layers=layers(), is_parting=False)
    assert (found.verdict, found.held_round, found.awaits_merge, found.layers) == ("go", 2, True, ())
