"""SCAFFOLD: algorithm 1 of the paper on quadratics, its laws, and what FedAvg misses where clients are unlike.

The reference is written from the paper (arXiv:1910.06378, algorithm 1, option II) in numpy float64. The tests are of
the client's `Controls` and the server's `Layers`, with plain SGD between them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folding import Folding
from packed import packed
from torch import Tensor, nn

from client_edge.layers.controls import Controls
from splitfl.config.identity import StrategyName
from splitfl.config.sections import FederationSection, StrategySection
from splitfl.federation.strategies import strategy_for
from splitfl.protocol.messages import Upload

SHAPES = {"bottom.weight": (3, 2), "top.bias": (4,)}
SIZE = 10
Array = np.ndarray[Any, np.dtype[np.float64]]


class Quadratic:
    """A client's loss: a / 2 (x - b)², value by value, a and b its own."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.curvature = draw.uniform(0.2, 1.8, SIZE)
        self.optimum = draw.normal(0.0, 3.0, SIZE)

    def gradient(self, at: Array) -> Array:
        return self.curvature * (at - self.optimum)


def best_for_all(clients: Sequence[Quadratic]) -> Array:
    curvatures = np.stack([client.curvature for client in clients])
    optima = np.stack([client.optimum for client in clients])
    return np.asarray((curvatures * optima).sum(0) / curvatures.sum(0))


def algorithm_1(
    clients: Sequence[Quadratic], rounds: Sequence[Sequence[int]], rates: Sequence[float], server_rate: float
) -> tuple[list[Array], Array, list[Array]]:
    """Return x after each round, and c and all c_i in the end; `rates` are of a round's steps."""
    x, c = np.zeros(SIZE), np.zeros(SIZE)
    own = [np.zeros(SIZE) for _ in clients]
    history = []
    for sampled in rounds:
        ways, changes = [], []
        for i in sampled:
            y = x.copy()
            for rate in rates:
                y = y - rate * (clients[i].gradient(y) - own[i] + c)
            new = own[i] - c + (x - y) / sum(rates)
            ways.append(y - x)
            changes.append(new - own[i])
            own[i] = new
        x = x + server_rate * np.mean(ways, axis=0)
        c = c + len(sampled) / len(clients) * np.mean(changes, axis=0)
        history.append(x)
    return history, c, own


def flat(layers: Mapping[str, Tensor] | Sequence[Tensor]) -> Array:
    tensors = layers.values() if isinstance(layers, Mapping) else layers
    return np.asarray(torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors]).numpy())


def shaped(values: Array, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    parts = torch.from_numpy(values).split([6, 4])
    return {name: part.reshape(shape).to(dtype) for part, (name, shape) in zip(parts, SHAPES.items(), strict=True)}


class Party:
    """One client of ours: layers, controls, and plain SGD on its quadratic."""

    def __init__(self, loss: Quadratic, dtype: torch.dtype = torch.float32, *, has_controls: bool = True) -> None:
        self.loss = loss
        self.layers = {name: nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, shape in SHAPES.items()}
        self.controls = Controls(self.layers if has_controls else {})
        self.rate = 0.0

    def step(self, rate: float, coefficient: float = 1.0) -> None:
        gradients = shaped(self.loss.gradient(flat(self.layers)))
        for name, parameter in self.layers.items():
            parameter.grad = gradients[name].to(parameter.dtype)
        self.controls.change(1)
        self.controls.stepped(rate * coefficient)
        with torch.no_grad():
            for parameter in self.layers.values():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad.mul_(coefficient), alpha=rate)
        self.rate += rate * coefficient

    def begin(self) -> None:
        self.rate = 0.0

    def load(self, merger: Folding, *, counted: bool) -> None:
        self.controls.round_ends(counted=counted)
        with torch.no_grad():
            for name, layer in merger.layers.held.items():
                self.layers[name].copy_(layer)
        self.controls.round_begins(merger.layers.controls())
        self.begin()

    @property
    def own(self) -> Array:
        """Its c_i."""
        return flat([tensor for name, tensor in self.controls.state().items() if name.startswith("own_control/")])


class Federation:
    """A server's merger and its parties."""

    def __init__(
        self,
        folder: Path,
        losses: Sequence[Quadratic],
        *,
        name: StrategyName = "SCAFFOLD",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        strategy = strategy_for(FederationSection(strategy=name), StrategySection(**options), 0)
        self.merger = Folding.of(strategy, shaped(np.zeros(SIZE), dtype), folder, "uniform")
        self.parties = [Party(loss, dtype, has_controls=name == "SCAFFOLD") for loss in losses]
        self.num_clients = len(losses)
        for party in self.parties:
            party.begin()

    def upload(self, number: int) -> str:
        client_id = f"clinic-{number:02}"
        frames = tuple(packed(layer, 1 << 10) for layer in self.parties[number].layers.values())
        self.merger.spool(client_id, Upload(round_number=1, num_examples=1, num_tokens=1, layers=frames))
        return client_id

    def merge(self, trained: Sequence[int]) -> None:
        named = {self.upload(number): number for number in trained}
        rates = {client_id: self.parties[number].rate for client_id, number in named.items()}
        self.merger.merge(list(named), rates=rates, num_clients=self.num_clients)
        for number, party in enumerate(self.parties[: self.num_clients]):
            party.load(self.merger, counted=number in trained)

    def round(self, sampled: Sequence[int], rates: Sequence[float]) -> Array:
        for number in sampled:
            for rate in rates:
                self.parties[number].step(rate)
        self.merge(sampled)
        return flat(self.merger.layers.held)

    @property
    def control(self) -> Array:
        """The server's c."""
        return flat(self.merger.layers.controls())


LOSSES = [Quadratic(seed) for seed in range(6)]
SOME_ROUNDS = [(0, 3), (1, 4, 5), (2,), (0, 1, 2, 3, 4, 5), (3, 5), (0, 2, 4), (1,), (0, 5)]


class TestAgainstThePaper:
    @pytest.mark.parametrize("server_rate", [1.0, 0.6])
    @pytest.mark.parametrize("rates", [(0.1,) * 5, (0.2, 0.1, 0.05)])
    def test_some_clients_a_round(self, tmp_path: Path, rates: tuple[float, ...], server_rate: float) -> None:
        ours = Federation(tmp_path, LOSSES, server_learning_rate=server_rate)
        expected, control, own = algorithm_1(LOSSES, SOME_ROUNDS, rates, server_rate)
        for sampled, x in zip(SOME_ROUNDS, expected, strict=True):
            np.testing.assert_allclose(ours.round(sampled, rates), x, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours.control, control, rtol=1e-4, atol=1e-5)
        for party, expected_own in zip(ours.parties, own, strict=True):
            np.testing.assert_allclose(party.own, expected_own, rtol=1e-4, atol=1e-5)


class TestLaws:
    def test_one_client_is_plain_sgd_to_the_bit(self, tmp_path: Path) -> None:
        ours, alone = Federation(tmp_path, LOSSES[:1]), Federation(tmp_path, LOSSES[:1], name="FedAvg")
        for _ in range(5):
            np.testing.assert_array_equal(ours.round([0], (0.1, 0.05, 0.2)), alone.round([0], (0.1, 0.05, 0.2)))
        assert np.abs(ours.control).max() > 0.01

    def test_the_first_round_is_fed_avgs_to_the_bit_and_the_second_is_not(self, tmp_path: Path) -> None:
        ours, plain = Federation(tmp_path, LOSSES), Federation(tmp_path, LOSSES, name="FedAvg")
        everyone = range(len(LOSSES))
        np.testing.assert_array_equal(ours.round(everyone, [0.1] * 4), plain.round(everyone, [0.1] * 4))
        assert np.abs(ours.round(everyone, [0.1] * 4) - plain.round(everyone, [0.1] * 4)).max() > 1e-2

    def test_the_servers_control_is_the_mean_of_the_clients(self, tmp_path: Path) -> None:
        ours = Federation(tmp_path, LOSSES)
        for sampled in [range(len(LOSSES)), *SOME_ROUNDS]:
            ours.round(sampled, (0.1, 0.1, 0.1))
            mean = np.mean([party.own for party in ours.parties], axis=0)
            np.testing.assert_allclose(ours.control, mean, rtol=1e-4, atol=1e-5)

    def test_it_stays_the_mean_when_clients_join_later(self, tmp_path: Path) -> None:
        ours = Federation(tmp_path, LOSSES)
        for num_clients, sampled in ((2, (0, 1)), (2, (0,)), (5, (0, 3)), (6, (4, 5))):
            for number in range(ours.num_clients, num_clients):
                ours.parties[number].load(ours.merger, counted=False)
            ours.num_clients = num_clients
            ours.round(sampled, (0.1, 0.1))
            mean = np.mean([party.own for party in ours.parties[:num_clients]], axis=0)
            np.testing.assert_allclose(ours.control, mean, rtol=1e-4, atol=1e-5)

    def test_equal_clients_are_not_corrected(self, tmp_path: Path) -> None:
        ours = Federation(tmp_path, [LOSSES[0]] * 3)
        for _ in range(4):
            ours.round(range(3), (0.1, 0.1))
        assert max(np.abs(ours.control - party.own).max() for party in ours.parties) < 1e-5

    def test_a_clipped_rounds_control_is_the_mean_gradient_weighted_by_what_each_was_multiplied_by(
        self, tmp_path: Path
    ) -> None:
        ours = Federation(tmp_path, LOSSES[:1])
        party, seen = ours.parties[0], []
        for rate, coefficient in ((0.1, 0.5), (0.2, 1.0), (0.1, 0.25)):
            seen.append((rate * coefficient, party.loss.gradient(flat(party.layers))))
            party.step(rate, coefficient)
        ours.merge([0])
        mean = sum(weight * gradient for weight, gradient in seen) / sum(weight for weight, _ in seen)
        np.testing.assert_allclose(ours.control, mean, rtol=1e-4)
        np.testing.assert_allclose(party.own, mean, rtol=1e-4)

    def test_who_took_no_step_changes_no_control(self, tmp_path: Path) -> None:
        ours = Federation(tmp_path, LOSSES[:2])
        ours.round([0, 1], [0.1])
        before, own = ours.control, ours.parties[1].own
        ours.merge([1])
        np.testing.assert_array_equal(ours.parties[1].own, own)
        np.testing.assert_allclose(ours.control, before, rtol=1e-6)

    def test_controls_of_bfloat16_layers_are_float32(self, tmp_path: Path) -> None:
        ours = Federation(tmp_path, LOSSES[:2], dtype=torch.bfloat16)
        for _ in range(3):
            ours.round([0, 1], (0.1, 0.1))
        assert {layer.dtype for layer in ours.merger.layers.held.values()} == {torch.bfloat16}
        assert {control.dtype for control in ours.merger.layers.controls()} == {torch.float32}
        np.testing.assert_allclose(ours.control, np.mean([party.own for party in ours.parties], axis=0), atol=1e-5)


class TestUnlikeClients:
    """The paper's reason to be: many local steps on unlike losses lead FedAvg somewhere else."""

    STEPS = (0.1,) * 20

    def distance(self, federation: Federation, rounds: Sequence[Sequence[int]]) -> float:
        for sampled in rounds:
            federation.round(sampled, self.STEPS)
        return float(np.abs(flat(federation.merger.layers.held) - best_for_all(LOSSES)).max())

    def test_fed_avg_stays_away_from_the_best_and_scaffold_finds_it(self, tmp_path: Path) -> None:
        everyone = [range(len(LOSSES))] * 20
        plain, corrected = (Federation(tmp_path, LOSSES, name=name) for name in ("FedAvg", "SCAFFOLD"))
        assert self.distance(plain, everyone) > 0.2
        assert self.distance(corrected, everyone) < 1e-3

    def test_with_half_of_the_clients_a_round_too(self, tmp_path: Path) -> None:
        draw = np.random.default_rng(0)
        halves = [sorted(draw.choice(len(LOSSES), 3, replace=False)) for _ in range(60)]
        plain, corrected = (Federation(tmp_path, LOSSES, name=name) for name in ("FedAvg", "SCAFFOLD"))
        distances = self.distance(plain, halves), self.distance(corrected, halves)
        assert distances[0] > 0.2
        assert distances[1] < 1e-2


class TestWhatOutlivesARestart:
    def test_a_restarted_server_goes_on_with_the_same_bits(self, tmp_path: Path) -> None:
        through, restarted = (Federation(tmp_path / name, LOSSES[:3]) for name in "ab")
        for federation in (through, restarted):
            federation.round((0, 2), (0.1, 0.1))
        before = restarted.merger
        restarted.merger = Federation(tmp_path / "b", LOSSES[:3]).merger
        restarted.merger.layers.restore(dict(before.layers.held), dict(before.layers.state))
        np.testing.assert_array_equal(through.control, restarted.control)
        for federation in (through, restarted):
            federation.round((0, 1), (0.1, 0.1))
        np.testing.assert_array_equal(flat(through.merger.layers.held), flat(restarted.merger.layers.held))
        np.testing.assert_array_equal(through.control, restarted.control)

    def test_a_restarted_client_too(self) -> None:
        before, after = Party(LOSSES[0]), Party(LOSSES[0])
        before.begin()
        before.step(0.1)
        before.controls.round_ends(counted=True)
        before.controls.round_begins(list(shaped(np.zeros(SIZE)).values()))
        before.begin()
        before.step(0.1)
        after.controls.restore({name: tensor.clone() for name, tensor in before.controls.state().items()})
        assert before.controls.state().keys() == after.controls.state().keys()
        for name, tensor in before.controls.state().items():
            assert torch.equal(tensor, after.controls.state()[name])
