"""How much is run: three sizes, and the questions (studies) that a size is run for."""

import dataclasses
from collections.abc import Sequence

from benchmarks.split_vs_full.arms import arms_of
from benchmarks.split_vs_full.plan import Budget, Cell, Preset, Table

STUDIES = ("arms", "full-size", "strategies", "modes")
MODES = ("sequential", "shared", "per_client", "frozen")
MODE_CLIENTS = (2, 4, 8)
SKEWS = ("0.1", "1", "100")

_LORA_RATE, _FULL_RATE, _SGD_RATE = 1e-3, 1e-4, 0.3

_FULL = Budget(
    num_rounds=3,
    local_steps=8,
    batch_size=2,
    micro_batches=2,
    max_seq_length=96,
    num_eval=24,
    learning_rate=_LORA_RATE,
)
_QUICK = dataclasses.replace(_FULL, num_rounds=2, local_steps=2, num_eval=8)
_TINY = dataclasses.replace(_QUICK, max_seq_length=16, num_eval=4, learning_rate=1e-2)


def _preset(
    name: str, budget: Budget, seeds: Sequence[int], *, num_clients: int, full_rate: float = _FULL_RATE
) -> Preset:
    """Give both tables the same budget but for the learning rate, so that they can be read together."""
    full = dataclasses.replace(budget, learning_rate=full_rate)
    return Preset(
        name=name, lora=budget, full=full, seeds=seeds, full_seeds=seeds[:1], num_clients=num_clients, full_clients=2
    )


FULL = _preset("full", _FULL, (1, 2, 3), num_clients=4)
QUICK = _preset("quick", _QUICK, (1,), num_clients=2)
TINY = _preset("tiny", _TINY, (1,), num_clients=2, full_rate=1e-3)


def cells_of_arms(
    preset: Preset, *, tables: Sequence[Table], arms: Sequence[str], dealt: str, num_clients: int
) -> list[Cell]:
    """Every arm of the tables, seed by seed, so that a first seed is whole before the next begins."""

    def row(study: str, table: Table, seed: int, clients: int) -> list[Cell]:
        return [
            Cell(
                study=study,
                arm=arm.name,
                table=table,
                seed=seed,
                num_clients=clients,
                dealt=dealt,
                budget=preset.budget(table),
            )
            for arm in arms_of(table)
            if not arms or arm.name in arms
        ]

    cells: list[Cell] = []
    for seed in preset.seeds:
        if "lora" in tables:
            cells += row("arms", "lora", seed, num_clients)
        if "full" in tables and seed in preset.full_seeds:
            cells += row("arms", "full", seed, preset.full_clients)
    return cells


def cells_at_full_size(preset: Preset, *, dealt: str) -> list[Cell]:
    """The LoRA arms with the clients, seeds and steps that full weights get."""
    cells = cells_of_arms(
        dataclasses.replace(preset, seeds=preset.full_seeds),
        tables=["lora"],
        arms=[],
        dealt=dealt,
        num_clients=preset.full_clients,
    )
    return [dataclasses.replace(cell, study="full-size") for cell in cells]


def cells_of_strategies(preset: Preset, *, num_clients: int) -> list[Cell]:
    """Strategies on much skew, and FedAvg on less of it and on more clients, all in `split, shared`."""
    much = f"dirichlet:{SKEWS[0]}"
    plain = Cell(
        study="strategies",
        arm="split-shared",
        table="lora",
        seed=preset.seeds[0],
        num_clients=num_clients,
        dealt=much,
        budget=preset.lora,
    )
    # SCAFFOLD's controls mean something with plain SGD and uniform weights only, so FedAvg is run with these as well
    with_sgd = dataclasses.replace(
        plain,
        optim="sgd",
        weight_by="uniform",
        budget=dataclasses.replace(preset.lora, learning_rate=_SGD_RATE),
    )
    variants = [
        plain,
        *(dataclasses.replace(plain, strategy="FedProx", options={"proximal_mu": mu}) for mu in (0.01, 0.1)),
        with_sgd,
        dataclasses.replace(with_sgd, strategy="SCAFFOLD"),
    ]
    cells = [dataclasses.replace(variant, seed=seed) for seed in preset.seeds for variant in variants]
    cells += [dataclasses.replace(plain, dealt=f"dirichlet:{alpha}") for alpha in SKEWS[1:]]
    # four times the clients, a quarter of the steps and of the held-out text each
    fewer = dataclasses.replace(
        preset.lora,
        local_steps=max(1, preset.lora.local_steps // 4),
        num_eval=max(2, preset.lora.num_eval // 4),
    )
    # less skew: at alpha 0.1 no draw gives every one of 16 clients enough text
    return [
        *cells,
        dataclasses.replace(plain, dealt=f"dirichlet:{SKEWS[1]}", num_clients=4 * num_clients, budget=fewer),
    ]


def cells_of_modes(preset: Preset) -> list[Cell]:
    """The four server modes with 2, 4 and 8 clients, on text dealt evenly, with a short budget."""
    return [
        Cell(
            study="modes",
            arm=f"split-{mode}",
            table="lora",
            seed=preset.seeds[0],
            num_clients=num_clients,
            dealt="iid",
            budget=dataclasses.replace(
                preset.lora,
                num_rounds=3,
                local_steps=min(3, preset.lora.local_steps),
                num_eval=max(2, 2 * preset.lora.num_eval // num_clients),
            ),
        )
        for num_clients in MODE_CLIENTS
        for mode in MODES
    ]
