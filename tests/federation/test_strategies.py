"""Every strategy: laws that hold for any layers, Flower's arithmetic, and memory that does not grow with clients."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from folding import Folding
from packed import packed
from torch import Tensor

from server_backbone.merging.uploads import Seen
from splitfl.config.identity import StrategyName
from splitfl.config.sections import FederationSection, StrategySection
from splitfl.errors import ConfigError
from splitfl.federation.strategies import STRATEGIES, strategy_for
from splitfl.federation.strategies.fed_buff import Rebased, staleness_scale
from splitfl.federation.strategy import Strategy
from splitfl.federation.updates import Update, weighted_mean
from splitfl.protocol.messages import Upload

MIB = 1 << 20
SHAPES = {"bottom.weight": (7, 5), "top.bias": (9,), "scale": ()}
SERVER_OPTIMIZERS: list[StrategyName] = ["FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"]
MEANS: list[StrategyName] = ["FedAvg", "FedProx", "SCAFFOLD", "FedBuff", "NormClippedMean"]
UNWEIGHTED: list[StrategyName] = ["FedMedian", "FedTrimmedAvg"]
CHOOSERS: list[StrategyName] = ["Krum", "MultiKrum"]
STATELESS = MEANS + UNWEIGHTED + CHOOSERS


def strategy(name: StrategyName, **options: Any) -> Strategy:
    return strategy_for(FederationSection(strategy=name), StrategySection(**options), 0)


def layers(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def near(held: Mapping[str, Tensor], seed: int, distance: float) -> dict[str, Tensor]:
    return {name: held[name] + distance * other for name, other in layers(seed).items()}


def single(*values: float) -> list[Update]:
    return [({"x": torch.tensor([value])}, 1.0) for value in values]


def merged(name: StrategyName, updates: Sequence[Update], held: float = 0.0, **options: Any) -> float:
    folded = strategy(name, **options).aggregate_train(updates, {"x": torch.tensor([held])}, {})
    return folded.layers["x"].item()


def is_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return list(first) == list(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


class TestLaws:
    def test_every_name_of_the_config_has_a_strategy(self) -> None:
        assert {type(strategy(name)) for name in STRATEGIES} == set(STRATEGIES.values())
        assert set(MEANS + UNWEIGHTED + CHOOSERS + SERVER_OPTIMIZERS) == set(STRATEGIES)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("num_clients", [3, 4, 7])
    @pytest.mark.parametrize("name", STATELESS)
    def test_the_mean_of_equals_is_the_same_bits(
        self, name: StrategyName, num_clients: int, dtype: torch.dtype
    ) -> None:
        equal, held = layers(1, dtype), layers(1, dtype)
        updates = [(equal, 10.0 * number + 3) for number in range(num_clients)]
        assert is_same(strategy(name).aggregate_train(updates, held, {}).layers, equal)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", STRATEGIES)
    def test_where_nobody_moved_nothing_moves(self, name: StrategyName, dtype: torch.dtype) -> None:
        held = layers(1, dtype)
        folded = strategy(name).aggregate_train([(layers(1, dtype), n) for n in (1, 2, 3)], held, {})
        assert is_same(folded.layers, held)

    @pytest.mark.parametrize("name", MEANS + UNWEIGHTED)
    def test_one_client_is_the_identity(self, name: StrategyName) -> None:
        held = layers(0)
        own = near(held, 1, 1e-2)
        assert is_same(strategy(name).aggregate_train([(own, 13)], held, {}).layers, own)

    def test_one_client_is_the_identity_for_momentum_of_none(self) -> None:
        assert merged("FedAvgM", single(2.5), held=1.0, server_momentum=0.0) == 2.5

    @pytest.mark.parametrize("name", [*MEANS, "FedAvgM", *CHOOSERS[1:]])
    def test_the_weights_are_the_examples(self, name: StrategyName) -> None:
        updates = [({"x": torch.tensor([value])}, weight) for value, weight in ((0.0, 1), (0.4, 3), (0.4, 4))]
        assert merged(name, updates) == pytest.approx(0.35)

    @pytest.mark.parametrize("name", UNWEIGHTED)
    def test_or_nothing_where_the_rule_has_no_weights(self, name: StrategyName) -> None:
        one, other = ([({"x": torch.tensor([v])}, w) for v, w in zip((1.0, 2.0, 9.0), ws, strict=True)]
                      for ws in ((1, 1, 1), (5, 1, 90)))  # fmt: skip
        assert merged(name, one) == merged(name, other)

    @pytest.mark.parametrize("name", STRATEGIES)
    def test_what_is_given_is_not_changed(self, name: StrategyName) -> None:
        rule, held, updates = strategy(name), layers(0), [(layers(seed), 1.0) for seed in (1, 2, 3)]
        state = rule.aggregate_train(updates, held, {}).state
        before = {key: value.clone() for key, value in state.items()}
        rule.aggregate_train(updates, held, state)
        assert is_same(state, before)
        assert is_same(held, layers(0))
        assert all(is_same(given, layers(seed)) for (given, _), seed in zip(updates, (1, 2, 3), strict=True))

    @pytest.mark.parametrize("name", STRATEGIES)
    @pytest.mark.parametrize(
        ("updates", "rule"),
        [
            ([], "nothing to merge"),
            ([(layers(1), 1), ({"scale": torch.zeros(())}, 1)], "same names in the same order"),
            ([({"x": torch.zeros(2)}, 1), ({"x": torch.zeros(3)}, 1)], r"x: shapes \(2,\) and \(3,\) cannot be merged"),
        ],
    )
    def test_what_cannot_be_merged(self, name: StrategyName, updates: list[Any], rule: str) -> None:
        held = {"x": torch.zeros(2)} if updates and "x" in updates[0][0] else layers(0)
        with pytest.raises(ConfigError, match=rule):
            strategy(name).aggregate_train(updates, held, {})


class TestFedBuff:
    """Against algorithm 1 of arXiv:2106.06639: w + rate / K * sum of changes, scaled by 1 / sqrt(1 + staleness)."""

    def test_a_stale_change_counts_less(self) -> None:
        assert [staleness_scale(staleness) for staleness in (0, 1, 3, 8)] == [1.0, pytest.approx(2**-0.5), 0.5, 1 / 3]

    def test_it_takes_the_papers_step(self) -> None:
        versions = {5: 1.0, 6: 3.0, 8: 10.0}  # of a layer of one value; 8 is the newest
        buffer = [(8, 12.0), (6, 3.5), (5, 0.0)]  # begun with, uploaded
        held = {"x": torch.tensor([versions[8]])}
        updates = [
            (Rebased({"x": torch.tensor([up])}, {"x": torch.tensor([versions[begun]])}, held, 8 - begun), 1.0)
            for begun, up in buffer
        ]
        changes = [(up - versions[begun]) / (1 + 8 - begun) ** 0.5 for begun, up in buffer]
        for rate in (1.0, 0.3):
            folded = strategy("FedBuff", server_learning_rate=rate).aggregate_train(updates, held, {})
            assert folded.layers["x"].dtype == torch.float32
            assert folded.layers["x"].item() == pytest.approx(10.0 + rate * sum(changes) / 3, abs=1e-6)
            assert not folded.state

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_with_nothing_stale_it_is_fed_avg_to_the_bit(self, dtype: torch.dtype) -> None:
        held = layers(0, dtype)
        updates = [(layers(seed, dtype), float(seed)) for seed in (1, 2, 3)]
        fresh = [(Rebased(layers, held, held, 0), weight) for layers, weight in updates]
        assert is_same(strategy("FedBuff").aggregate_train(fresh, held, {}).layers, weighted_mean(updates))

    def test_who_has_not_moved_moves_nothing_however_stale(self) -> None:
        old, held = layers(1), layers(2)
        assert is_same(strategy("FedBuff").aggregate_train([(Rebased(old, old, held, 7), 3.0)], held, {}).layers, held)


class TestFoldingWithEveryStrategy:
    @pytest.mark.parametrize("name", STRATEGIES)
    def test_arrival_never_matters(self, name: StrategyName, tmp_path: Path) -> None:
        results = []
        for order in itertools.permutations((1, 2, 3)):
            merger = Folding.of(strategy(name), layers(0), tmp_path, "num_examples")
            for seed in order:
                frames = tuple(packed(layer, 1 << 10) for layer in layers(seed).values())
                upload = Upload(round_number=1, num_examples=seed, num_tokens=1, layers=frames)
                merger.spool(f"clinic-{seed}", upload)
            merger.merge([f"clinic-{seed}" for seed in order])
            results.append((dict(merger.layers.held), dict(merger.layers.state)))
        assert all(is_same(one, results[0][0]) and is_same(state, results[0][1]) for one, state in results)

    @pytest.mark.parametrize("name", ["FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum"])
    def test_who_weighs_nothing_is_not_counted(self, name: StrategyName, tmp_path: Path) -> None:
        merger = Folding.of(strategy(name), {"x": torch.zeros(1)}, tmp_path, "num_tokens")
        for client_id, value, num_tokens in (("a", 1.0, 3), ("b", 1.0, 3), ("c", 1.0, 3), ("d", 5.0, 0), ("e", 5.0, 0)):
            frames = (packed(torch.tensor([value]), 1 << 10),)
            merger.spool(client_id, Upload(round_number=1, num_examples=1, num_tokens=num_tokens, layers=frames))
        weights = merger.uploads.weights_of("abcde")
        assert merger.layers.strategy.objection(list(weights.values())) == ""
        assert merger.merge("abcde").used == {"a": 3, "b": 3, "c": 3}
        assert merger.layers.held["x"].item() == 1.0

    @pytest.mark.parametrize(
        ("weight_by", "share", "weight"),
        [
            ("num_examples", 1.0, 30),
            ("num_examples", 0.25, 7.5),
            ("num_tokens", 0.25, 11),
            ("uniform", 1.0, 1),
            ("uniform", 0.25, 1),
        ],
    )
    def test_what_weighs_an_upload(self, weight_by: Any, share: float, weight: float, tmp_path: Path) -> None:
        """With the share of the round's steps that are done; only finished steps' tokens count anyway."""
        merger = Folding.of(strategy("FedAvg"), {"x": torch.zeros(1)}, tmp_path, weight_by)
        frames = (packed(torch.ones(1), 1 << 10),)
        upload = Upload(round_number=1, num_examples=30, num_tokens=11, layers=frames)
        assert merger.spool("a", upload, Seen(share=share)).weight == weight

    @pytest.mark.parametrize(("weight_by", "weight"), [("num_examples", 30.0), ("num_tokens", 70.0), ("uniform", 1.0)])
    def test_no_claim_goes_beyond_what_the_server_has_seen(self, tmp_path: Path, weight_by: Any, weight: float) -> None:
        merger = Folding.of(strategy("FedAvg"), {"x": torch.zeros(1)}, tmp_path, weight_by)
        upload = Upload(round_number=1, num_examples=2**61, num_tokens=2**62, layers=(packed(torch.ones(1), 1 << 10),))
        seen = Seen(num_examples=60, num_tokens=70, share=0.5)
        assert merger.spool("a", upload, seen).weight == weight

    @pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in UNWEIGHTED + CHOOSERS])
    def test_nobody_is_more_than_half_of_three(self, name: StrategyName, tmp_path: Path) -> None:
        """Whatever one claims, the merge is the one in which it weighs as much as the two others together."""
        for which in ("claimed", "held down"):
            (tmp_path / which).mkdir()
        merger, reference = (
            Folding.of(strategy(name), {"x": torch.zeros(1)}, tmp_path / which, "num_examples")
            for which in ("claimed", "held down")
        )
        for each, claim in ((merger, 2**61), (reference, 7 + 12)):
            for client_id, value, examples in (("a", 1.0, 7), ("b", 2.0, 12), ("liar", 50.0, claim)):
                layers = (packed(torch.full((1,), value), 1 << 10),)
                each.spool(
                    client_id, Upload(round_number=1, num_examples=examples, num_tokens=1, layers=layers), Seen()
                )
        weighed = merger.merge(["a", "b", "liar"])
        assert weighed.used == reference.merge(["a", "b", "liar"]).used == {"a": 7, "b": 12, "liar": 19}
        assert weighed.lowered == {"liar": 2**61}
        assert is_same(merger.layers.held, reference.layers.held)

    def test_multi_krum_bounds_those_it_keeps(self) -> None:
        updates = [({"x": torch.tensor([value])}, weight) for value, weight in ((0.0, 1), (0.1, 1), (0.2, 2), (9.0, 4))]
        kept = strategy("MultiKrum", num_malicious_clients=1).aggregate_train(updates, {"x": torch.zeros(1)}, {})
        assert kept.layers["x"].item() == pytest.approx((0.0 + 0.1 + 2 * 0.2) / 4)
        updates[2] = updates[2][0], 2**61
        kept = strategy("MultiKrum", num_malicious_clients=1).aggregate_train(updates, {"x": torch.zeros(1)}, {})
        assert kept.layers["x"].item() == pytest.approx((0.0 + 0.1 + 2 * 0.2) / 4)

    @pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
    def test_a_restart_changes_nothing(self, name: StrategyName, tmp_path: Path) -> None:
        def merger() -> Folding:
            return Folding.of(strategy(name), layers(0), tmp_path, "uniform")

        def merge(into: Folding, seed: int) -> None:
            frames = tuple(packed(layer, 1 << 10) for layer in layers(seed).values())
            into.spool("a", Upload(round_number=1, num_examples=1, num_tokens=1, layers=frames))
            into.merge(["a"])

        through, forgetful = merger(), merger()
        merge(through, 1)
        forgetful.layers.restore(through.layers.held, {})
        restarted = merger()
        restarted.layers.restore(through.layers.held, through.layers.state)
        for each in (through, restarted, forgetful):
            merge(each, 2)
        assert is_same(restarted.layers.held, through.layers.held)
        assert not is_same(forgetful.layers.held, through.layers.held)


class TestRobustRules:
    @pytest.mark.parametrize(("values", "median"), [((5, 1, 100), 5), ((4, 1, 100, 2), 3), ((7, 9), 8)])
    def test_the_median(self, values: tuple[float, ...], median: float) -> None:
        assert merged("FedMedian", single(*values)) == median

    def test_the_trimmed_mean(self) -> None:
        assert merged("FedTrimmedAvg", single(-1000, 1, 2, 6, 1000), beta=0.2) == 3

    def test_too_few_to_trim(self) -> None:
        assert merged("FedTrimmedAvg", single(1, 2, 3, 14), beta=0.2) == 5

    def test_krum_takes_the_one_in_the_crowd(self) -> None:
        assert merged("Krum", single(1.0, 1.25, 1.125, 50.0, 1.5), num_malicious_clients=1) == 1.125

    def test_multi_krum_leaves_the_far_one_out(self) -> None:
        assert merged("MultiKrum", single(1.0, 1.25, 1.125, 50.0, 1.625), num_malicious_clients=1) == 1.25

    def test_multi_krum_keeps_as_many_as_it_is_told(self) -> None:
        options = {"num_malicious_clients": 1, "num_clients_to_keep": 2}
        assert merged("MultiKrum", single(1.0, 1.25, 1.125, 50.0, 9.0), **options) == 1.0625

    def test_a_change_is_clipped_to_the_norm_over_all_layers(self) -> None:
        held = {"x": torch.zeros(1), "y": torch.zeros(1)}
        update = {"x": torch.tensor([3.0]), "y": torch.tensor([4.0])}
        folded = strategy("NormClippedMean", clipping_norm=2.5).aggregate_train([(update, 1.0)], held, {})
        assert [value.item() for value in folded.layers.values()] == [1.5, 2.0]

    def test_unclipped_it_is_fed_avg_to_the_bit(self) -> None:
        updates = [(layers(seed), float(seed)) for seed in (1, 2, 3)]
        folded = strategy("NormClippedMean", clipping_norm=1e6).aggregate_train(updates, layers(0), {})
        assert is_same(folded.layers, weighted_mean(updates))

    @pytest.mark.parametrize("name", [*UNWEIGHTED, "Krum", "NormClippedMean"])
    def test_one_of_five_cannot_carry_the_merge_away(self, name: StrategyName) -> None:
        options = {"num_malicious_clients": 1} if name == "Krum" else {}
        assert abs(merged(name, single(0.9, 1.0, 1.1, 1.05, 1e9), held=1.0, **options) - 1.0) < 0.25
        assert merged("FedAvg", single(0.9, 1.0, 1.1, 1.05, 1e9)) > 1e8


class TestObjections:
    @pytest.mark.parametrize("name", ["Krum", "MultiKrum"])
    def test_krum_with_too_few_clients(self, name: StrategyName) -> None:
        rule = strategy(name, num_malicious_clients=1)
        assert rule.objection([1.0] * 4) == f"4 clients finished, {name} with num_malicious_clients = 1 needs 5"
        assert rule.objection([1.0] * 5) == ""

    def test_fewer_than_are_to_be_kept(self) -> None:
        assert strategy("MultiKrum", num_clients_to_keep=6).objection([1.0] * 5) == (
            "5 clients finished, MultiKrum has num_clients_to_keep = 6"
        )

    @pytest.mark.parametrize("name", STRATEGIES)
    def test_one_client_alone_is_merged_or_refused_in_a_sentence(self, name: StrategyName) -> None:
        rule = strategy(name)
        if name in CHOOSERS:
            assert rule.objection([7.0]) == f"1 client finished, {name} with num_malicious_clients = 0 needs 3"
            return
        assert rule.objection([7.0]) == ""
        own = near(layers(0), 1, 1e-2)
        folded = rule.aggregate_train([(own, 7.0)], layers(0), {})
        assert all(tensor.isfinite().all() for tensor in folded.layers.values())

    @pytest.mark.parametrize("name", STRATEGIES)
    def test_no_weight_at_all(self, name: StrategyName) -> None:
        assert "no upload weighs anything" in strategy(name).objection([0.0, 0.0, 0.0])
        assert strategy(name).objection([0.0, 1.0, 0.0]) == ""


REFERENCE = json.loads(Path(__file__).with_name("flower_reference.json").read_text(encoding="utf-8"))
OURS = {"num_malicious_nodes": "num_malicious_clients", "num_nodes_to_select": "num_clients_to_keep"}


def from_reference(flat: dict[str, list[float]]) -> dict[str, Tensor]:
    return {name: torch.tensor(values).reshape(REFERENCE["shapes"][name]) for name, values in flat.items()}


@pytest.mark.parametrize("name", REFERENCE["merges"])
def test_flower_comes_to_the_same(name: StrategyName) -> None:
    """On the same arrays over three rounds, up to float32, in which Flower adds up."""
    options = {OURS.get(key, key): value for key, value in REFERENCE["merges"][name]["options"].items()}
    options["max_client_weight"] = 1.0  # Flower bounds no weight
    rule, held, state = strategy(name, **options), from_reference(REFERENCE["first"]), {}
    for round_, expected in zip(REFERENCE["rounds"], REFERENCE["merges"][name]["layers"], strict=True):
        updates = [(from_reference(each["layers"]), each["weight"]) for each in round_]
        folded = rule.aggregate_train(updates, held, state)
        torch.testing.assert_close(folded.layers, from_reference(expected), rtol=1e-5, atol=2e-6)
        held, state = folded.layers, folded.state


MEASURE = """
import sys
from pathlib import Path
import torch
from splitfl.config.sections import FederationSection, StrategySection
from splitfl.federation.strategies import strategy_for
from splitfl.models.checkpoint import TensorFile, save_tensors
from splitfl.telemetry.memory import peak_rss_bytes, rss_bytes

held = {f"layer-{number}": torch.zeros(1 << 15) for number in range(24)}  # 3 MiB
files = [Path(sys.argv[1]) / f"{client}.safetensors" for client in range(12)]
for file in files:
    save_tensors(file, {name: torch.ones(1 << 15) for name in held})
for name in sys.argv[2:]:
    strategy = strategy_for(FederationSection(strategy=name), StrategySection(), 0)
    for clients in (4, 12):
        updates = [(TensorFile(file), 1.0) for file in files[:clients]]
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        before = rss_bytes()
        folded = strategy.aggregate_train(updates, held, {})
        controls = strategy.aggregate_controls(updates, held, {}, rates=[1.0] * clients, num_clients=clients)
        print(peak_rss_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can count a peak anew")
def test_memory_does_not_grow_with_the_clients(tmp_path: Path) -> None:
    """Means hold one tensor of one client; rules that compare clients one tensor of all: never whole updates."""
    names = ["FedAvg", "SCAFFOLD", "FedAdam", "NormClippedMean", "FedMedian"]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), *names],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # a freed tensor leaves the process at once
        capture_output=True,
        text=True,
        check=True,
    )
    peaks = list(map(int, run.stdout.split()))
    growth = {name: (after - before) / MIB for name, before, after in zip(names, peaks[::2], peaks[1::2], strict=True)}
    assert min(peaks) > 3 * MIB  # the merged layers themselves
    assert max(growth[name] for name in names[:4]) < 1.5  # a single one of the 8 updates more is 3 MiB
    assert growth["FedMedian"] < 8 * 3 / 2
