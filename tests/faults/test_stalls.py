"""A server that stands still for a while, under load and with keys: nobody is cut off, punished or lost."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_text
from faults.test_keys import Office
from faults.town import Town

pytestmark = pytest.mark.slow

STALL_S = 2.0
# micro-batches of 8 x 512 positions, 576 wide, float32, as SmolLM2's are, with little to compute
MODEL = {"hidden_size": 576, "intermediate_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 512}


def test_two_clients_with_two_micro_batches_in_flight(town: Callable[..., Town], tmp_path: Path) -> None:
    office = Office(tmp_path)
    run = town(
        2,
        starts=False,
        model=MODEL,
        server__keys=office.server,
        text__max_seq_length=512,
        federation__num_rounds=1,
        federation__local_steps=2,
        federation__per_device_train_batch_size=8,
        federation__gradient_accumulation_steps=2,
        link__heartbeat_interval=2.0,
        link__heartbeat_timeout=8.0,
        link__slowest_link_bytes_per_second=250_000,
    )
    for number, name in enumerate(run.names):
        office.enrol(run, name)
        write_text(tmp_path / f"{number}.txt", num_lines=20, seed=number, lengths=(511, 511))
    for name in ("server", *run.names):
        run.start(name)
    for kind in ("round_opened", "step"):
        run.wait_for(kind, 1)
        run.processes["server"].send_signal(signal.SIGSTOP)
        time.sleep(STALL_S)
        run.processes["server"].send_signal(signal.SIGCONT)
    assert [run.end_of(name)[0] for name in ("server", *run.names)] == [0, 0, 0]
    for kind in ("cut_off", "violation", "client_lost"):
        assert run.events(kind) == []
    assert {event["reason"] for event in run.events("client_left")} == {"done"}
    assert "retry" not in "".join(run.processes[name].said() for name in run.names)
    assert run.verdict().problems == []
