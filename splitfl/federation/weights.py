"""How much of a merge one client may be, whatever it says of itself: pure."""

from collections.abc import Mapping
from fractions import Fraction

FEWEST_CAPPED = 3
"""Clients from which on nobody is more than a share; of two, the larger clinic cannot be told from a liar."""


def capped(weights: Mapping[str, float], share: float) -> dict[str, float]:
    """Return the weights with nobody above `share` of their sum; who is below keeps its own, to the bit.

    Those above all get the same weight, `share` of the new sum (water-filling). With fewer clients than 1 / share, for
    whom there is no such weighting, all count alike; fewer than three are left as they are. Weights must be positive.
    """
    if len(weights) < FEWEST_CAPPED:
        return dict(weights)
    ceiling = _ceiling([Fraction(weight) for weight in weights.values()], Fraction(share))
    return {name: weight if weight <= ceiling else float(ceiling) for name, weight in weights.items()}


def _ceiling(weights: list[Fraction], share: Fraction) -> Fraction:
    """Return the most that a weight may be; exact, so that no order of the clients matters.

    With k clients at it and the others' sum R it is share * (R + k * ceiling), so share * R / (1 - k * share).
    """
    rest = sum(weights, Fraction(0))
    for num_above, largest in enumerate(sorted(weights, reverse=True)):
        room = 1 - num_above * share
        if room <= 0:
            break
        if largest * room <= share * rest:
            return share * rest / room
        rest -= largest
    return min(weights)
