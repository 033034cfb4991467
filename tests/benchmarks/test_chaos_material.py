"""What the chaos benchmark trains: settings that hold, keys that let in, and a real model with the link as shipped."""

from pathlib import Path

import pytest

from benchmarks.chaos import MATERIALS, Chaos
from benchmarks.keyed import KeyRing
from splitfl.config.operation import LinkSection
from splitfl.config.trees import ServerConfig
from splitfl.transport.keys import AllowList, read_enrolment, read_key_pair


@pytest.mark.parametrize("name", sorted(MATERIALS))
def test_the_settings_hold(name: str) -> None:
    material = MATERIALS[name]
    config = ServerConfig.from_tree(
        {**material.settings, "model": {"model_name_or_path": "model"}}, source="benchmarks.chaos"
    )
    assert material.heartbeat_timeout_s == config.link.heartbeat_timeout
    assert material.outage_s > material.heartbeat_timeout_s  # some are noticed


def test_the_real_model_has_the_link_as_it_is_shipped() -> None:
    assert "link" not in MATERIALS["smollm2"].settings
    assert MATERIALS["smollm2"].heartbeat_timeout_s == LinkSection().heartbeat_timeout


@pytest.mark.parametrize("durability", ["redo", "snapshot"])
def test_the_run_is_as_the_switches_say(tmp_path: Path, durability: str) -> None:
    switches = {"server_mode": "per_client", "durability": durability}
    chaos = Chaos(tmp_path, MATERIALS["tiny"], num_clients=1, seed=1, has_keys=True, **switches)
    try:
        config = ServerConfig.load(chaos.config("server"))
        assert (config.storage.durability, config.federation.server_mode) == (durability, "per_client")
    finally:
        chaos.end()


def test_texts_are_of_each_client_its_own(tmp_path: Path) -> None:
    texts = MATERIALS["tiny"].write_texts(tmp_path, ["a", "b"], 1)
    assert len({path.read_text() for path in texts.values()}) == 2


def test_a_key_ring_lets_its_clients_in(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path)
    settings = ring.enrol("a", "tcp://127.0.0.1:5555")
    pair = read_key_pair(Path(settings["keys"]))
    assert AllowList(ring.server_keys).client_of(pair.public) == "a"
    enrolment = read_enrolment(Path(settings["enrolment"]))
    assert enrolment.server_public_key == read_key_pair(ring.server_keys).public
