"""Merging: laws that hold for any layers, and whom a round asks."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from folding import Folding
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import packed
from torch import Tensor

from splitfl.config.sections import FederationSection, StrategySection
from splitfl.errors import ConfigError, RemoteProtocolError
from splitfl.federation.strategies.fed_avg import FedAvg
from splitfl.federation.updates import weighted_mean
from splitfl.protocol.messages import Upload

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = {"bottom.weight": (7, 5), "top.bias": (9,), "scale": ()}


def layers(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def is_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return list(first) == list(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


class TestWeightedMean:
    @pytest.mark.parametrize("dtype", DTYPES)
    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 1000), weights=st.lists(st.integers(1, 100_000), min_size=1, max_size=7))
    def test_the_mean_of_equals_is_the_same_bits(self, dtype: torch.dtype, seed: int, weights: list[int]) -> None:
        equal = layers(seed, dtype)
        assert is_same(weighted_mean([(equal, weight) for weight in weights]), equal)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_one_client_is_the_identity(self, dtype: torch.dtype) -> None:
        assert is_same(weighted_mean([(layers(1, dtype), 13)]), layers(1, dtype))

    def test_the_weights_are_the_examples(self) -> None:
        first, second = {"x": torch.tensor([0.0, 8.0])}, {"x": torch.tensor([4.0, 0.0])}
        assert weighted_mean([(first, 1), (second, 3)])["x"].tolist() == [3.0, 2.0]

    def test_only_proportions_matter(self) -> None:
        updates = [(layers(seed), weight) for seed, weight in ((1, 2), (2, 6))]
        assert is_same(weighted_mean(updates), weighted_mean([(each, weight * 4) for each, weight in updates]))

    def test_a_weight_of_zero_counts_for_nothing(self) -> None:
        assert is_same(weighted_mean([(layers(1), 0), (layers(2), 5)]), layers(2))

    def test_what_is_merged_is_not_changed(self) -> None:
        given_layers = layers(1)
        weighted_mean([(given_layers, 1), (layers(2), 1)])
        assert is_same(given_layers, layers(1))

    def test_sums_lose_nothing_to_float32(self) -> None:
        large, small = {"x": torch.tensor([2.0**24])}, {"x": torch.tensor([1.0])}
        mean = weighted_mean([(large, 1), (small, 1), (small, 1), (small, 1)])["x"]
        assert mean.item() == torch.tensor((2**24 + 3) / 4).item() != 2**22

    @pytest.mark.parametrize(
        ("updates", "rule"),
        [
            ([], "nothing to merge"),
            ([(layers(1), 0)], "not all zero"),
            ([(layers(1), 2), (layers(2), -1)], "must not be negative"),
            ([(layers(1), 1), ({"bottom.weight": torch.zeros(7, 5)}, 1)], "same names in the same order"),
            ([(layers(1), 1), (dict(reversed(layers(2).items())), 1)], "same names in the same order"),
            ([({"x": torch.zeros(2)}, 1), ({"x": torch.zeros(3)}, 1)], r"x: shapes \(2,\) and \(3,\)"),
            ([({"x": torch.zeros(3)}, 1), ({"x": torch.zeros(1)}, 1)], r"x: shapes \(3,\) and \(1,\)"),
        ],
    )
    def test_what_cannot_be_merged(self, updates: list[Any], rule: str) -> None:
        with pytest.raises(ConfigError, match=rule):
            weighted_mean(updates)


class TestFolding:
    """Uploads wait on disk and are folded in the order of the clients' ids."""

    def upload(self, seed: int, **changed: Any) -> Upload:
        frames = tuple(packed(layer, 16) for layer in layers(seed).values())
        usual: dict[str, Any] = {"num_examples": 10 * seed + 1, "num_tokens": 3, "layers": frames}
        return Upload(round_number=1, **{**usual, **changed})

    def merger(self, tmp_path: Path, weight_by: Any = "num_examples") -> Folding:
        return Folding.of(FedAvg(FederationSection(), StrategySection(), 0), layers(0), tmp_path, weight_by)

    def test_arrival_never_matters(self, tmp_path: Path) -> None:
        results = []
        for order in itertools.permutations((1, 2, 3)):
            merger = self.merger(tmp_path, "uniform")
            for seed in order:
                # so far apart that even float64 sums would tell one order from another
                far = {name: layer + {1: 0.0, 2: 2.0**90, 3: -(2.0**90)}[seed] for name, layer in layers(seed).items()}
                frames = tuple(packed(layer, 16) for layer in far.values())
                merger.spool(f"clinic-{seed}", self.upload(seed, layers=frames))
            merger.merge([f"clinic-{seed}" for seed in order])
            results.append(dict(merger.layers.held))
        assert len(results) == 6
        assert all(is_same(result, results[0]) for result in results)

    @pytest.mark.parametrize(
        ("weight_by", "weights"),
        [("num_examples", [11, 21]), ("num_tokens", [3, 3]), ("uniform", [1, 1])],
    )
    def test_what_weighs_is_configured(self, tmp_path: Path, weight_by: str, weights: list[int]) -> None:
        merger = self.merger(tmp_path, weight_by)
        for seed in (2, 1):
            merger.spool(f"clinic-{seed}", self.upload(seed))
        assert merger.merge(["clinic-2", "clinic-1"]).used == dict(zip(["clinic-1", "clinic-2"], weights, strict=True))

    def test_uploads_can_be_forgotten(self, tmp_path: Path) -> None:
        merger = self.merger(tmp_path)
        merger.spool("a", self.upload(1))
        assert list(tmp_path.rglob("a.safetensors"))
        merger.uploads.forget()
        assert list(tmp_path.rglob("*.safetensors")) == []

    def test_an_upload_that_is_not_finite_is_not_spooled(self, tmp_path: Path) -> None:
        bad = tuple(packed(layer / 0, 1 << 10) for layer in layers(1).values())
        with pytest.raises(RemoteProtocolError, match="not finite"):
            self.merger(tmp_path).spool("a", self.upload(1, layers=bad))
        assert list(tmp_path.rglob("*")) == []


class TestConfigureTrain:
    CLIENTS = tuple("abcdefghij")

    def strategy(self, seed: int = 1, **settings: Any) -> FedAvg:
        return FedAvg(FederationSection(**settings), StrategySection(), seed)

    def test_everyone_by_default(self) -> None:
        assert tuple(self.strategy().configure_train(1, self.CLIENTS)) == self.CLIENTS

    @pytest.mark.parametrize(("fraction", "wanted"), [(0.01, 1), (0.25, 2), (0.5, 5), (0.99, 9), (1.0, 10)])
    def test_a_fraction_rounded_down(self, fraction: float, wanted: int) -> None:
        chosen = self.strategy(fraction_train=fraction).configure_train(1, self.CLIENTS)
        assert len(set(chosen)) == wanted
        assert list(chosen) == sorted(chosen)

    def test_at_least_the_clients_a_merge_needs(self) -> None:
        strategy = self.strategy(fraction_train=0.1, min_train_clients=4, min_available_clients=4)
        assert len(strategy.configure_train(1, self.CLIENTS)) == 4

    def test_no_more_than_there_are(self) -> None:
        strategy = self.strategy(fraction_train=0.1, min_train_clients=4, min_available_clients=4)
        assert list(strategy.configure_train(1, ("a", "b"))) == ["a", "b"]

    def test_the_draw_is_the_seeds_and_the_rounds(self) -> None:
        def drawn(seed: int) -> list[tuple[str, ...]]:
            strategy = self.strategy(seed, fraction_train=0.3)
            return [tuple(strategy.configure_train(number, self.CLIENTS)) for number in range(1, 9)]

        assert drawn(1) == drawn(1)
        assert drawn(1) != drawn(2)
        assert len(set(drawn(1))) > 1
