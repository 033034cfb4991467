"""Where a client goes on: every way in which the two sides may have come apart, and the verdict on it."""

import pytest
from sample_messages import WIDTH, commit, forward, frames_of, layers, merged, opened, terms

from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Backward, BackwardDone, Committed, ForwardDone, Ready, Resume, Resumed, Upload
from splitfl.session.client_session import ClientSession
from splitfl.session.round_rules import OWN_ROUNDS
from splitfl.session.server_session import Applied, Phase, ServerSession

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
    server, client = session_after(2), ClientSession(terms(micro_batches=1, local_steps=4))
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


class TestRoundsOfItsOwn:
    """Where merges are made as uploads come in, a client may be at layers that are no longer the newest."""

    def in_turn(self, *, begun: int, steps: int = 1) -> ServerSession:
        """A session in a round of its own that began with the layers of a merge."""
        session = ServerSession(terms(micro_batches=1, rounds=OWN_ROUNDS))
        session.receive(Ready(round_number=begun, num_examples=5))
        session.opened(opened(begun + 1, first_step=1, num_steps=4))
        for step in range(1, steps + 1):
            ask(session, step)
            session.committed(reply(step))
        return session

    def test_it_goes_on_in_its_round_whatever_was_merged_meanwhile(self) -> None:
        found = resume(self.in_turn(begun=2), claim(1, held_round=2), held_round=7)
        assert (found.verdict, found.held_round, found.layers) == ("go", 2, ())
        assert (found.round_number, found.next_step) == (3, 2)

    def test_a_round_that_it_never_heard_of_is_over(self) -> None:
        session = self.in_turn(begun=2, steps=0)
        found = resume(session, claim(0, held_round=1), held_round=7)
        assert (found.verdict, found.held_round, found.round_number) == ("go", 7, 0)
        assert found.layers
        assert session.phase is Phase.IDLE

    def test_between_its_rounds_it_gets_the_layers_even_if_it_began_with_the_same(self) -> None:
        """It has trained on from them, and what it made of them is uploaded."""
        session = self.in_turn(begun=2)
        session.merged(merged(2))
        found = resume(session, claim(1, held_round=2), held_round=2)
        assert (found.verdict, found.held_round, found.round_number) == ("go", 2, 0)
        assert found.layers

    def test_one_that_has_not_begun_holds_the_first_layers(self) -> None:
        session = ServerSession(terms(rounds=OWN_ROUNDS))
        assert not resume(session, claim(0)).layers

    def test_one_whose_upload_waits_for_its_merge_waits_too(self) -> None:
        session = self.in_turn(begun=2, steps=4)
        session.receive(Upload(round_number=3, num_examples=5, num_tokens=5, layers=layers()))
        found = resume(session, claim(4, held_round=2), held_round=2)
        assert (found.verdict, found.awaits_merge, found.layers) == ("go", True, ())

    def test_one_that_lost_its_disk_leaves_its_round(self) -> None:
        session = self.in_turn(begun=2, steps=2)
        found = resume(session, claim(0, held_round=2), held_round=7)
        assert (found.verdict, found.held_round, found.round_number) == ("anew", 7, 0)
        assert found.layers

    @pytest.mark.parametrize(("number", "fits"), [(1, False), (2, True), (3, True), (9, True)])
    def test_its_round_ends_with_layers_no_older_than_those_it_began_with(self, number: int, fits: bool) -> None:
        client = ClientSession(terms(rounds=OWN_ROUNDS))
        client.round_number = 2
        client.ready(5)
        client.receive(opened(3))
        if fits:
            client.receive(merged(number))
            assert client.round_number == number
        else:
            with pytest.raises(RemoteProtocolError, match="layers of round 1, which is not open here"):
                client.receive(merged(number))
