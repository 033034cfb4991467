"""Whatever ends a process or a link in the middle of a round: the weights equal the undisturbed run's."""

import hashlib
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from field.machines import Network, Program
from field.parties import HOST, Clinic, Operator, Parties, settings

from benchmarks.history import check
from splitfl.telemetry.history import HISTORY_FILE

_NAMES = ("clinic-a", "clinic-b")
# Which bits a sum comes to hangs on how many threads share it.
_SERVER = settings(
    "server.num_threads=1", "server.history=true", "server.export_model=false", "federation.min_available_clients=2"
)
_CLIENT = settings("client.num_threads=1", "client.history=true")
_NUM_STEPS = 10
_CUT_S = 30.0


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Run:
    """The README's run of two rounds of five steps, with two clinics."""

    def __init__(self, network: Network, models: Path) -> None:
        self.parties = Parties.of(network, models, *_NAMES)
        self.programs: dict[str, Program] = {}
        for who in (HOST, *_NAMES):
            self.start(who)

    @property
    def operator(self) -> Operator:
        return self.parties.operator

    def clinic(self, name: str) -> Clinic:
        return self.parties.clinics[_NAMES.index(name)]

    def start(self, who: str) -> None:
        """Start who has ended, with the same command."""
        self.programs[who] = self.operator.start(*_SERVER) if who == HOST else self.clinic(who).start(*_CLIENT)

    def harm(self, who: str, number: signal.Signals, code: int) -> None:
        """End somebody by a signal, who ends with this code, and start it again."""
        self.programs[who].send(number)
        assert self.programs[who].wait(30.0) == code, self.programs[who].said
        self.start(who)

    def finish(self) -> None:
        """Wait until all have ended in order."""
        for name in (*_NAMES, HOST):
            self.programs[name].ends_well(180.0)

    @property
    def trained(self) -> str:
        """A digest of everything that was trained."""
        return _digest(self.operator.run_dir / "trained.safetensors")

    @property
    def histories(self) -> Mapping[str, Path]:
        run_id = self.operator.run_dir.name
        return {name: self.clinic(name).folder / "client-runs" / run_id / name / HISTORY_FILE for name in _NAMES}


@pytest.fixture(scope="module")
def undisturbed(new_network: Callable[[], Network], models: Path) -> str:
    """Return what was trained in the run that nothing harms."""
    run = _Run(new_network(), models)
    run.finish()
    assert run.operator.troubles() == []
    return run.trained


def test_seven_harms_in_one_run(new_network: Callable[[], Network], models: Path, undisturbed: str) -> None:
    run = _Run(new_network(), models)
    link = run.parties.links[_NAMES.index("clinic-b")]

    def cut() -> None:
        link.cut()
        time.sleep(_CUT_S)
        link.mend()

    harms: dict[int, Callable[[], None]] = {
        1: lambda: run.harm(HOST, signal.SIGKILL, -signal.SIGKILL),
        2: lambda: run.harm("clinic-a", signal.SIGKILL, -signal.SIGKILL),
        3: cut,
        6: lambda: run.harm(HOST, signal.SIGTERM, 0),
        7: lambda: run.harm("clinic-b", signal.SIGTERM, 0),
        8: lambda: run.harm(HOST, signal.SIGINT, 130),
        9: lambda: run.harm("clinic-a", signal.SIGINT, 130),
    }
    for step, harm in harms.items():
        run.operator.wait_for_steps(step, run.programs)
        harm()
    run.finish()

    assert run.trained == undisturbed
    verdict = check(run.operator.run_dir / HISTORY_FILE, run.histories)
    assert verdict.problems == []
    assert verdict.steps_acknowledged == len(_NAMES) * _NUM_STEPS
    merges = run.operator.events("merged")
    assert [(sorted(merged["clients"]), merged["absent"]) for merged in merges] == 2 * [(list(_NAMES), [])]
    assert {event["client_id"] for event in run.operator.events("violation", "cut_off", "step_refused")} == set()
