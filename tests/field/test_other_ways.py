"""Other ways to a server, and a server that has moved."""

import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from field.machines import Network
from field.parties import HOST, Clinic, Operator, Parties, settings

_ONE_ROUND = settings("federation.num_rounds=1", "federation.local_steps=3")


def test_a_clinic_behind_a_socks_proxy(new_network: Callable[[], Network], models: Path) -> None:
    """It has a cable to the proxy only, and does not know where the server is."""
    network = new_network()
    operator = Operator(network.machine(HOST), models)
    clinic, proxy = Clinic(network.machine("clinic-a"), "clinic-a"), network.machine("proxy")
    operator.enrol(clinic)
    there, _ = network.join(operator.machine, proxy)
    proxy.knows(HOST, there.address)
    here, _ = network.join(proxy, clinic.machine)
    proxy.start(sys.executable, "-m", "pproxy", "-l", f"socks5://{here.address}:1080")

    server = operator.start(*_ONE_ROUND, *settings("server.export_model=false"))
    client = clinic.start(*settings(f"client.socks_proxy={here.address}:1080"))
    client.ends_well(180.0)
    server.ends_well(120.0)

    assert operator.troubles() == []
    assert operator.steps_of("clinic-a") == 3
    # each of the two is preceded by a question whether the proxy lets it through
    assert clinic.machine.connections("ActiveOpens") == proxy.connections("PassiveOpens") == 4


def test_a_server_that_has_moved(new_network: Callable[[], Network], models: Path, tmp_path: Path) -> None:
    """Its run and its keys are copied to another machine, another folder, and a model that lies elsewhere."""
    network = new_network()
    parties = Parties.of(network, models, "clinic-a")
    before, (clinic,) = parties.operator, parties.clinics
    words = settings("federation.num_rounds=2", "federation.local_steps=3")
    server, client = before.start(*words), clinic.start()
    before.wait_for_steps(2, {HOST: server, clinic.name: client})
    server.send(signal.SIGTERM)
    assert server.wait(30.0) == 0

    after = Operator(network.machine("new-box"), models)
    shutil.rmtree(after.folder / "keys")
    shutil.copytree(before.folder / "keys", after.folder / "keys")
    shutil.copytree(before.folder / "runs", after.folder / "elsewhere" / "runs")
    (model,) = models.iterdir()
    moved = shutil.copytree(model, after.folder / "elsewhere" / "model")
    near, _ = network.join(after.machine, clinic.machine)
    clinic.machine.knows(HOST, near.address)
    server = after.start(
        *words, *settings(f"server.runs_dir={after.folder / 'elsewhere' / 'runs'}", f"model.model_name_or_path={moved}")
    )
    client.ends_well(180.0)
    server.ends_well(120.0)

    after.runs_dir = after.folder / "elsewhere" / "runs"
    assert after.run_dir.name == before.run_dir.name
    assert after.steps_of("clinic-a") == 6
    assert [merged["absent"] for merged in after.events("merged")] == [[], []]
