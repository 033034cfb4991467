"""Sessions without rounds: what a user's own loop may say, that the rest changes nothing, and that both sides fit."""

from typing import Any

import pytest
from sample_messages import WIDTH, commit, forward, frames_of, terms

from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol.messages import (
    Backward,
    BackwardDone,
    Committed,
    Declined,
    Discard,
    ForwardDone,
    GoBack,
    Keep,
    Kept,
    Message,
    Ready,
    Resume,
    StepRefused,
    WentBack,
)
from splitfl.session.own_loop import OwnLoopClientSession, OwnLoopServerSession
from splitfl.session.server_session import Applied, Phase, Reply

ACTIVATIONS = frames_of(2, 3, WIDTH)
NORMS = frames_of(0)
TERMS = terms(micro_batches=0, num_trainable=0, layer_shapes=(), layer_dtypes=())


def snapshot(session: Any) -> dict[str, str]:
    return {name: repr(sorted(v) if isinstance(v, set) else v) for name, v in vars(session).items()}


def asked(step: int, **changed: Any) -> Message:
    return commit(step, **{"norms_P": NORMS, "learning_rate": 0.1, "clip_coefficient": 0.5, **changed})


def forwarded(session: OwnLoopServerSession, request_id: int, step: int, micro_batch: int = 0) -> None:
    assert session.receive(forward(request_id, step, micro_batch)) is not None
    assert session.answered(ForwardDone(request_id=request_id, hidden_BSD=ACTIVATIONS))


def through(session: OwnLoopServerSession, request_id: int, step: int, micro_batch: int = 0) -> None:
    forwarded(session, request_id, step, micro_batch)
    assert session.receive(Backward(request_id=request_id, gradient_BSD=ACTIVATIONS)) is not None
    assert session.answered(BackwardDone(request_id=request_id, gradient_BSD=ACTIVATIONS, norms_Q=NORMS))


def committed(session: OwnLoopServerSession, step: int, number: int) -> None:
    assert session.receive(asked(step)) is not None
    session.committed(Committed(step=step, commit_number=number, clip_coefficient=0.5, durable_step=step))


def resume(step: int, commit_number: int, pending_step: int = 0) -> Resume:
    return Resume(held_round=0, step=step, commit_number=commit_number, pending_step=pending_step)


class TestServer:
    def test_a_step_has_any_number_of_micro_batches_and_evaluations_between(self) -> None:
        session = OwnLoopServerSession(TERMS)
        for number in range(5):
            through(session, 2 * number + 1, 1, number)
            forwarded(session, 2 * number + 2, 0)
        committed(session, 1, 7)
        assert (session.applied.step, session.next_step, session.is_in_step) == (1, 2, False)
        through(session, 20, 2)

    def test_a_discarded_steps_number_is_not_used_again(self) -> None:
        session = OwnLoopServerSession(TERMS)
        through(session, 1, 1)
        assert session.receive(Discard(step=1)) is not None
        assert not session.is_in_step
        through(session, 2, 2)
        committed(session, 2, 1)

    def test_graphs_without_a_gradient_go_with_the_commit(self) -> None:
        session = OwnLoopServerSession(TERMS)
        through(session, 1, 1)
        forwarded(session, 2, 1, 1)
        committed(session, 1, 1)
        assert session.num_in_flight == 0

    def test_a_repeated_commit_gets_its_answer_again(self) -> None:
        session = OwnLoopServerSession(TERMS)
        through(session, 1, 1)
        committed(session, 1, 1)
        assert isinstance(session.receive(asked(1)), Reply)

    @pytest.mark.parametrize(
        ("message", "rule"),
        [
            (asked(1), "without a gradient"),
            (asked(2), "leaves a gap"),
            (Discard(step=1), "which is not open"),
            (forward(1, 1, 1), "micro-batch 1 where 0 is next"),
            (Ready(round_number=0, num_examples=1), "Ready while TRAINING"),
        ],
    )
    def test_what_is_illegal_at_first(self, message: Message, rule: str) -> None:
        self.refuses(OwnLoopServerSession(TERMS), message, rule)

    @pytest.mark.parametrize(
        ("message", "rule"),
        [
            (asked(1, learning_rate=float("nan")), "a learning rate or clip coefficient"),
            (asked(1, clip_coefficient=-1.0), "a learning rate or clip coefficient"),
            (asked(1, norms_P=frames_of(1)), "norms of shape"),
            (GoBack(commit_number=0), "GoBack in the middle of step 1"),
            (forward(2, 2), "Forward for step 2 where step 1 is next"),
            (forward(2, 1, 0), "micro-batch 0 where 1 is next"),
        ],
    )
    def test_what_is_illegal_in_a_step(self, message: Message, rule: str) -> None:
        session = OwnLoopServerSession(TERMS)
        through(session, 1, 1)
        self.refuses(session, message, rule)

    def test_nothing_may_be_asked_while_a_commit_waits(self) -> None:
        session = OwnLoopServerSession(TERMS)
        through(session, 1, 1)
        assert session.receive(asked(1)) is not None
        for message in (Keep(), GoBack(commit_number=0), Discard(step=1), forward(2, 2)):
            self.refuses(session, message, "COMMITTING|not open")

    def refuses(self, session: OwnLoopServerSession, message: Message, rule: str) -> None:
        before = snapshot(session)
        with pytest.raises(RemoteProtocolError, match=rule):
            session.receive(message)
        assert snapshot(session) == before

    def test_a_closed_steps_messages_are_ignored(self) -> None:
        session = OwnLoopServerSession(TERMS)
        forwarded(session, 1, 1)
        session.step_closed(2, "took too long")
        assert session.receive(Backward(request_id=1, gradient_BSD=ACTIVATIONS)) is None
        assert isinstance(session.receive(asked(1)), Reply)
        assert session.receive(Discard(step=1)) is None
        through(session, 2, 2)

    @pytest.mark.parametrize(
        ("claim", "verdict"),
        [
            (resume(0, 0), "go"),  # a program that was started anew
            (resume(3, 9), "go"),
            (resume(2, 8, pending_step=3), "go"),
            (resume(2, 8), "anew"),
            (resume(4, 10), "rewind"),
            (resume(3, 8), "rewind"),
        ],
    )
    def test_where_it_goes_on(self, claim: Resume, verdict: str) -> None:
        session = OwnLoopServerSession(TERMS)
        session.restore(
            applied=Applied(step=3, commit_number=9), round_=None, next_step=5, awaits_merge=False
        )  # step 4 was closed
        resumed = session.resume(claim, held_round=0, layers=(), is_parting=False)
        assert (resumed.verdict, resumed.step, resumed.commit_number) == (verdict, 3, 9)
        assert verdict != "go" or resumed.next_step == 5
        assert session.phase is Phase.TRAINING

    def test_a_lost_connection_takes_the_open_step_with_it(self) -> None:
        session = OwnLoopServerSession(TERMS)
        through(session, 1, 1)
        assert session.receive(asked(1)) is not None
        session.disconnected()
        assert (session.phase, session.is_in_step) == (Phase.TRAINING, False)
        through(session, 1, 1)


class TestClient:
    def forward(self, session: OwnLoopClientSession, step: int, micro_batch: int = 0) -> int:
        rows = {"lengths_B": (3, 2), "left_padded": True, "adapters_off": False}
        message = session.forward_in_loop(step=step, micro_batch=micro_batch, hidden_BSD=ACTIVATIONS, **rows)
        return message.request_id

    def answered(self, session: OwnLoopClientSession, request_id: int) -> None:
        assert session.receive(ForwardDone(request_id=request_id, hidden_BSD=ACTIVATIONS)) is not None

    def through(self, session: OwnLoopClientSession, step: int, micro_batch: int = 0) -> None:
        request_id = self.forward(session, step, micro_batch)
        self.answered(session, request_id)
        session.backward(request_id, ACTIVATIONS)
        done = BackwardDone(request_id=request_id, gradient_BSD=ACTIVATIONS, norms_Q=NORMS)
        assert session.receive(done) is not None

    def test_a_step(self) -> None:
        session = OwnLoopClientSession(TERMS)
        self.through(session, 1)
        self.through(session, 1, 1)
        message = session.commit_in_loop(step=1, norms_P=NORMS, learning_rate=0.1, clip_coefficient=0.5)
        assert (message.learning_rate, message.clip_coefficient, message.loss) == (0.1, 0.5, 0.0)
        assert session.receive(Committed(step=1, commit_number=1, clip_coefficient=0.5, durable_step=1)) is not None
        assert session.next_step == 2

    def test_asks_one_thing_at_a_time(self) -> None:
        session = OwnLoopClientSession(TERMS)
        self.forward(session, 1)
        with pytest.raises(LocalProtocolError, match="while something else is under way"):
            self.forward(session, 1, 1)
        with pytest.raises(LocalProtocolError, match="while something else is under way"):
            session.commit_in_loop(step=1, norms_P=NORMS, learning_rate=0.1, clip_coefficient=1.0)

    def test_losses_that_wait_use_credit_up_and_a_discard_gives_it_back(self) -> None:
        session = OwnLoopClientSession(TERMS)
        for number in range(2):
            self.answered(session, self.forward(session, 1, number))
        assert not session.has_credit
        assert session.discard(1).step == 1
        assert session.has_credit

    def test_an_evaluations_answer_is_still_waited_for_when_the_step_is_refused(self) -> None:
        session = OwnLoopClientSession(TERMS)
        self.through(session, 1)
        evaluation = self.forward(session, 0)
        refusal = StepRefused(step=1, next_step=2, reason="took too long")
        assert session.receive(refusal) is refusal
        session.abandon_step(2)
        self.answered(session, evaluation)
        self.through(session, 2)

    def test_a_refusal_of_a_step_that_was_given_up_is_ignored(self) -> None:
        session = OwnLoopClientSession(TERMS)
        self.through(session, 1)
        session.discard(1)
        assert session.receive(StepRefused(step=1, next_step=2, reason="took too long")) is None

    def test_snapshots(self) -> None:
        session = OwnLoopClientSession(TERMS)
        with pytest.raises(RemoteProtocolError, match="Kept was not asked for"):
            session.receive(Kept(commit_number=1))
        session.keep()
        assert session.receive(Kept(commit_number=1)) is not None
        session.go_back(1)
        assert session.receive(WentBack(commit_number=1, step=1)) is not None
        session.go_back(1)
        assert session.receive(Declined(request_id=0, reason="no")) is not None
        with pytest.raises(RemoteProtocolError, match="Declined"):
            session.receive(Declined(request_id=0, reason="no"))
