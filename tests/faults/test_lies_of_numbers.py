"""Numbers that are legal one by one and harm the clients that share a step with them; a row each in
docs/reliability.md."""

from collections.abc import Callable

import pytest
import torch
from faults.lying_client import LENGTH, ROWS, WIDTH, Liar, activations
from faults.town import Town
from packed import packed

from splitfl.protocol.messages import Backward, BackwardDone, ForwardDone

pytestmark = pytest.mark.slow

DEEP = {"num_hidden_layers": 40}


def test_gradients_that_grow_beyond_all_numbers(town: Callable[..., Town]) -> None:
    """At activations of zero each norm makes a gradient larger: finite ones that go in are NaN further up."""
    run = town(
        1,
        model=DEEP,
        federation__server_mode="shared",
        federation__min_available_clients=2,
        federation__num_rounds=1,
        federation__local_steps=4,
        federation__step_timeout=3,
    )
    run.wait_for("waiting", 1)
    with Liar(run.port, "mallory", run.model).join() as liar:
        liar.resume()
        step = liar.ready().first_step
        message = liar.forward(step, hidden_BSD=activations(value=0.0))
        liar.say(message)
        liar.wait_for(ForwardDone)
        gradient = torch.zeros(ROWS, LENGTH, WIDTH)
        gradient[0, 0] = 9e5
        liar.say(Backward(request_id=message.request_id, gradient_BSD=packed(gradient, 1 << 18)))
        refusal = liar.refusal()
        assert refusal.code == "VIOLATION", refusal.reason
        assert "gradient" in refusal.reason
        assert not any(isinstance(each, BackwardDone) for each in liar.heard)
    for name in ("server", "clinic-0"):
        code, said = run.end_of(name)
        assert code == 0, f"{name}: {said}"
    assert [event["step"] for event in run.events("step") if event["client_id"] == "clinic-0"] == [1, 2, 3, 4]
    assert all(event["clip_coefficient"] > 0 for event in run.events("step"))
    assert run.verdict().problems == []
