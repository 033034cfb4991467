"""A new user's way: two machines with keys, by the README; then a second clinic, the first behind a slow link."""

import subprocess
import sys
from pathlib import Path

import pytest
from field import delay
from field.machines import Network
from field.parties import HOST, PORT, Parties, command, settings

_USE_IT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

assert "splitfl" not in sys.modules
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
with torch.no_grad():
    logits = model(**tokenizer("Phenotype: Fever", return_tensors="pt")).logits
assert torch.isfinite(logits).all()
base = AutoModelForCausalLM.from_pretrained(sys.argv[2]).state_dict()
print(sum(not torch.equal(value, base[name]) for name, value in model.state_dict().items()))
"""


@pytest.fixture(scope="module")
def parties(network: Network, models: Path) -> Parties:
    """Return an operator and a clinic, introduced to each other."""
    return Parties.of(network, models, "clinic-a")


def test_one_round_and_the_model_is_an_ordinary_one(parties: Parties, models: Path) -> None:
    operator, (clinic,) = parties.operator, parties.clinics
    assert not (clinic.machine.home / ".cache").exists()

    server = operator.start(*settings("federation.num_rounds=1"))
    client = clinic.start()
    client.ends_well(180.0)
    server.ends_well(120.0)

    assert operator.troubles() == []
    assert operator.steps_of("clinic-a") == 5
    words = [word.replace("runs/20261122-093000", f"runs/{operator.run_dir.name}") for word in command("export")]
    operator.machine.do(*words)
    (base,) = models.iterdir()
    changed = subprocess.run(
        [sys.executable, "-c", _USE_IT, str(operator.folder / words[-1]), str(base)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert int(changed.stdout) == 2 * 30  # the queries and values of all blocks


def test_a_second_clinic_and_the_first_behind_a_slow_link(network: Network, parties: Parties) -> None:
    """20 Mbit/s and a round trip of 200 ms; the clinic still has the files that were sent once."""
    operator, far, near = parties.operator, parties.clinics[0], parties.add(network, "clinic-b")
    router = network.machine("router")
    there, _ = network.join(operator.machine, router)
    beyond, _ = network.join(router, far.machine, rate="20mbit")
    router.start(sys.executable, delay.__file__, f"{beyond.address}:{PORT}", f"{there.address}:{PORT}", "0.1")
    far.machine.knows(HOST, beyond.address)

    server = operator.start(
        *settings("federation.num_rounds=1", "federation.local_steps=3", "federation.min_available_clients=2")
    )
    before = operator.machine.connections("PassiveOpens")
    clients = [far.start(), near.start()]
    for client in clients:
        client.ends_well(240.0)
    server.ends_well(120.0)

    assert operator.troubles() == []
    assert operator.machine.connections("PassiveOpens") - before == 4  # two clients, two connections each
    (merged,) = operator.events("merged")
    assert merged["clients"].keys() == {"clinic-a", "clinic-b"}
