"""No client is more than its share of a merge: laws that hold for any weights."""

import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfl.federation.weights import capped

WEIGHTS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3),
    st.one_of(st.integers(1, 2**62), st.floats(1e-3, 1e18)),
    min_size=1,
    max_size=12,
)
SHARES = st.floats(0.05, 1.0)


def shares_of(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("weights", "share", "wanted"),
    [
        ({"a": 10, "b": 20, "c": 30}, 0.5, {"a": 10, "b": 20, "c": 30}),
        ({"a": 10, "b": 20, "c": 2**61}, 0.5, {"a": 10, "b": 20, "c": 30}),
        # two at the cap: each a quarter of 2 x 30 + 60
        ({"a": 30, "b": 30, "c": 1000, "d": 900}, 0.25, {"a": 30, "b": 30, "c": 30, "d": 30}),
        ({"a": 20, "b": 10, "c": 10, "d": 10, "e": 1000, "f": 900}, 0.25, {"e": 25, "f": 25}),
        # the cap that is drawn for the largest brings the second above it
        ({"a": 1, "b": 10, "c": 100}, 0.4, {"a": 1, "b": 2, "c": 2}),
        # three clients cannot each be less than a third
        ({"a": 1, "b": 10, "c": 100}, 0.2, {"a": 1, "b": 1, "c": 1}),
        # of two the larger cannot be told from a liar
        ({"a": 1, "b": 2**61}, 0.5, {"a": 1, "b": 2**61}),
        ({"a": 7}, 0.5, {"a": 7}),
        ({"a": 1, "b": 2, "c": 2**61}, 1.0, {"a": 1, "b": 2, "c": 2**61}),
    ],
)
def test_examples(weights: dict[str, float], share: float, wanted: dict[str, float]) -> None:
    assert capped(weights, share) == pytest.approx(weights | wanted)


@given(weights=WEIGHTS, share=SHARES)
def test_nobody_is_above_the_cap_or_an_equal_part(weights: dict[str, float], share: float) -> None:
    if len(weights) < 3:
        assert capped(weights, share) == weights
        return
    most = max(share, 1 / len(weights))
    assert max(shares_of(capped(weights, share)).values()) <= most * (1 + 1e-9)


@given(weights=WEIGHTS, share=SHARES)
def test_who_is_below_keeps_its_weight_and_those_above_share_one(weights: dict[str, float], share: float) -> None:
    used = capped(weights, share)
    lowered = {name for name in weights if used[name] != weights[name]}
    assert all(0 < used[name] < weights[name] for name in lowered)
    assert len({used[name] for name in lowered}) <= 1
    assert all(used[kept] <= used[name] for name in lowered for kept in weights.keys() - lowered)
    if lowered and share * len(weights) > 1.001:  # they are exactly at the cap, and no lower
        assert shares_of(used)[next(iter(lowered))] == pytest.approx(share)


@given(weights=WEIGHTS, share=SHARES, draw=st.randoms(use_true_random=False))
def test_no_order_of_the_clients_matters(weights: dict[str, float], share: float, draw: random.Random) -> None:
    names = list(weights)
    draw.shuffle(names)
    assert capped({name: weights[name] for name in names}, share) == capped(weights, share)


@given(number=st.integers(1, 20), weight=st.integers(1, 2**62), share=SHARES)
def test_equal_weights_stay_as_they_are(number: int, weight: int, share: float) -> None:
    equal = {str(each): weight for each in range(number)}
    assert capped(equal, share) == equal


@given(weights=WEIGHTS, share=SHARES)
def test_who_weighs_more_never_counts_less(weights: dict[str, float], share: float) -> None:
    used = capped(weights, share)
    assert all(used[low] <= used[high] for low in weights for high in weights if weights[low] <= weights[high])


@given(weights=WEIGHTS, share=SHARES, more=st.floats(1.0, 1e6))
def test_a_larger_claim_never_lowers_ones_own_part(weights: dict[str, float], share: float, more: float) -> None:
    name = min(weights)
    before = shares_of(capped(weights, share))[name]
    after = shares_of(capped({**weights, name: weights[name] * more}, share))[name]
    assert after >= before * (1 - 1e-9)


@given(weights=WEIGHTS, share=SHARES)
def test_capping_twice_is_capping_once(weights: dict[str, float], share: float) -> None:
    once = capped(weights, share)
    assert capped(once, share) == pytest.approx(once)
