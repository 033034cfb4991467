"""A client's and a server's session drive each other in any order: nothing is refused or lost, and nothing hangs."""

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sample_messages import WIDTH, frames_of, layers, merged, opened, terms

from splitfl.protocol.messages import (
    Backward,
    BackwardDone,
    Commit,
    Committed,
    Farewell,
    Forward,
    ForwardDone,
    Goodbye,
    Merged,
    Message,
    Ready,
    RoundOpened,
    StepRefused,
    Upload,
)
from splitfl.session.client_session import ClientSession
from splitfl.session.server_session import Phase, Reply, ServerSession

ACTIVATIONS = frames_of(2, 3, WIDTH)
MICRO_BATCHES = 3
LOCAL_STEPS = 2
# More than any schedule needs to come to its end once nothing disturbs it.
PATIENCE = 500
# Disturbances are rare, or no step would ever come far.
SELDOM = st.integers(0, 5).map(lambda drawn: drawn == 5)


class TwoSessions(RuleBasedStateMachine):
    """Two wires that keep order, a worker that computes in order, and a client that follows its loop."""

    @initialize(max_in_flight=st.integers(1, 2), needs_backward=st.booleans())
    def join(self, max_in_flight: int, needs_backward: bool) -> None:
        agreed = terms(micro_batches=MICRO_BATCHES, max_in_flight=max_in_flight, needs_backward=needs_backward)
        self.client, self.server = ClientSession(agreed), ServerSession(agreed)
        self.up: deque[Message] = deque()
        self.down: deque[Message] = deque()
        self.jobs: deque[Forward | Backward] = deque()
        self.applied: list[int] = []
        self.acknowledged: list[int] = []
        self.closed: set[int] = set()
        self.begun = self.done = 0
        self.waits = False
        self.evaluations = 2
        self.num_merges = 0
        self.has_gone = False

    # the client's loop

    @property
    def client_can_act(self) -> bool:
        if self.waits or self.has_gone:
            return False
        if self.client.open_round is None:
            return self.evaluations > 0 or self.begun == self.done
        if self._in_step and self.begun < MICRO_BATCHES:
            return self.client.has_credit
        return self.done == self.begun

    @property
    def _in_step(self) -> bool:
        round_ = self.client.open_round
        return round_ is not None and self.client.next_step < round_.first_step + round_.num_steps

    @precondition(lambda self: self.client_can_act)
    @rule()
    def client_acts(self) -> None:
        if self.client.open_round is None:
            self._act_between_rounds()
        elif self._in_step and self.begun < MICRO_BATCHES:
            self._send_micro_batch(self.client.next_step, self.begun)
        elif self._in_step:
            self.up.append(self.client.commit(num_label_tokens=4, loss=1.0, norms_P=frames_of(2)))
            self.waits = True
        else:
            if self.client.open_round.num_steps:
                self.up.append(self.client.upload(num_examples=5, num_tokens=60, layers=layers()))
            else:
                self.client.sit_out()
            self.waits = True

    def _act_between_rounds(self) -> None:
        if self.evaluations and self.client.has_credit:
            self.evaluations -= 1
            self._send_micro_batch(0, 0)
        elif self.begun == self.done:
            self.up.append(self.client.ready(5))
            self.waits = True

    def _send_micro_batch(self, step: int, number: int) -> None:
        self.begun += 1
        self.up.append(self.client.forward(step=step, micro_batch=number, hidden_BSD=ACTIVATIONS, lengths_B=(3, 2)))

    @precondition(lambda self: self.down)
    @rule()
    def client_receives(self) -> None:
        message = self.client.receive(self.down.popleft())
        match message:
            case ForwardDone(request_id=number) if self.client.open_round and self.client.terms.needs_backward:
                self.up.append(self.client.backward(number, ACTIVATIONS))
            case ForwardDone() | BackwardDone():
                self.done += 1
            case Committed(step=step):
                self.acknowledged.append(step)
                self._begin()
            case StepRefused(next_step=next_step):
                self.client.abandon_step(next_step)
                self._begin()
            case RoundOpened():
                self._begin()
            case Merged():
                self.evaluations = 1
                self._begin()
            case Farewell():
                self.has_gone = True

    def _begin(self) -> None:
        self.begun = self.done = 0
        self.waits = False

    # the server

    @precondition(lambda self: self.up)
    @rule()
    def server_receives(self) -> None:
        match self.server.receive(self.up.popleft()):
            case Reply(message=message):
                self.down.append(message)
            case Forward() | Backward() as job:
                self.jobs.append(job)
            case Goodbye():
                self.down.append(Farewell())
            case Commit() | Upload() | Ready() | None:
                pass

    @precondition(lambda self: self.jobs)
    @rule()
    def server_computes(self) -> None:
        reply: ForwardDone | BackwardDone
        match self.jobs.popleft():
            case Forward(request_id=number):
                reply = ForwardDone(request_id=number, hidden_BSD=ACTIVATIONS)
            case Backward(request_id=number):
                reply = BackwardDone(request_id=number, gradient_BSD=ACTIVATIONS, norms_Q=None)
        if self.server.answered(reply):
            self.down.append(reply)

    @precondition(lambda self: self.server.phase is Phase.COMMITTING)
    @rule()
    def server_commits(self) -> None:
        step = self.server.next_step
        self.applied.append(step)
        answer = Committed(step=step, commit_number=len(self.applied), clip_coefficient=1.0, durable_step=step)
        self.server.committed(answer)
        self.down.append(answer)

    @precondition(
        lambda self: (
            self.server.phase in (Phase.TRAINING, Phase.COMMITTING) and self.server.next_step <= self.server.last_step
        )
    )
    @rule(is_late=SELDOM, is_last_call=st.booleans())
    def server_closes_the_step(self, is_late: bool, is_last_call: bool) -> None:
        """Or, by a last call, all that is left of the round: the client uploads what it has."""
        if not is_late:
            return
        next_step = (self.server.last_step if is_last_call else self.server.next_step) + 1
        self.closed |= set(range(self.server.next_step, next_step))
        self.down.append(self.server.step_closed(next_step, "late"))

    @precondition(lambda self: self.server.phase is Phase.READY)
    @rule(sits_out=st.booleans())
    def server_opens(self, sits_out: bool) -> None:
        number = self.server.round_number + 1
        first_step = (number - 1) * LOCAL_STEPS + 1
        round_ = opened(number, first_step, 0 if sits_out else LOCAL_STEPS)
        self.server.opened(round_)
        self.down.append(round_)

    @precondition(lambda self: self.server.phase in (Phase.TRAINING, Phase.COMMITTING, Phase.MERGING))
    @rule(is_late=SELDOM)
    def server_merges(self, is_late: bool) -> None:
        if self.server.phase is not Phase.MERGING:
            if not is_late:
                return
            self.closed |= set(range(self.server.next_step, self.server.last_step + 1))
        self.num_merges += 1
        message = merged(self.server.round_number)
        self.server.merged(message)
        self.down.append(message)

    # what must hold at any time

    @invariant()
    def a_step_is_applied_once_and_in_order(self) -> None:
        assert self.applied == sorted(set(self.applied))
        assert not self.closed & set(self.applied)

    @invariant()
    def the_client_learns_of_applied_steps_only(self) -> None:
        assert self.acknowledged == self.applied[: len(self.acknowledged)]

    @invariant()
    def no_more_is_under_way_than_agreed(self) -> None:
        assert self.server.num_in_flight <= self.server.terms.max_in_flight

    def teardown(self) -> None:
        """Left alone, the two come to the end of their round, and of one more, and part."""
        if not hasattr(self, "client"):
            return
        wanted = self.num_merges + 2
        for _ in range(PATIENCE):
            if self.has_gone:
                break
            self._go_on(wanted)
        assert self.has_gone, "the sessions hang"
        assert self.acknowledged == self.applied
        assert (self.server.phase, self.server.num_in_flight) == (Phase.GONE, 0)

    def _go_on(self, wanted: int) -> None:
        if self.down:
            self.client_receives()
        elif self.jobs:
            self.server_computes()
        elif self.up:
            self.server_receives()
        elif self.server.phase is Phase.COMMITTING:
            self.server_commits()
        elif self.server.phase is Phase.READY:
            self.server_opens(sits_out=False)
        elif self.server.phase is Phase.MERGING:
            self.server_merges(is_late=False)
        elif self.num_merges >= wanted and self.client.open_round is None and not self.waits:
            self.up.append(self.client.goodbye({}))
            self.waits = True
        elif self.client_can_act:
            self.client_acts()


TwoSessions.TestCase.settings = settings(max_examples=100, stateful_step_count=80, deadline=None)
TestTwoSessions = TwoSessions.TestCase
