"""The server's side of a session: what is legal when, that the rest changes nothing, and that a step counts once."""

from collections.abc import Callable
from typing import Any

import pytest
from sample_messages import WIDTH, commit, forward, frames_of, layers, merged, opened, terms

from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol.codec import MAX_HEADER_BYTES, encode
from splitfl.protocol.messages import (
    Attach,
    Backward,
    BackwardDone,
    Committed,
    Decode,
    EndCache,
    Farewell,
    Forward,
    ForwardDone,
    Goodbye,
    Hello,
    Leave,
    Message,
    Ping,
    Ready,
    Report,
    StepRefused,
    Upload,
)
from splitfl.session.server_session import Phase, Reply, ServerSession
from splitfl.session.terms import MAX_PACKED_EXAMPLES

ACTIVATIONS = frames_of(2, 3, WIDTH)


def snapshot(session: ServerSession) -> dict[str, str]:
    """Return all of the state in a form that compares by content, but for how often something was said for nothing."""
    state = {name: value for name, value in vars(session).items() if name != "_num_idle"}
    return {name: repr(sorted(v) if isinstance(v, set) else v) for name, v in state.items()}


def backward(request_id: int, **changed: Any) -> Backward:
    return Backward(request_id=request_id, **{"gradient_BSD": ACTIVATIONS, **changed})


def upload(round_number: int = 1, **changed: Any) -> Upload:
    usual: dict[str, Any] = {"num_examples": 5, "num_tokens": 60, "layers": layers()}
    return Upload(round_number=round_number, **{**usual, **changed})


def decode(request_id: int, **changed: Any) -> Decode:
    usual: dict[str, Any] = {"cache_id": 1, "hidden_BSD": ACTIVATIONS, "lengths_B": (3, 0), "beams_B": ()}
    return Decode(request_id=request_id, adapters_off=False, **{**usual, **changed})


def forwarded(session: ServerSession, request_id: int, step: int, micro_batch: int) -> None:
    assert session.receive(forward(request_id, step, micro_batch)) is not None
    assert session.answered(ForwardDone(request_id=request_id, hidden_BSD=ACTIVATIONS))


def through(session: ServerSession, request_id: int, step: int, micro_batch: int) -> None:
    """Take a micro-batch both ways."""
    forwarded(session, request_id, step, micro_batch)
    assert session.receive(backward(request_id)) is not None
    assert session.answered(BackwardDone(request_id=request_id, gradient_BSD=None, norms_Q=None))


def idle() -> ServerSession:
    return ServerSession(terms())


def ready() -> ServerSession:
    session = idle()
    session.receive(Ready(round_number=0, num_examples=5))
    return session


def training() -> ServerSession:
    session = ready()
    session.opened(opened())
    return session


def computing() -> ServerSession:
    """A forward is with the worker."""
    session = training()
    session.receive(forward(1, 1, 0))
    return session


def awaiting_backward() -> ServerSession:
    session = training()
    forwarded(session, 1, 1, 0)
    return session


def computing_backward() -> ServerSession:
    session = awaiting_backward()
    session.receive(backward(1))
    return session


def through_one() -> ServerSession:
    session = training()
    through(session, 1, 1, 0)
    return session


def through_all() -> ServerSession:
    session = through_one()
    through(session, 2, 1, 1)
    return session


def committing() -> ServerSession:
    session = through_all()
    session.receive(commit(1))
    return session


def all_steps_done() -> ServerSession:
    session = ready()
    session.opened(opened(num_steps=1))
    through(session, 1, 1, 0)
    through(session, 2, 1, 1)
    session.receive(commit(1))
    session.committed(acknowledged(1))
    return session


def merging() -> ServerSession:
    session = all_steps_done()
    session.receive(upload())
    return session


def sitting_out() -> ServerSession:
    session = ready()
    session.opened(opened(num_steps=0))
    return session


def gone() -> ServerSession:
    session = idle()
    session.receive(Goodbye(metrics={}))
    return session


def acknowledged(step: int) -> Committed:
    return Committed(step=step, commit_number=step, clip_coefficient=0.5, durable_step=step)


STATES: dict[str, Callable[[], ServerSession]] = {
    state.__name__: state
    for state in (
        idle,
        ready,
        training,
        computing,
        awaiting_backward,
        computing_backward,
        through_one,
        through_all,
        committing,
        all_steps_done,
        merging,
        sitting_out,
        gone,
    )
}

MESSAGES: dict[str, Message] = {
    "Ready": Ready(round_number=0, num_examples=5),
    "Forward": forward(3, 1, 0),
    "Forward, next": forward(3, 1, 1),
    "Forward, evaluation": forward(3, 0),
    "Backward": backward(1),
    "Commit": commit(1),
    "Upload": upload(),
    "Goodbye": Goodbye(metrics={}),
    "Decode": decode(3),
    # from another connection, or the server's own
    "Hello": Hello(wire_version=1, software="x", client_id="a"),
    "Attach": Attach(session="x"),
    "Ping": Ping(number=1),
    "Leave": Leave(reason="x", comes_back=False),
    "ForwardDone": ForwardDone(request_id=1, hidden_BSD=ACTIVATIONS),
    "Farewell": Farewell(),
}

LEGAL: dict[str, set[str]] = {
    "idle": {"Decode", "Ready", "Forward, evaluation", "Goodbye", "Upload"},  # an upload after its round is ignored
    "ready": {"Decode"},
    "training": {"Decode", "Forward"},
    "computing": {"Decode", "Forward, next"},
    "awaiting_backward": {"Decode", "Forward, next", "Backward"},
    "computing_backward": {"Decode", "Forward, next"},
    "through_one": {"Decode", "Forward, next"},
    "through_all": {"Decode", "Commit"},
    "committing": {"Commit"},  # repeated on its way, and ignored
    "all_steps_done": {"Decode", "Upload", "Commit"},  # a repeated commit gets the recorded answer
    "merging": {"Commit"},
    "sitting_out": set(),
    "gone": {"Goodbye"},  # whoever has not heard the farewell says it again
}


class TestDecode:
    def test_one_after_the_other(self) -> None:
        session = idle()
        assert session.receive(decode(1)) is not None
        with pytest.raises(RemoteProtocolError, match="before 1 is answered"):
            session.receive(decode(2))
        session.decoded()
        with pytest.raises(RemoteProtocolError, match="numbers must rise"):
            session.receive(decode(1))
        assert session.receive(decode(2)) is not None
        session.disconnected()
        assert session.receive(decode(1)) is not None

    @pytest.mark.parametrize(
        "wrong",
        [
            {"lengths_B": (3,)},
            {"lengths_B": (3, 4)},
            {"lengths_B": (3, -1)},
            {"hidden_BSD": frames_of(2, 3, WIDTH + 1)},
            {"hidden_BSD": frames_of(2, 0, WIDTH), "lengths_B": (0, 0)},
            {"hidden_BSD": frames_of(1, 1000, WIDTH), "lengths_B": (1000,)},
        ],
    )
    def test_what_does_not_fit_changes_nothing(self, wrong: dict[str, Any]) -> None:
        session = idle()
        before = snapshot(session)
        with pytest.raises(RemoteProtocolError):
            session.receive(decode(1, **wrong))
        assert snapshot(session) == before


class TestPhases:
    def test_a_legal_run(self) -> None:
        session = idle()
        through_evaluation(session, 1)
        session.receive(Ready(round_number=0, num_examples=5))
        assert session.phase is Phase.READY
        session.opened(opened(num_steps=2))
        for step, first_request in ((1, 2), (2, 4)):
            through(session, first_request, step, 0)
            through(session, first_request + 1, step, 1)
            assert isinstance(session.receive(commit(step)), type(commit(step)))
            session.committed(acknowledged(step))
        assert (session.next_step, session.phase) == (3, Phase.TRAINING)
        assert session.receive(upload()) is not None
        session.merged(merged())
        assert (session.phase, session.round_number) == (Phase.IDLE, 1)
        through_evaluation(session, 6)
        assert session.receive(Goodbye(metrics={"num_examples": 1.0})) is not None
        assert (session.phase, session.num_in_flight) == (Phase.GONE, 0)

    @pytest.mark.parametrize("state", STATES)
    @pytest.mark.parametrize("name", MESSAGES)
    def test_what_is_illegal_raises_and_changes_nothing(self, state: str, name: str) -> None:
        session = STATES[state]()
        before = snapshot(session)
        if name in LEGAL[state]:
            session.receive(MESSAGES[name])
            return
        with pytest.raises(RemoteProtocolError):
            session.receive(MESSAGES[name])
        assert snapshot(session) == before

    @pytest.mark.parametrize("state", STATES)
    def test_a_report_is_taken_whenever_the_client_is_here(self, state: str) -> None:
        session = STATES[state]()
        before = snapshot(session)
        report = Report(topic="loaded", phase="round", round_number=1, metrics={}, digest="0" * 64)
        if state == "gone":
            with pytest.raises(RemoteProtocolError, match="gone"):
                session.receive(report)
        else:
            assert session.receive(report) is report
        assert snapshot(session) | {"_num_reports": "0"} == before

    def test_reports_without_end_are_refused(self) -> None:
        session = STATES["ready"]()
        report = Report(topic="loaded", phase="round", round_number=1, metrics={}, digest="0" * 64)
        for _ in range(64):
            session.receive(report)
        with pytest.raises(RemoteProtocolError, match="more than 64 reports in one round"):
            session.receive(report)

    def test_packed_rows_are_refused_where_the_run_has_none(self) -> None:
        session = STATES["training"]()
        before = snapshot(session)
        with pytest.raises(RemoteProtocolError, match="packed from several examples, which this run does not take"):
            session.receive(forward(1, 1, example_lengths=(2, 1, 2)))
        assert snapshot(session) == before

    @pytest.mark.parametrize("claimed", [11, 2**62])
    def test_nobody_claims_more_labels_than_it_sent_tokens(self, claimed: int) -> None:
        session = STATES["through_all"]()
        before = snapshot(session)
        with pytest.raises(RemoteProtocolError, match=f"{claimed} label tokens in a step of 10 tokens"):
            session.receive(commit(1, num_label_tokens=claimed))
        assert snapshot(session) == before
        session.receive(commit(1, num_label_tokens=10))

    def test_the_error_names_message_and_phase(self) -> None:
        with pytest.raises(RemoteProtocolError, match="Ready while COMMITTING"):
            committing().receive(Ready(round_number=0, num_examples=5))

    def test_what_the_server_does_at_the_wrong_time_is_its_own_error(self) -> None:
        session = idle()
        before = snapshot(session)
        with pytest.raises(LocalProtocolError, match="a round opened for a client that is IDLE"):
            session.opened(opened())
        with pytest.raises(LocalProtocolError, match="a step was committed for a client that is IDLE"):
            session.committed(acknowledged(1))
        with pytest.raises(LocalProtocolError, match="a step was closed for a client that is IDLE"):
            session.step_closed(2, "late")
        assert snapshot(session) == before


def through_evaluation(session: ServerSession, request_id: int) -> None:
    assert session.receive(forward(request_id, 0)) is not None
    assert session.answered(ForwardDone(request_id=request_id, hidden_BSD=ACTIVATIONS))
    assert session.num_in_flight == 0


BAD_FORWARDS: dict[str, tuple[Forward, str]] = {
    "number used before": (forward(1, 1, 1), "numbers must rise"),
    "step ahead": (forward(3, 2, 1), "step 2 where step 1 is next"),
    "step of the past": (forward(3, 0, 1), "Forward while TRAINING"),
    "micro-batch left out": (forward(3, 1, 2), "micro-batch 2 where 1 of 2 is next"),
    "micro-batch again": (forward(3, 1, 0), "micro-batch 0 where 1 of 2 is next"),
    "too many rows": (forward(3, 1, 1, hidden_BSD=frames_of(3, 3, WIDTH), lengths_B=(3, 3, 3)), "batch of 3 rows"),
    "no rows": (forward(3, 1, 1, hidden_BSD=frames_of(0, 3, WIDTH), lengths_B=()), "batch of 0 rows"),
    "too long": (forward(3, 1, 1, hidden_BSD=frames_of(2, 7, WIDTH)), "rows of 7 tokens"),
    "no tokens": (forward(3, 1, 1, hidden_BSD=frames_of(2, 0, WIDTH)), "rows of 0 tokens"),
    "too wide": (forward(3, 1, 1, hidden_BSD=frames_of(2, 3, 5)), r"this run has \(batch, length, 4\) and f32"),
    "another type": (forward(3, 1, 1, hidden_BSD=frames_of(2, 3, WIDTH, dtype="bf16")), "and type bf16"),
    "flat": (forward(3, 1, 1, hidden_BSD=frames_of(6, WIDTH)), "activations of shape"),
    "a length missing": (forward(3, 1, 1, lengths_B=(3,)), "give each of 2 rows a length from 1 to 3"),
    "a length of zero": (forward(3, 1, 1, lengths_B=(3, 0)), "give each of 2 rows a length from 1 to 3"),
    "a length beyond the row": (forward(3, 1, 1, lengths_B=(3, 4)), "give each of 2 rows a length from 1 to 3"),
}


class TestMicroBatches:
    @pytest.mark.parametrize("case", BAD_FORWARDS)
    def test_a_forward_outside_the_terms(self, case: str) -> None:
        session = through_one()
        before = snapshot(session)
        message, rule = BAD_FORWARDS[case]
        with pytest.raises(RemoteProtocolError, match=rule):
            session.receive(message)
        assert snapshot(session) == before

    def test_a_third_micro_batch_of_two(self) -> None:
        session = through_all()
        with pytest.raises(RemoteProtocolError, match="micro-batch 2 where 2 of 2"):
            session.receive(forward(3, 1, 2))

    def test_no_more_under_way_than_agreed(self) -> None:
        session = ServerSession(terms(max_in_flight=1))
        session.receive(forward(1, 0))
        before = snapshot(session)
        with pytest.raises(RemoteProtocolError, match="max_in_flight = 1"):
            session.receive(forward(2, 0))
        assert snapshot(session) == before
        session.answered(ForwardDone(request_id=1, hidden_BSD=ACTIVATIONS))
        assert session.receive(forward(2, 0)) is not None

    def test_a_graph_is_under_way_until_its_backward_is_done(self) -> None:
        session = awaiting_backward()
        assert session.num_in_flight == 1
        session.receive(backward(1))
        assert session.num_in_flight == 1
        session.answered(BackwardDone(request_id=1, gradient_BSD=None, norms_Q=None))
        assert session.num_in_flight == 0

    def test_without_backward_a_forward_is_all(self) -> None:
        session = ServerSession(terms(needs_backward=False))
        session.receive(Ready(round_number=0, num_examples=5))
        session.opened(opened())
        for number in (0, 1):
            forwarded(session, number + 1, 1, number)
            assert session.num_in_flight == 0
        with pytest.raises(RemoteProtocolError, match="no forward that waits"):
            session.receive(backward(1))
        assert session.receive(commit(1)) is not None

    @pytest.mark.parametrize(
        "gradient", [frames_of(2, 4, WIDTH), frames_of(2, 3, 5), frames_of(2, 3, WIDTH, dtype="u8")]
    )
    def test_a_gradient_unlike_the_activations(self, gradient: Any) -> None:
        session = awaiting_backward()
        before = snapshot(session)
        with pytest.raises(RemoteProtocolError):
            session.receive(backward(1, gradient_BSD=gradient))
        assert snapshot(session) == before

    def test_one_backward_for_one_forward(self) -> None:
        session = computing_backward()
        with pytest.raises(RemoteProtocolError, match="backward 1 has no forward that waits for it"):
            session.receive(backward(1))


PACKED_WRONGLY: dict[str, dict[str, Any]] = {
    "too few tokens": {"example_lengths": (3, 1)},
    "too many tokens": {"example_lengths": (3, 2, 1)},
    "over the border of two rows": {"example_lengths": (2, 2, 1)},
    "one example for all rows": {"example_lengths": (5,)},
    "an example without a token": {"example_lengths": (3, 0, 2)},
    "padded on the left": {"example_lengths": (2, 1, 2), "left_padded": True},
    "lengths of no rows": {"example_lengths": (3, 2), "lengths_B": ()},
    "too many examples": {"example_lengths": (1,) * 5},
}


class TestPackedRows:
    """Two rows of three positions, the second with one of padding."""

    @pytest.mark.parametrize("lengths", [(3, 2), (1, 2, 2), (2, 1, 1, 1)])
    def test_examples_that_make_up_the_rows(self, lengths: tuple[int, ...]) -> None:
        session = ServerSession(terms(max_packed_examples=4))
        assert session.receive(forward(1, 0, example_lengths=lengths)) is not None

    def test_a_row_of_one_example_may_be_among_them(self) -> None:
        session = ServerSession(terms(max_packed_examples=4))
        assert session.receive(forward(1, 0)) is not None

    def test_as_many_as_may_be_fit_into_a_header(self) -> None:
        lengths = (300,) * MAX_PACKED_EXAMPLES
        header = encode(forward(1, 0, example_lengths=lengths, lengths_B=(300 * len(lengths) // 512,) * 512))[0]
        assert len(header) < MAX_HEADER_BYTES

    @pytest.mark.parametrize("case", PACKED_WRONGLY)
    @pytest.mark.parametrize("step", [0, 1])
    def test_others_change_nothing(self, case: str, step: int) -> None:
        session = ServerSession(terms(max_packed_examples=4))
        if step:
            session.receive(Ready(round_number=0, num_examples=5))
            session.opened(opened())
        before = snapshot(session)
        with pytest.raises(RemoteProtocolError):
            session.receive(forward(1, step, **PACKED_WRONGLY[case]))
        assert snapshot(session) == before


class TestWhatAStepIsMadeOf:
    def test_tokens_and_positions_are_counted_until_its_commit(self) -> None:
        session = committing()
        session.committed(acknowledged(1))
        assert (session.asked.num_tokens, session.asked.num_positions) == (10, 12)
        through(session, 3, 2, 0)
        assert session.asked.num_tokens == 10

    def test_evaluations_do_not_count(self) -> None:
        session = idle()
        through_evaluation(session, 1)
        session.receive(Ready(round_number=0, num_examples=5))
        session.opened(opened())
        through(session, 2, 1, 0)
        through(session, 3, 1, 1)
        session.receive(commit(1))
        assert session.asked.num_positions == 12

    def test_what_a_lost_connection_took_with_it_does_not_count(self) -> None:
        session = through_one()
        session.disconnected()
        through(session, 1, 1, 0)
        through(session, 2, 1, 1)
        session.receive(commit(1))
        assert session.asked.num_positions == 12


class TestOnce:
    def test_a_repeated_commit_gets_the_recorded_answer(self) -> None:
        session = committing()
        recorded = acknowledged(1)
        session.committed(recorded)
        before = snapshot(session)
        for _ in range(2):
            answer = session.receive(commit(1))
            assert isinstance(answer, Reply)
            assert answer.message is recorded
        assert snapshot(session) == before

    def test_a_repeated_commit_of_a_refused_step_gets_the_refusal(self) -> None:
        session = through_all()
        refusal = session.step_closed(2, "late")
        answer = session.receive(commit(1))
        assert isinstance(answer, Reply)
        assert answer.message is refusal

    def test_a_gap_names_the_step_that_is_wanted(self) -> None:
        session = through_all()
        before = snapshot(session)
        with pytest.raises(RemoteProtocolError, match="commit of step 2 leaves a gap: step 1 is next"):
            session.receive(commit(2))
        assert snapshot(session) == before

    def test_an_old_commit_is_refused(self) -> None:
        session = ready()
        session.opened(opened(num_steps=3))
        for step in (1, 2):
            through(session, 2 * step, step, 0)
            through(session, 2 * step + 1, step, 1)
            session.receive(commit(step))
            session.committed(acknowledged(step))
        before = snapshot(session)
        with pytest.raises(RemoteProtocolError, match="commit of step 1, which is past: step 3 is next"):
            session.receive(commit(1))
        assert snapshot(session) == before

    def test_no_step_beyond_the_round(self) -> None:
        session = all_steps_done()
        with pytest.raises(RemoteProtocolError, match="commit of step 2 leaves a gap"):
            session.receive(commit(2))
        with pytest.raises(RemoteProtocolError, match="Forward for step 2"):
            session.receive(forward(9, 2, 0))

    @pytest.mark.parametrize("state", [training, through_one, awaiting_backward, computing_backward])
    def test_a_commit_before_all_micro_batches(self, state: Callable[[], ServerSession]) -> None:
        with pytest.raises(RemoteProtocolError, match=r"commit of step 1 after [01] of 2 micro-batches"):
            state().receive(commit(1))

    @pytest.mark.parametrize("norms", [frames_of(3), frames_of(2, dtype="bf16"), frames_of(2, 1)])
    def test_a_commit_with_other_norms(self, norms: Any) -> None:
        session = through_all()
        before = snapshot(session)
        with pytest.raises(RemoteProtocolError, match="norms of shape"):
            session.receive(commit(1, norms_P=norms))
        assert snapshot(session) == before


BAD_UPLOADS: dict[str, tuple[Upload, str]] = {
    "a later round": (upload(2), "layers of round 2 in round 1"),
    "a layer missing": (upload(layers=layers()[:1]), "1 layers whose shapes"),
    "another order": (upload(layers=layers()[::-1]), "2 layers whose shapes"),
    "another type": (upload(layers=tuple(frames_of(*layer.shape, dtype="bf16") for layer in layers())), "types"),
    "from no examples": (upload(num_examples=0), "layers from 0 examples"),
    "from a negative number of tokens": (upload(num_tokens=-1), "layers from -1 label tokens"),
}


class TestUploads:
    @pytest.mark.parametrize("case", BAD_UPLOADS)
    def test_layers_outside_the_terms(self, case: str) -> None:
        session = all_steps_done()
        before = snapshot(session)
        message, rule = BAD_UPLOADS[case]
        with pytest.raises(RemoteProtocolError, match=rule):
            session.receive(message)
        assert snapshot(session) == before

    def test_layers_in_the_middle_of_a_step(self) -> None:
        with pytest.raises(RemoteProtocolError, match="middle of a step"):
            through_one().receive(upload())

    def test_layers_before_the_last_step(self) -> None:
        with pytest.raises(RemoteProtocolError, match="layers at step 1, before the round's last, 2"):
            training().receive(upload())

    def test_layers_that_come_after_the_merge_are_ignored(self) -> None:
        session = all_steps_done()
        session.merged(merged(accepted=False, reason="too late"))
        before = snapshot(session)
        assert session.receive(upload()) is None
        assert snapshot(session) == before


CLOSABLE = [training, computing, awaiting_backward, computing_backward, through_one, through_all, committing]


class TestStepClosed:
    """A step goes on without this client: its stale messages are ignored, and it takes part in the next step."""

    @pytest.mark.parametrize("state", CLOSABLE)
    def test_the_refusal_names_both_steps(self, state: Callable[[], ServerSession]) -> None:
        session = state()
        refusal = session.step_closed(2, "late")
        assert (refusal.step, refusal.next_step, refusal.reason) == (1, 2, "late")
        assert (session.phase, session.num_in_flight) == (Phase.TRAINING, 0)

    @pytest.mark.parametrize("state", CLOSABLE)
    def test_the_client_goes_on_with_the_next_step(self, state: Callable[[], ServerSession]) -> None:
        session = state()
        session.step_closed(2, "late")
        through(session, 11, 2, 0)
        through(session, 12, 2, 1)
        assert session.receive(commit(2)) is not None
        session.committed(acknowledged(2))
        assert session.receive(upload()) is not None

    def test_a_stale_forward_is_ignored(self) -> None:
        session = through_one()
        session.step_closed(2, "late")
        before = snapshot(session)
        assert session.receive(forward(2, 1, 1)) is None
        assert snapshot(session) == before

    def test_a_stale_backward_is_ignored_once(self) -> None:
        session = awaiting_backward()
        session.step_closed(2, "late")
        assert session.receive(backward(1)) is None
        with pytest.raises(RemoteProtocolError, match="no forward that waits"):
            session.receive(backward(1))

    @pytest.mark.parametrize("state", [computing, computing_backward])
    def test_what_was_computed_for_it_is_not_sent(self, state: Callable[[], ServerSession]) -> None:
        session = state()
        session.step_closed(2, "late")
        assert not session.answered(ForwardDone(request_id=1, hidden_BSD=ACTIVATIONS))

    def test_two_steps_closed_before_the_client_speaks(self) -> None:
        session = awaiting_backward()
        session.step_closed(2, "late")
        refusal = session.step_closed(3, "late again")
        assert (refusal.step, refusal.next_step) == (2, 3)
        assert session.receive(backward(1)) is None
        assert session.receive(forward(2, 1, 1)) is None
        assert session.receive(commit(1)) is None
        assert session.receive(forward(3, 2, 0)) is None
        answer = session.receive(commit(2))
        assert isinstance(answer, Reply)
        assert answer.message is refusal

    def test_the_round_closes_in_the_middle_of_a_step(self) -> None:
        for state in CLOSABLE:
            session = state()
            session.merged(merged(accepted=False, reason="round_timeout"))
            assert (session.phase, session.num_in_flight) == (Phase.IDLE, 0)
            assert session.receive(forward(7, 1, 1)) is None
            # the merge has told the client; a refusal of its step would come on top of it
            assert not isinstance(session.receive(commit(1)), Reply)
            assert session.receive(upload()) is None
            session.receive(Ready(round_number=1, num_examples=5))
            session.opened(opened(round_number=2, first_step=3))
            through(session, 11, 3, 0)

    @pytest.mark.parametrize("state", CLOSABLE)
    def test_at_a_last_call_the_client_uploads_what_it_has(self, state: Callable[[], ServerSession]) -> None:
        session = state()
        session.step_closed(session.last_step + 1, "the round closes")
        assert session.receive(commit(1)) is None or isinstance(session.last_commit, StepRefused)
        assert session.receive(upload()) is not None
        assert session.phase is Phase.MERGING

    def test_a_refusal_is_no_step_of_the_clients(self) -> None:
        session = through_all()
        session.step_closed(2, "late")
        assert isinstance(session.last_commit, StepRefused)
        with pytest.raises(RemoteProtocolError, match="0 of 2 micro-batches"):
            session.receive(commit(2))


class TestBounds:
    def test_what_is_repeated_for_ever_is_refused(self) -> None:
        session = committing()
        for _ in range(256):
            assert session.receive(commit(1)) is None
        with pytest.raises(RemoteProtocolError, match="more than 256 messages in a row that repeat"):
            session.receive(commit(1))
        session.committed(acknowledged(1))
        session.receive(decode(9))
        assert isinstance(session.receive(commit(1)), Reply)  # it has said something else meanwhile

    def test_as_many_caches_end_as_are_begun(self) -> None:
        session = idle()
        for number in range(64):
            session.receive(EndCache(cache_id=number))
        with pytest.raises(RemoteProtocolError, match="EndCache more often"):
            session.receive(EndCache(cache_id=1))
        session.receive(decode(1))
        session.receive(EndCache(cache_id=1))

    def test_a_step_in_smaller_pieces(self) -> None:
        """As many micro-batches as a step has rows, but not more rows."""
        session = ServerSession(terms(rows_per_step=4, max_in_flight=4))
        session.receive(Ready(round_number=0, num_examples=5))
        session.opened(opened())
        one = {"hidden_BSD": frames_of(1, 3, WIDTH), "lengths_B": (3,)}
        for number in range(3):
            session.receive(forward(number + 1, 1, number, **one))
        with pytest.raises(RemoteProtocolError, match="5 rows in step 1, where a step of this run has 4"):
            session.receive(forward(4, 1, 3))
        session.receive(forward(4, 1, 3, **one))
        with pytest.raises(RemoteProtocolError, match="micro-batch 4 where 4 of 2, or of up to 4 smaller ones"):
            session.receive(forward(5, 1, 4, **one))


def test_rounds_end_for_a_client_that_waits_for_the_next_and_for_no_other() -> None:
    session = ready()
    session.rounds_ended()
    assert session.phase is Phase.IDLE
    assert session.receive(forward(1, 0)) is not None  # its last evaluation
    for other in (idle(), training()):
        before = snapshot(other)
        with pytest.raises(LocalProtocolError, match="the rounds end for a client that is"):
            other.rounds_ended()
        assert snapshot(other) == before
