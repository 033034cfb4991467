"""Where a client goes on: every way in which the two sides may have come apart, and the verdict on it."""

import pytest
from sample_messages import WIDTH, commit, forward, frames_of, layers, merged, opened, terms

from splitfl.protocol.messages import Backward, BackwardDone, Committed, ForwardDone, Ready, Resume, Resumed
from splitfl.session.client import ClientSession
from splitfl.session.server import Applied, Phase, ServerSession

ACTIVATIONS = frames_of(2, 3, WIDTH)


def session_after(steps: int) -> ServerSession:
    """A session in a round of four steps, so many of which are applied."""
    session = ServerSession(terms(micro_batches=1))
    session.receive(Ready(round_number=0, num_examples=5))
    session.opened(opened(num_steps=4))
    for step in range(1, steps + 1):
        ask(session, step)
        session.committed(reply(step))
    return session


def ask(session: ServerSession, step: int) -> None:
    session.receive(forward(step, step))
    session.answered(ForwardDone(request_id=step, hidden_BSD=ACTIVATIONS))
    session.receive(Backward(request_id=step, gradient_BSD=ACTIVATIONS))
    session.answered(BackwardDone(request_id=step, gradient_BSD=None, norms_Q=None))
    session.receive(commit(step))


def reply(step: int) -> Committed:
    return Committed(step=step, commit_number=step + 10, clip_coefficient=0.5, durable_step=step)


def claim(step: int = 0, *, number: int | None = None, held_round: int = 0, pending_step: int = 0) -> Resume:
    commit_number = number if number is not None else step + 10 if step else 0
    return Resume(held_round=held_round, step=step, commit_number=commit_number, pending_step=pending_step)


def resume(session: ServerSession, told: Resume, *, held_round: int = 0) -> Resumed:
    session.disconnected()
    return session.resume(told, held_round=held_round, layers=layers(), is_parting=False)


@pytest.mark.parametrize(
    ("told", "verdict"),
    [
        (claim(2), "go"),
        (claim(2, pending_step=3), "go"),  # asked for, not applied: it is computed again
        (claim(1, pending_step=2), "go"),  # applied, and not heard of
        (claim(1), "anew"),
        (claim(0), "anew"),
        (claim(0, pending_step=1), "anew"),
        (claim(3), "rewind"),
        (claim(2, number=99), "rewind"),
        (claim(2, held_round=1), "rewind"),
    ],
)
def test_verdicts(told: Resume, verdict: str) -> None:
    session = session_after(2)
    found = resume(session, told)
    assert found.verdict == verdict
    assert (found.step, found.commit_number, found.clip_coefficient) == (2, 12, 0.5)
    assert (found.round_number, found.next_step) == ((0, 0) if verdict == "anew" else (1, 3))
    assert bool(found.layers) == (verdict == "anew")
    assert session.phase is (Phase.IDLE if verdict == "anew" else Phase.TRAINING)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_was_under_way_is_forgotten_and_done_again(micro_batches: int) -> None:
    session = session_after(1)
    if micro_batches == 1:
        ask(session, 2)
        assert session.phase is Phase.COMMITTING
    else:
        session.receive(forward(5, 2))
    assert resume(session, claim(1, pending_step=2)).next_step == 2
    assert session.num_in_flight == 0
    ask(session, 2)  # request numbers begin anew with a connection
    session.committed(reply(2))
    assert session.applied == Applied(step=2, commit_number=12, clip_coefficient=0.5)


def test_a_commit_that_is_decided_while_the_client_is_away_counts() -> None:
    session = session_after(1)
    ask(session, 2)
    session.disconnected()
    session.committed(reply(2))
    found = session.resume(claim(1, pending_step=2), held_round=0, layers=(), is_parting=False)
    assert (found.verdict, found.step, found.next_step) == ("go", 2, 3)


def test_a_merge_that_was_missed_comes_along() -> None:
    session = session_after(4)
    session.disconnected()
    session.merged(merged())
    found = resume(session, claim(4), held_round=1)
    assert (found.verdict, found.held_round, found.round_number) == ("go", 1, 0)
    assert found.layers


def test_a_commit_that_is_repeated_on_its_way_changes_nothing() -> None:
    session = session_after(0)
    ask(session, 1)
    assert session.receive(commit(1)) is None
    session.committed(reply(1))
    again = session.receive(commit(1))
    assert getattr(again, "message", None) is session.last_commit


def test_a_client_goes_on_where_it_is_told() -> None:
    server, client = session_after(2), ClientSession(terms(micro_batches=1))
    told = client.resume(held_round=0, step=2, commit_number=12, pending_step=0)
    client.receive(resume(server, told))
    assert (client.next_step, client.open_round is not None) == (3, True)
    client.forward(step=3, micro_batch=0, hidden_BSD=ACTIVATIONS, lengths_B=(3, 2))


def test_a_session_from_a_log_is_the_one_it_was() -> None:
    was, now = session_after(2), ServerSession(terms(micro_batches=1))
    now.restore(applied=was.applied, round_=opened(num_steps=4), next_step=3, awaits_merge=False)
    for told in (claim(2), claim(1, pending_step=2), claim(1), claim(3)):
        one, other = resume(session_after(2), told), resume(now, told)
        assert (one.verdict, one.step, one.next_step) == (other.verdict, other.step, other.next_step)
        now.restore(applied=was.applied, round_=opened(num_steps=4), next_step=3, awaits_merge=False)
