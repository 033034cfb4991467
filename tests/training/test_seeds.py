"""Seeds of draws: what a draw is for gives its seed, and every part of that counts."""

import torch

from splitfl.training.seeds import seed_dropout, seed_for

# Seed of the run, side, client, step, micro-batch.
DRAW = (7, "server", "clinic-0", 3, 1)


def test_every_part_counts_and_what_came_before_does_not() -> None:
    others = [(*DRAW[:at], f"{DRAW[at]}0", *DRAW[at + 1 :]) for at in range(len(DRAW))]
    assert len({seed_for(*draw) for draw in [DRAW, *others, DRAW[:-1], (*DRAW, 0)]}) == len(DRAW) + 3
    assert seed_for("ab", "c") != seed_for("a", "bc")
    torch.manual_seed(0)
    seed_dropout(*DRAW)
    first = torch.rand(3)
    torch.rand(5)
    seed_dropout(*DRAW)
    assert torch.equal(torch.rand(3), first)


def test_a_run_that_goes_on_draws_as_the_splitfl_before_did() -> None:
    assert seed_for(*DRAW) == 5255249777568894340
