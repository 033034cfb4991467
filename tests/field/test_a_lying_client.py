"""The real model, keys, and an authorised client that lies: the honest clinic's steps are its own."""

from pathlib import Path

import pytest
import torch
from faults.lying_client import Liar
from faults.test_keys import Office
from faults.town import Town
from packed import packed

from splitfl.protocol.messages import Backward, ForwardDone
from splitfl.transport.keys import authorize, keygen

SHAPE = (1, 16, 576)
FRAME_BYTES = 1 << 18


@pytest.mark.parametrize("value", [0.0, 1e-40])
def test_gradients_that_grow_beyond_all_numbers(models: Path, tmp_path: Path, value: float) -> None:
    """Activations of zero, or nearly so, through 28 blocks: legal, and NaN in the backbone's gradients."""
    model = next(path for path in models.iterdir() if path.is_dir())
    office = Office(tmp_path)
    run = Town(
        tmp_path,
        model,
        1,
        {
            "server.keys": office.server,
            "federation.server_mode": "shared",
            "federation.num_rounds": 1,
            "federation.local_steps": 2,
            "federation.min_available_clients": 2,
            "federation.per_device_train_batch_size": 1,
            "federation.gradient_accumulation_steps": 1,
            "federation.step_timeout": 5,
            "link.heartbeat_timeout": 20,
        },
        starts=False,
    )
    office.enrol(run, "clinic-0")
    authorize(office.server, "mallory", keygen(tmp_path / "keys-mallory").public)
    try:
        run.start("server")
        run.wait_for("waiting", 1, timeout_s=90)
        run.start("clinic-0")
        with Liar(
            run.port, "mallory", model, keys=tmp_path / "keys-mallory", enrolment=tmp_path / "clinic-0.enrolment.toml"
        ).join() as liar:
            liar.resume()
            step = liar.ready().first_step
            hidden = packed(torch.full(SHAPE, value), FRAME_BYTES)
            message = liar.forward(step, hidden_BSD=hidden, lengths_B=(SHAPE[1],))
            liar.say(message)
            liar.wait_for(ForwardDone, 60.0)
            gradient = packed(torch.full(SHAPE, 9e5), FRAME_BYTES)
            liar.say(Backward(request_id=message.request_id, gradient_BSD=gradient))
            refusal = liar.refusal(60.0)
            assert (refusal.code, "not finite" in refusal.reason) == ("VIOLATION", True), refusal.reason
        assert run.end_of("clinic-0", 120.0)[0] == run.end_of("server", 120.0)[0] == 0
        assert [event["step"] for event in run.events("step") if event["client_id"] == "clinic-0"] == [1, 2]
        assert all(event["clip_coefficient"] > 0 for event in run.events("step"))
        assert run.verdict().problems == []
    finally:
        run.end()
