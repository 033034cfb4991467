"""Strategies and `merge.parts` on real runs: what clients hold, what travels, and what a round says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import Finished, write_text
from safetensors.torch import load_file
from torch import Tensor

from splitfl.durability.store import Store
from splitfl.telemetry.metrics import read_events

Trained = dict[str, Tensor]


@pytest.fixture
def train(make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path) -> Callable[..., Any]:
    """Train a model with these sections of the server's settings; returns what is left and what was saved."""
    model = make_model("llama")

    def run(clients: int = 2, **sections: Any) -> tuple[Finished, Trained]:
        federation = {"num_rounds": 2, "local_steps": 3, "per_device_train_batch_size": 2}
        settings = {
            "model": {"model_name_or_path": str(model)},
            "optimizer": {"learning_rate": 1e-2},
            "server": {"export_model": False},
            **sections,
            "federation": {**federation, "min_available_clients": clients, **sections.get("federation", {})},
        }
        texts = [write_text(tmp_path / f"{number}.txt", num_lines=12, seed=number) for number in range(clients)]
        finished = federate(
            settings, {f"clinic-{number}": {"path": text, "eval_fraction": 0.0} for number, text in enumerate(texts)}
        )
        assert finished.errors == {}
        return finished, load_file(finished.run_dir / "trained.safetensors")

    return run


def equal(first: Trained, second: Trained) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def merges(finished: Finished) -> list[dict[str, Any]]:
    return [event for event in read_events(finished.run_dir / "metrics.jsonl") if event["event"] == "merged"]


def held_by(finished: Finished, client_id: str) -> Trained:
    """Return the weights in a client's last snapshot; adapters only, since that is what trains here."""
    store = Store.reading(finished.folders[client_id] / "state")
    tensors = store.snapshot_of(store.generations()[-1]).tensors
    return {name: tensor for name, tensor in tensors.items() if "|" not in name and "/" not in name}


def spread(finished: Finished, kept: str) -> float:
    """Return how far two clients' tensors with this in their names are from each other."""
    one, other = held_by(finished, "clinic-0"), held_by(finished, "clinic-1")
    return max(float((one[name] - other[name]).abs().max()) for name in one if kept in name)


def own_controls(finished: Finished, client_id: str) -> Trained:
    """Return the c_i in a client's last snapshot."""
    return _with_prefix(finished.folders[client_id], "own_control/")


def server_controls(finished: Finished) -> Trained:
    """Return the c in the server's last snapshot."""
    return _with_prefix(finished.run_dir, "strategy/control/")


def _with_prefix(folder: Path, prefix: str) -> Trained:
    store = Store.reading(folder / "state")
    tensors = store.snapshot_of(store.generations()[-1]).tensors
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def client_done(finished: Finished) -> dict[str, Any]:
    """Return the totals of a run's one client."""
    (done,) = [e for e in read_events(finished.run_dir / "metrics.jsonl") if e["event"] == "client_done"]
    return done


def length(trained: Trained) -> float:
    """Return how far the clients' adapters have come from 0, where their second factors begin."""
    moved = [tensor for name, tensor in trained.items() if ".layers.0." in name and "lora_B" in name]
    return float(torch.stack([tensor.norm() for tensor in moved]).norm())


class TestFedProx:
    def test_without_the_term_it_is_fed_avg_to_the_bit(self, train: Callable[..., Any]) -> None:
        _, plain = train()
        _, without = train(federation={"strategy": "FedProx"}, strategy={"proximal_mu": 0.0})
        assert equal(plain, without)

    def test_a_strong_pull_keeps_clients_at_the_merge(self, train: Callable[..., Any]) -> None:
        sgd = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        one_round = {"num_rounds": 1, "local_steps": 8}
        _, free = train(optimizer=sgd, federation=one_round)
        _, pulled = train(optimizer=sgd, federation={**one_round, "strategy": "FedProx"}, strategy={"proximal_mu": 8.0})
        assert length(pulled) < 0.5 * length(free)


class TestScaffold:
    SGD: ClassVar[dict[str, Any]] = {
        "optim": "sgd",
        "learning_rate": 0.2,
        "max_grad_norm": 0.05,
        "lr_scheduler_type": "linear",
    }

    def train(self, train: Callable[..., Any], clients: int = 2, *, strategy: str, **federation: Any) -> Any:
        return train(
            clients,
            optimizer=self.SGD,
            federation={"strategy": strategy, "weight_by": "uniform", **federation},
        )

    def test_one_client_is_fed_avg_to_the_bit(self, train: Callable[..., Any]) -> None:
        _, plain = self.train(train, 1, strategy="FedAvg", num_rounds=3)
        finished, corrected = self.train(train, 1, strategy="SCAFFOLD", num_rounds=3)
        assert equal(plain, corrected)
        controls = server_controls(finished)
        assert max(float(control.abs().max()) for control in controls.values()) > 0
        assert equal(controls, own_controls(finished, "clinic-0"))

    def test_the_first_round_is_fed_avgs_to_the_bit_and_the_second_is_not(self, train: Callable[..., Any]) -> None:
        for num_rounds in (1, 2):
            _, plain = self.train(train, strategy="FedAvg", num_rounds=num_rounds)
            _, corrected = self.train(train, strategy="SCAFFOLD", num_rounds=num_rounds)
            assert equal(plain, corrected) == (num_rounds == 1)

    def test_the_servers_controls_are_the_clients_means_and_no_part_of_the_model(
        self, train: Callable[..., Any]
    ) -> None:
        finished, trained = self.train(train, 3, strategy="SCAFFOLD", fraction_train=0.67, num_rounds=3)
        assert [merge["accepted"] for merge in merges(finished)] == [True] * 3
        assert {len(merge["clients"]) for merge in merges(finished)} == {2}
        own = [own_controls(finished, f"clinic-{number}") for number in range(3)]
        for name, control in server_controls(finished).items():
            mean = torch.stack([each[name] for each in own]).mean(dim=0)
            torch.testing.assert_close(control, mean, rtol=1e-4, atol=1e-6)
        assert not any("control" in name for name in trained)
        report = json.loads((finished.run_dir / "report.json").read_text())
        assert all(merge["equal"] for merge in report["merges"])
        assert spread(finished, "lora") == 0.0

    def test_an_upload_is_no_larger_and_a_merge_comes_back_doubled(self, train: Callable[..., Any]) -> None:
        (plain, trained), (corrected, _) = (self.train(train, 1, strategy=name) for name in ("FedAvg", "SCAFFOLD"))
        layers = sum(tensor.nbytes for name, tensor in trained.items() if ".layers.0." in name or ".layers.3." in name)
        before, after = client_done(plain), client_done(corrected)
        assert abs(after["bytes_sent"] - before["bytes_sent"]) < layers / 4
        received = [done["bytes_received"] - done["bytes_of_files"] for done in (before, after)]
        assert received[1] - received[0] == pytest.approx(2 * layers, rel=0.25)


class TestServerState:
    @pytest.mark.parametrize("name", ["FedAdagrad", "FedAdam", "FedYogi"])
    def test_a_run_comes_to_its_end_and_all_hold_the_same(self, train: Callable[..., Any], name: str) -> None:
        finished, trained = train(federation={"strategy": name}, strategy={"eta": 0.01})
        assert spread(finished, "lora") == 0.0
        assert all(tensor.isfinite().all() for tensor in trained.values())
        store = Store.reading(finished.run_dir / "state")
        tensors = store.snapshot_of(store.generations()[-1]).tensors
        assert tensors["strategy/num_merges"].item() == 2
        assert {name.split("/")[1] for name in tensors if name.startswith("strategy/")} >= {"first", "second"}


class TestKrumWithTooFewClients:
    def test_the_old_layers_stay_and_the_round_says_so(self, train: Callable[..., Any]) -> None:
        finished, trained = train(federation={"strategy": "Krum"})
        assert [(merge["accepted"], merge["reason"], merge["clients"]) for merge in merges(finished)] == [
            (False, "2 clients finished, Krum with num_malicious_clients = 0 needs 3", {})
        ] * 2
        assert length(trained) == 0.0
        assert spread(finished, "lora") == 0.0


class TestFedBuff:
    SETTINGS: ClassVar[dict[str, Any]] = {
        "federation": {"strategy": "FedBuff", "server_mode": "sequential"},
        "optimizer": {"learning_rate": 1e-2, "lr_scheduler_type": "constant"},
    }

    def test_one_client_and_a_buffer_of_one_is_fed_avg_to_the_bit(self, train: Callable[..., Any]) -> None:
        _, buffered = train(1, **self.SETTINGS, strategy={"buffer_size": 1})
        usual = {"federation": {"server_mode": "sequential"}, "optimizer": self.SETTINGS["optimizer"]}
        assert equal(buffered, train(1, **usual)[1])

    @pytest.mark.parametrize("server_mode", ["sequential", "frozen"])
    def test_every_client_ends_with_the_last_merges_layers(self, train: Callable[..., Any], server_mode: str) -> None:
        settings = {**self.SETTINGS, "federation": {**self.SETTINGS["federation"], "server_mode": server_mode}}
        settings["federation"]["num_rounds"] = 5
        finished, trained = train(3, **settings, strategy={"buffer_size": 2})
        found = merges(finished)
        assert [merge["round"] for merge in found] == [1, 2, 3, 4, 5]
        assert all(merge["accepted"] and len(merge["uploads"]) == 2 for merge in found)
        weighed = [sum(merge["clients"].values()) for merge in found]
        assert weighed == [2 * 12] * 5
        held = [held_by(finished, f"clinic-{number}") for number in range(3)]
        assert equal(held[0], held[1])
        assert equal(held[0], held[2])
        assert all(torch.equal(trained[name], held[0][name]) for name in held[0])
        report = json.loads((finished.run_dir / "report.json").read_text())
        assert all(merge["equal"] for merge in report["merges"])
        assert not list((finished.run_dir / "versions").iterdir())
        assert not (finished.run_dir / "uploads").exists()


class TestMergeParts:
    def test_everything_by_default(self, train: Callable[..., Any]) -> None:
        finished, _ = train()
        assert spread(finished, "lora") == 0.0

    def test_personal_bottoms(self, train: Callable[..., Any]) -> None:
        finished, trained = train(merge={"parts": ["top"]})
        report = json.loads((finished.run_dir / "report.json").read_text())
        assert report["merges"]
        assert all(merge["equal"] for merge in report["merges"])  # personal parts are not compared
        assert spread(finished, ".layers.3.") == 0.0
        assert spread(finished, ".layers.0.") > 0.0
        assert not any(".layers.0." in name for name in trained)
        assert any(".layers.3." in name for name in trained)

    def test_the_export_has_the_checkpoints_tensors_where_a_part_is_personal(
        self, train: Callable[..., Any], tmp_path: Path
    ) -> None:
        finished, _ = train(merge={"parts": ["top"]}, server={"export_model": True})
        before = load_file(tmp_path / "model" / "model.safetensors")
        after = load_file(finished.run_dir / "model" / "model.safetensors")
        changed = {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"1", "2", "3"}

    def test_all_personal(self, train: Callable[..., Any]) -> None:
        finished, trained = train(merge={"parts": []})
        assert spread(finished, ".layers.3.") > 0.0
        assert all(merge["accepted"] and merge["num_tensors"] == 0 for merge in merges(finished))
        assert all(".layers.1." in name or ".layers.2." in name for name in trained)

    def test_one_client_trains_alike_whatever_is_merged(self, train: Callable[..., Any]) -> None:
        held = [held_by(train(1, merge={"parts": parts})[0], "clinic-0") for parts in (["bottom", "top"], ["top"], [])]
        assert equal(held[0], held[1])
        assert equal(held[0], held[2])
