"""A server that is short of memory, or held up: honest clients go on, and none of them is cut off or punished."""

import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

from field.machines import Network, Program, until
from field.parties import HOST, Parties, long_texts, settings

_NAMES = ("clinic-a", "clinic-b")
_TWO = settings("server.export_model=false", "federation.num_rounds=1", "federation.min_available_clients=2")
# A graph of four rows of 512 tokens takes about 2.5 GB; of single rows two are under way, which take half of that.
_ROOM_BYTES = 2_000_000_000
_STALL_S = 2.0
# The socket's thread has just told a client that its step counts, and the next step's micro-batches are on their way.
_STALLS = ",".join(f"commit-acknowledged:{number}:{_STALL_S}" for number in range(1, 9))


def test_a_thread_or_a_process_that_is_held_up(new_network: Callable[[], Network], models: Path) -> None:
    """With micro-batches as large as a message may be, two of each clinic under way."""
    parties = Parties.of(new_network(), models, *_NAMES)
    operator = parties.operator
    for clinic in parties.clinics:
        clinic.takes(long_texts(1500, num_texts=8))

    server = operator.start(
        *_TWO,
        *settings("federation.local_steps=4", "federation.per_device_eval_batch_size=2"),
        SPLITFL_PAUSE=_STALLS,
    )
    before = operator.machine.connections("PassiveOpens")
    programs = {clinic.name: clinic.start() for clinic in parties.clinics}
    operator.wait_for_steps(2, programs | {HOST: server})
    server.send(signal.SIGSTOP)
    time.sleep(_STALL_S)
    server.send(signal.SIGCONT)
    for program in (*programs.values(), server):
        program.ends_well(240.0)

    assert operator.troubles() == []
    assert operator.machine.connections("PassiveOpens") - before == 4
    assert [operator.steps_of(name) for name in _NAMES] == [4, 4]


def test_a_server_without_memory_for_one_clinic(new_network: Callable[[], Network], models: Path) -> None:
    """One clinic's rows are long: it is told three times, then it sends them one by one. The other goes on."""
    parties = Parties.of(new_network(), models, *_NAMES)
    operator, (greedy, honest) = parties.operator, parties.clinics
    greedy.takes(long_texts(4000, num_texts=16))
    words = settings("data.eval_fraction=0")
    server = operator.start(
        *_TWO,
        *settings("federation.local_steps=2", "text.max_seq_length=512"),
        *settings("federation.per_device_train_batch_size=4", "federation.gradient_accumulation_steps=1"),
    )
    _leave_room(server, _ROOM_BYTES)
    client, other = greedy.start(*words), honest.start()

    for _ in until(300.0, "end of the client that asks for too much", server, other):
        if client.poll() is not None:
            break
    assert client.wait(1.0) == 8, client.said
    assert "client.micro_batch_rows" in client.said, client.said
    greedy.start(*words, *settings("client.micro_batch_rows=1")).ends_well(300.0)
    other.ends_well(60.0)
    server.ends_well(60.0)

    assert [operator.steps_of(name) for name in _NAMES] == [2, 2]
    assert [event["client_id"] for event in operator.events("failed")] == 3 * ["clinic-a"]
    assert operator.events("violation", "cut_off") == []
    assert not [trouble for trouble in operator.troubles() if "clinic-b" in trouble]


def _leave_room(program: Program, num_bytes: int) -> None:
    """Let a program take no more memory than this beyond what it has."""
    status = Path(f"/proc/{program.pid}/status").read_text(encoding="ascii")
    found = re.search(r"^VmSize:\s+(\d+) kB$", status, re.MULTILINE)
    assert found
    limit = int(found[1]) * 1024 + num_bytes
    resource.prlimit(program.pid, resource.RLIMIT_AS, (limit, limit))
