"""What the comparison must show or say that it does not: each claim with its verdict and figures, from the JSON
alone."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from benchmarks import arithmetic
from benchmarks.split_vs_full.presets import MODE_CLIENTS

Found: TypeAlias = Mapping[str, Any]

# FL-GLM (arXiv:2406.14898), as published: speed over its sequential ("server-serial") training with 2, 4 and 8 clients.
PUBLISHED = {"shared": (1.09, 1.27, 1.41), "per_client": (1.98, 3.97, 7.98)}
PUBLISHED_NAMES = {"shared": "client-batch", "per_client": "server-hierarchical"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A sentence, whether the figures bear it out, and the figures."""

    text: str
    verdict: str
    """"shown", "not shown", or "not run"."""
    figures: str


def claims_of(cells: Sequence[Found], shape: Mapping[str, Any]) -> list[Claim]:
    """Judge every claim; `shape` is the model's, as plain values of `arithmetic.Shape`."""
    done = [found for found in cells if found["status"] == "done"]
    arms = [found for found in done if found["study"] == "arms"]
    return [
        *(_near_centralised(arms, table) for table in ("lora", "full")),
        *(_better_than_local(arms, table) for table in ("lora", "full")),
        *_strategies([found for found in done if found["study"] == "strategies"]),
        *_lighter(arms),
        *_bytes(arms, shape),
        *_modes([found for found in done if found["study"] == "modes"]),
        *_formulas(arms, shape),
    ]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation (n - 1) over seeds; 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def final_losses(cells: Sequence[Found], arm: str, table: str) -> dict[int, float]:
    """Return the mean held-out loss by seed: of everyone's model, or the mean over the models of clients alone."""
    return {
        found["cell"]["seed"]: statistics.fmean(model["mean_loss"] for model in found["models"].values())
        for found in of_arm(cells, arm, table)
    }


def of_arm(cells: Sequence[Found], arm: str, table: str) -> list[Found]:
    """Return a row's cells, one for each seed."""
    return [found for found in cells if (found["cell"]["arm"], found["cell"]["table"]) == (arm, table)]


def client_use(cells: Sequence[Found], name: str) -> float | None:
    """Return a figure of the clients, its mean over clients and seeds; None if there is none."""
    values = [use[name] for found in cells for use in found.get("clients", {}).values()]
    return statistics.fmean(values) if values else None


def _not_run(text: str) -> Claim:
    return Claim(text=text, verdict="not run", figures="")


def _verdict(is_shown: bool) -> str:
    return "shown" if is_shown else "not shown"


def _near_centralised(cells: Sequence[Found], table: str) -> Claim:
    text = f"{_TABLES[table]}: split `shared` ends within 1 % of centralised held-out loss at equal tokens"
    split, centralised = final_losses(cells, "split-shared", table), final_losses(cells, "centralised", table)
    seeds = sorted(split.keys() & centralised.keys())
    if not seeds:
        return _not_run(text)
    off = [split[seed] / centralised[seed] - 1 for seed in seeds]
    figures = f"{_percent(off)} ({len(seeds)} seed{'s' * (len(seeds) > 1)}), worst {max(off, key=abs):+.2%}"
    return Claim(text=text, verdict=_verdict(max(map(abs, off)) <= 0.01), figures=figures)


def _better_than_local(cells: Sequence[Found], table: str) -> Claim:
    text = (
        f"{_TABLES[table]}: split `shared` is better than every client that learns alone, on the mean over all clients,"
        " beyond the spread of seeds"
    )
    split = final_losses(cells, "split-shared", table)
    best = {
        found["cell"]["seed"]: min(model["mean_loss"] for model in found["models"].values())
        for found in of_arm(cells, "local", table)
    }
    seeds = sorted(split.keys() & best.keys())
    if not seeds:
        return _not_run(text)
    gains = [best[seed] - split[seed] for seed in seeds]
    mean, spread = mean_and_spread(gains)
    figures = f"the best one's loss is higher by {mean:.3f} +- {spread:.3f} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
    if len(seeds) == 1:
        figures += "; one seed has no spread"
    return Claim(text=text, verdict=_verdict(mean > spread and min(gains) > 0 and len(seeds) > 1), figures=figures)


def _strategies(cells: Sequence[Found]) -> list[Claim]:
    skewed = [
        found for found in cells if found["cell"]["dealt"] == "dirichlet:0.1" and found["cell"]["num_clients"] <= 4
    ]
    by_variant: dict[str, dict[int, float]] = {}
    for found in skewed:
        by_variant.setdefault(variant_of(found), {})[found["cell"]["seed"]] = found["models"]["everyone"]["mean_loss"]
    claims = []
    for variant, plain in (
        ("FedProx proximal_mu=0.01", "FedAvg"),
        ("FedProx proximal_mu=0.1", "FedAvg"),
        (f"SCAFFOLD {_SGD}", f"FedAvg {_SGD}"),
    ):
        text = f"at Dirichlet alpha 0.1, {variant} ends lower than {plain} beyond the spread of seeds"
        seeds = sorted(by_variant.get(variant, {}).keys() & by_variant.get(plain, {}).keys())
        if not seeds:
            claims.append(_not_run(text))
            continue
        mean, spread = mean_and_spread([by_variant[variant][seed] - by_variant[plain][seed] for seed in seeds])
        figures = f"its loss less the other's: {mean:+.4f} +- {spread:.4f} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
        claims.append(Claim(text=text, verdict=_verdict(len(seeds) > 1 and -mean > spread), figures=figures))
    return claims


def variant_of(found: Found) -> str:
    """Name a strategy with its options, and plain SGD with uniform weights where it is not AdamW."""
    cell = found["cell"]
    options = [f"{name}={value:g}" for name, value in cell["options"].items()]
    return " ".join([cell["strategy"], *options, *([_SGD] if cell["optim"] == "sgd" else [])])


def _lighter(cells: Sequence[Found]) -> list[Claim]:
    claims = []
    for figure, name in (("peak_rss_above_imports", "peak memory above imports"), ("cpu_seconds", "CPU seconds")):
        for table, other, bound in (("lora", "LoRA FL", 1.0), ("full", "full FL", 0.35)):
            text = f"a split client ({table} table) takes at most {bound:g}x the {name} of a {other} client"
            split = client_use(of_arm(cells, "split-shared", table), figure)
            flower = client_use(of_arm(cells, "flower", table), figure)
            if split is None or not flower:
                claims.append(_not_run(text))
                continue
            figures = f"{split / flower:.2f}x ({_amount(figure, split)} against {_amount(figure, flower)})"
            claims.append(Claim(text=text, verdict=_verdict(split / flower <= bound), figures=figures))
    return claims


def _bytes(cells: Sequence[Found], shape: Mapping[str, Any]) -> list[Claim]:
    """Compare the traffic of the run, and say at how many steps a round the two would be even.

    A split client pays for every step, a federated one for every round: few steps a round favour the split.
    """
    claims = []
    for table, other in (("lora", "LoRA FL"), ("full", "full FL")):
        text = f"a split client ({table} table) sends and receives fewer bytes than a {other} client, in this run"
        split, flower = (_traffic(of_arm(cells, arm, table)) for arm in ("split-shared", "flower"))
        if not split or not flower:
            claims.append(_not_run(text))
            continue
        budget = of_arm(cells, "split-shared", table)[0]["cell"]["budget"]
        num_rounds, num_steps = budget["num_rounds"], budget["local_steps"]
        merge = arithmetic.merge_bytes(arithmetic.Shape(**shape), "lora" if table == "lora" else "full", "client")
        even = (flower / num_rounds - merge) / (split / num_rounds - merge) * num_steps
        figures = (
            f"{split / flower:.2f}x ({split / 1e6:.1f} MB against {flower / 1e6:.1f} MB in the run) with {num_steps}"
            f" steps a round; they are even at about {even:.0f}, beyond which the split's are more"
        )
        claims.append(Claim(text=text, verdict=_verdict(split < flower), figures=figures))
    return claims


def _traffic(cells: Sequence[Found]) -> float:
    up, down = (client_use(cells, name) for name in ("bytes_up", "bytes_down"))
    return (up or 0.0) + (down or 0.0)


def _modes(cells: Sequence[Found]) -> list[Claim]:
    """Compare the speed over `sequential` with what FL-GLM's authors published for their three modes."""
    seconds = {(f["cell"]["arm"].removeprefix("split-"), f["cell"]["num_clients"]): training_seconds(f) for f in cells}
    claims = []
    for mode, published in PUBLISHED.items():
        text = (
            f"`{mode}` is as many times faster than `sequential` as FL-GLM's {PUBLISHED_NAMES[mode]} over serial"
            f" ({', '.join(f'{ratio}x' for ratio in published)} with {', '.join(map(str, MODE_CLIENTS))} clients)"
        )
        pairs = [(seconds.get(("sequential", n)), seconds.get((mode, n))) for n in MODE_CLIENTS]
        if any(None in pair for pair in pairs):
            claims.append(_not_run(text))
            continue
        found = [slow / fast for slow, fast in pairs if slow is not None and fast is not None]
        is_shown = all(ratio >= wanted for ratio, wanted in zip(found, published, strict=True))
        figures = ", ".join(f"{ratio:.2f}x" for ratio in found)
        claims.append(Claim(text=text, verdict=_verdict(is_shown), figures=figures))
    return claims


def _formulas(cells: Sequence[Found], shape: Mapping[str, Any]) -> list[Claim]:
    rows = arithmetic.checks(cells, shape)[1:]
    claims = []
    for quantity, bound in arithmetic.WITHIN.items():
        text = f"the formulas of {quantity} are within {bound:.0%} of what was measured"
        ratios = [float(row[-1]) for row in rows if row[0].startswith(quantity)]
        if not ratios:
            claims.append(_not_run(text))
            continue
        is_shown = all(abs(ratio - 1) <= bound for ratio in ratios)
        figures = "measured / formula: " + ", ".join(f"{ratio:.2f}" for ratio in ratios)
        claims.append(Claim(text=text, verdict=_verdict(is_shown), figures=figures))
    return claims


def training_seconds(found: Found) -> float:
    """Return the seconds from the end of the first round to that of the last: starting processes is not in it."""
    return float(found["rounds"][-1]["seconds"] - found["rounds"][1]["seconds"])


_SGD = "(SGD, uniform weights)"
_TABLES = {"lora": "LoRA", "full": "full weights"}


def _percent(values: Sequence[float]) -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:+.2%} +- {spread:.2%}"


def _amount(figure: str, value: float) -> str:
    return f"{value / 1e6:.0f} MB" if "rss" in figure else f"{value:.0f} s"
