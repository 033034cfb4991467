"""The client's side of a session: our bugs and the server's are told apart, and neither changes the state."""

from collections.abc import Callable
from typing import Any

import pytest
from sample_messages import WIDTH, frames_of, layers, merged, opened, terms

from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol.messages import (
    BackwardDone,
    Committed,
    Farewell,
    ForwardDone,
    Hello,
    Message,
    Pong,
    RoundsEnded,
    StepRefused,
    TensorFrames,
)
from splitfl.session.client_session import ClientSession

ACTIVATIONS = frames_of(2, 3, WIDTH)


def snapshot(session: ClientSession) -> dict[str, str]:
    """Return all of the state in a form that compares by content."""
    return {name: repr(sorted(v) if isinstance(v, set) else v) for name, v in vars(session).items()}


def sent(session: ClientSession, step: int, micro_batch: int = 0) -> int:
    message = session.forward(step=step, micro_batch=micro_batch, hidden_BSD=ACTIVATIONS, lengths_B=(3, 2))
    return message.request_id


def through(session: ClientSession, step: int, micro_batch: int) -> None:
    number = sent(session, step, micro_batch)
    session.receive(ForwardDone(request_id=number, hidden_BSD=ACTIVATIONS))
    session.backward(number, ACTIVATIONS)
    session.receive(BackwardDone(request_id=number, gradient_BSD=ACTIVATIONS, norms_Q=None))


def committed(step: int) -> Committed:
    return Committed(step=step, commit_number=step, clip_coefficient=1.0, durable_step=step)


def refused(step: int, next_step: int) -> StepRefused:
    return StepRefused(step=step, next_step=next_step, reason="late")


def ask_commit(session: ClientSession) -> object:
    return session.commit(num_label_tokens=7, loss=1.0, norms_P=frames_of(2))


def ask_merge(session: ClientSession) -> object:
    return session.upload(num_examples=5, num_tokens=60, layers=layers())


def idle() -> ClientSession:
    return ClientSession(terms())


def evaluating() -> ClientSession:
    session = idle()
    sent(session, 0)
    return session


def ready() -> ClientSession:
    session = idle()
    session.ready(5)
    return session


def training() -> ClientSession:
    session = ready()
    session.receive(opened())
    return session


def awaiting_forward() -> ClientSession:
    session = training()
    sent(session, 1)
    return session


def holding_activations() -> ClientSession:
    session = awaiting_forward()
    session.receive(ForwardDone(request_id=1, hidden_BSD=ACTIVATIONS))
    return session


def awaiting_backward() -> ClientSession:
    session = holding_activations()
    session.backward(1, ACTIVATIONS)
    return session


def through_all() -> ClientSession:
    session = training()
    through(session, 1, 0)
    through(session, 1, 1)
    return session


def committing() -> ClientSession:
    session = through_all()
    ask_commit(session)
    return session


def merging() -> ClientSession:
    session = committing()
    session.receive(committed(1))
    ask_merge(session)
    return session


def leaving() -> ClientSession:
    session = idle()
    session.goodbye({})
    return session


STATES: dict[str, Callable[[], ClientSession]] = {
    state.__name__: state
    for state in (
        idle,
        evaluating,
        ready,
        training,
        awaiting_forward,
        holding_activations,
        awaiting_backward,
        through_all,
        committing,
        merging,
        leaving,
    )
}
IN_ROUND = {"training", "awaiting_forward", "holding_activations", "awaiting_backward", "through_all", "committing"}

MESSAGES: dict[str, Message] = {
    "ForwardDone": ForwardDone(request_id=1, hidden_BSD=ACTIVATIONS),
    "ForwardDone, unknown": ForwardDone(request_id=9, hidden_BSD=ACTIVATIONS),
    "BackwardDone": BackwardDone(request_id=1, gradient_BSD=ACTIVATIONS, norms_Q=None),
    "BackwardDone, no gradient": BackwardDone(request_id=1, gradient_BSD=None, norms_Q=None),
    "BackwardDone, unknown": BackwardDone(request_id=9, gradient_BSD=ACTIVATIONS, norms_Q=None),
    "Committed": committed(1),
    "Committed, another": committed(2),
    "StepRefused": refused(1, 2),
    "StepRefused, ahead": refused(2, 3),
    "StepRefused, back": refused(1, 1),
    "RoundOpened": opened(),
    "Merged": merged(),
    "Merged, another round": merged(2),
    "RoundsEnded": RoundsEnded(round_number=4, best_round=2, reason="", layers=layers()),
    "Farewell": Farewell(),
    "Hello": Hello(wire_version=1, software="x", client_id="a"),
    "Pong": Pong(number=1, waiting_for="", bytes_sent=0, bytes_received=0),
}
BACKWARDS = {"BackwardDone", "BackwardDone, no gradient"}
LEGAL: dict[str, set[str]] = {
    "evaluating": {"ForwardDone"},
    "ready": {"RoundOpened", "RoundsEnded"},
    "awaiting_forward": {"ForwardDone"},
    "awaiting_backward": BACKWARDS,
    "committing": {"Committed"},
    "leaving": {"Farewell"},
    "merging": {"Merged"},
}

SENDS: dict[str, Callable[[ClientSession], object]] = {
    "forward": lambda session: sent(session, 1),
    "forward of a later step": lambda session: sent(session, 2),
    "evaluation": lambda session: sent(session, 0),
    "backward": lambda session: session.backward(1, ACTIVATIONS),
    "commit": ask_commit,
    "upload": ask_merge,
    "sit out": lambda session: session.sit_out(),
    "ready": lambda session: session.ready(5),
    "goodbye": lambda session: session.goodbye({}),
}
ALLOWED: dict[str, set[str]] = {
    "idle": {"evaluation", "ready", "goodbye"},
    "evaluating": {"evaluation"},
    "training": {"forward", "commit", "upload", "sit out"},
    "awaiting_forward": {"forward"},
    "holding_activations": {"forward", "backward"},
    "awaiting_backward": {"forward"},
    "through_all": {"forward", "commit", "upload", "sit out"},
}


class TestPhases:
    def test_a_legal_run(self) -> None:
        session = idle()
        number = sent(session, 0)
        assert session.receive(ForwardDone(request_id=number, hidden_BSD=ACTIVATIONS)) is not None
        assert session.ready(5).round_number == 0
        session.receive(opened(num_steps=2))
        for step in (1, 2):
            assert session.next_step == step
            through(session, step, 0)
            through(session, step, 1)
            ask_commit(session)
            session.receive(committed(step))
        ask_merge(session)
        session.receive(merged())
        assert (session.round_number, session.open_round) == (1, None)
        assert session.ready(5).round_number == 1
        session.receive(opened(round_number=2, first_step=3, num_steps=0))
        session.sit_out()
        session.receive(merged(2))
        session.goodbye({"x": 1.0})
        assert session.receive(Farewell()) is not None

    @pytest.mark.parametrize("state", STATES)
    @pytest.mark.parametrize("name", MESSAGES)
    def test_an_answer_nobody_asked_for(self, state: str, name: str) -> None:
        session = STATES[state]()
        legal = LEGAL.get(state, set()) | ({"StepRefused", "Merged"} if state in IN_ROUND else set())
        before = snapshot(session)
        if name in legal:
            assert session.receive(MESSAGES[name]) is MESSAGES[name]
            return
        if (name, state) == ("Committed", "merging"):  # answered once more, because the question was repeated
            assert session.receive(MESSAGES[name]) is None
            return
        with pytest.raises(RemoteProtocolError):
            session.receive(MESSAGES[name])
        assert snapshot(session) == before

    @pytest.mark.parametrize("state", STATES)
    @pytest.mark.parametrize("name", SENDS)
    def test_what_we_may_not_send(self, state: str, name: str) -> None:
        session = STATES[state]()
        before = snapshot(session)
        if name in ALLOWED.get(state, set()):
            SENDS[name](session)
            assert snapshot(session) != before
            return
        with pytest.raises(LocalProtocolError):
            SENDS[name](session)
        assert snapshot(session) == before

    def test_credit_ends_at_what_was_agreed(self) -> None:
        session = training()
        credit = []
        for number in (0, 1):
            sent(session, 1, number)
            credit.append(session.has_credit)
        assert credit == [True, False]
        with pytest.raises(LocalProtocolError, match="max_in_flight = 2"):
            sent(session, 1, 2)

    def test_request_numbers_rise_over_the_session(self) -> None:
        session = training()
        first = sent(session, 1)
        session.abandon_step(2)
        assert sent(session, 2) == first + 1


class TestTensors:
    @pytest.mark.parametrize("tensor", [frames_of(2, 4, WIDTH), frames_of(2, 3, WIDTH, dtype="bf16"), frames_of(3)])
    def test_an_answer_unlike_the_question(self, tensor: TensorFrames) -> None:
        for session, message in (
            (awaiting_forward(), ForwardDone(request_id=1, hidden_BSD=tensor)),
            (awaiting_backward(), BackwardDone(request_id=1, gradient_BSD=tensor, norms_Q=None)),
        ):
            before = snapshot(session)
            with pytest.raises(RemoteProtocolError):
                session.receive(message)
            assert snapshot(session) == before

    @pytest.mark.parametrize("wrong", [layers()[:1], layers()[::-1], (frames_of(1), *layers())])
    def test_layers_that_are_not_ours(self, wrong: Any) -> None:
        ended = RoundsEnded(round_number=4, best_round=2, reason="", layers=wrong)
        for session, message in (
            (ready(), opened(layers=wrong)),
            (merging(), merged(layers=wrong)),
            (ready(), ended),
        ):
            before = snapshot(session)
            with pytest.raises(RemoteProtocolError, match="layers whose shapes"):
                session.receive(message)
            assert snapshot(session) == before

    @pytest.mark.parametrize("has_controls", [True, False])
    def test_controls_after_the_layers_are_the_runs(self, has_controls: bool) -> None:
        def ready() -> ClientSession:
            session = ClientSession(terms(has_controls=has_controls))
            session.ready(5)
            return session

        controls = layers()
        wrong: list[tuple[TensorFrames, ...]] = [controls[:1], controls[::-1], (*controls, frames_of(1))]
        wrong += [() if has_controls else controls, (frames_of(2, 3, dtype="bf16"), frames_of(5))]
        for others in wrong:
            with pytest.raises(RemoteProtocolError, match=f"{len(others)} controls after the layers"):
                ready().receive(opened(layers=(*layers(), *others)))
        assert ready().receive(opened(layers=(*layers(), *(controls if has_controls else ())))) is not None

    def test_a_round_may_open_with_newer_layers_or_none(self) -> None:
        for sent_layers in ((), layers()):
            session = ready()
            assert session.receive(opened(layers=sent_layers)) is not None

    def test_without_backward_activations_are_the_last_answer(self) -> None:
        session = ClientSession(terms(needs_backward=False))
        session.ready(5)
        session.receive(opened())
        number = sent(session, 1)
        session.receive(ForwardDone(request_id=number, hidden_BSD=ACTIVATIONS))
        with pytest.raises(LocalProtocolError, match="no activations to answer"):
            session.backward(number, ACTIVATIONS)
        assert session.has_credit


class TestStepRefused:
    @pytest.mark.parametrize("state", sorted(IN_ROUND))
    def test_the_client_goes_on(self, state: str) -> None:
        session = STATES[state]()
        session.receive(refused(1, 2))
        session.abandon_step(2)
        through(session, 2, 0)
        through(session, 2, 1)
        ask_commit(session)
        assert session.receive(committed(2)) is not None

    def test_answers_for_it_are_ignored_when_they_come(self) -> None:
        for session, late in (
            (awaiting_forward(), ForwardDone(request_id=1, hidden_BSD=ACTIVATIONS)),
            (awaiting_backward(), BackwardDone(request_id=1, gradient_BSD=None, norms_Q=None)),
        ):
            session.receive(refused(1, 2))
            session.abandon_step(2)
            assert session.receive(late) is None
            with pytest.raises(RemoteProtocolError, match="was not asked for"):
                session.receive(late)

    def test_a_refusal_that_comes_twice_closes_one_step_only(self) -> None:
        session = committing()
        session.receive(refused(1, 2))
        session.abandon_step(2)
        sent(session, 2)
        before = snapshot(session)
        assert session.receive(refused(1, 2)) is None
        assert snapshot(session) == before

    def test_nor_does_it_end_the_session_when_that_step_was_the_rounds_last(self) -> None:
        session = ready()
        session.receive(opened(num_steps=1))
        through(session, 1, 0)
        through(session, 1, 1)
        ask_commit(session)
        session.receive(refused(1, 2))
        session.abandon_step(2)
        ask_merge(session)
        before = snapshot(session)
        assert session.receive(refused(1, 2)) is None
        assert snapshot(session) == before

    def test_the_round_may_close_meanwhile(self) -> None:
        session = awaiting_backward()
        assert session.receive(merged(accepted=False, reason="round_timeout")) is not None
        assert session.receive(BackwardDone(request_id=1, gradient_BSD=None, norms_Q=None)) is None
        session.ready(5)


def test_when_the_rounds_have_ended_a_client_evaluates_and_says_goodbye() -> None:
    session = ready()
    assert session.receive(MESSAGES["RoundsEnded"]) is not None
    assert (session.round_number, session.open_round) == (4, None)
    number = sent(session, 0)
    session.receive(ForwardDone(request_id=number, hidden_BSD=ACTIVATIONS))
    session.goodbye({})
