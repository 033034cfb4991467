"""What an evaluation measures: a closed list of numbers, and what several clients' numbers say together.

Every measure is computed on the client, from text that stays there; only the number and what it counts over travel.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

Measured: TypeAlias = Mapping[str, float]
"""One client's numbers, by the names of `MEASURES` and `COUNTS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What one number means."""

    title: str
    counted_by: str
    """The count that weighs it where several clients' numbers are put together."""
    highest: float = 1.0
    greater_is_better: bool = True
    is_share: bool = True
    """Whether it is a share of what it counts over, and written as a percentage."""


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "eval_loss": Measure(
            title="loss", counted_by="num_eval_tokens", highest=math.inf, greater_is_better=False, is_share=False
        ),
        "perplexity": Measure(
            title="perplexity", counted_by="num_eval_tokens", highest=math.inf, greater_is_better=False, is_share=False
        ),
        "token_accuracy": Measure(title="token accuracy", counted_by="num_eval_tokens"),
        "exact_match": Measure(title="exact match", counted_by="num_generated"),
        "rouge_l": Measure(title="ROUGE-L", counted_by="num_generated", is_share=False),
        "accuracy": Measure(title="accuracy", counted_by="num_classified"),
        "macro_f1": Measure(title="macro-F1", counted_by="num_classified"),
    }
)

COUNTS = ("num_eval_examples", "num_eval_tokens", "num_generated", "num_classified")
"""Examples of the held-out text, its label tokens, prompts that were answered, examples that were classified."""

ALSO = "also:"
"""What begins the name of the loss on a further held-out text (`data.also_evaluate`)."""

TOTALS: Mapping[str, bool] = MappingProxyType(
    {
        "num_examples": True,
        "num_truncated": True,
        "bytes_sent": True,
        "bytes_received": True,
        "bytes_of_files": True,
        "peak_rss_bytes": True,
        "wall_seconds": False,
        "compute_seconds": False,
    }
)
"""What a client tells of itself when it says goodbye, and whether it is a count."""

_MAX_NAME = 80
_MAX_COUNT = 1 << 53
_MAX_LOSS = 1e12


def perplexity(loss: float) -> float:
    """Return e to the loss, infinity where that is too large for a float."""
    return math.exp(loss) if loss < 709.0 else math.inf


def objection(measured: Measured) -> str:
    """Say which number of a client's is none that an evaluation gives, "" if all are."""
    for name, value in measured.items():
        if name in COUNTS:
            is_fine = 0 <= value <= _MAX_COUNT and value.is_integer()
            rule = "must be a count"
        elif name in MEASURES:
            highest = MEASURES[name].highest
            is_fine = math.isfinite(value) and 0 <= value <= min(highest, _MAX_LOSS)
            rule = "must be a finite number from 0 on" if highest == math.inf else "must be from 0 to 1"
        elif name.startswith(ALSO) and len(name) <= _MAX_NAME:
            is_fine, rule = 0 <= value <= _MAX_LOSS, "must be a finite loss"
        else:
            return f"a measure {name!r:.40}, which is none of {', '.join([*MEASURES, *COUNTS])}"
        if not is_fine:
            return f"{name:.40} = {value}, which {rule}"
    return ""


def objection_to_totals(totals: Mapping[str, float]) -> str:
    """Say which of a client's totals is none that it has at its end, "" if all are; any may be missing."""
    for name, value in totals.items():
        if name not in TOTALS:
            return f"a total {name!r:.40}, which is none of {', '.join(TOTALS)}"
        if not 0 <= value <= _MAX_COUNT or (TOTALS[name] and not value.is_integer()):
            return f"{name} = {value}, which must be a {'count' if TOTALS[name] else 'finite number from 0 on'}"
    return ""


def totals_of(told: Mapping[str, float]) -> dict[str, float | int | None]:
    """Return all totals by name, counts as whole numbers; None where the client has told none."""
    return {
        name: None if name not in told else int(told[name]) if is_count else told[name]
        for name, is_count in TOTALS.items()
    }


def federated(by_client: Mapping[str, Measured]) -> dict[str, dict[str, float | str]]:
    """Put the numbers of several clients together.

    For each measure that any client has: `value`, weighted by what each client's number counts over (perplexity is that
    of the weighted loss); `mean`, the plain mean over clients; `worst` and `worst_client`. Of macro-F1, which is no
    mean over examples, `value` is a weighted mean all the same, and not the macro-F1 of all examples together.
    """
    found: dict[str, dict[str, float | str]] = {}
    for name, measure in MEASURES.items():
        values = {client: measured[name] for client, measured in by_client.items() if _is_known(measured.get(name))}
        if not values:
            continue
        weights = {client: _weight(by_client[client], measure) for client in values}
        total = sum(weights.values())
        pick = min if measure.greater_is_better else max
        worst = pick(sorted(values), key=values.__getitem__)
        found[name] = {
            "mean": _mean(values.values()),
            "worst": values[worst],
            "worst_client": worst,
            "value": sum(values[client] * weights[client] for client in values) / total
            if total
            else _mean(values.values()),
        }
    if "perplexity" in found and "eval_loss" in found:
        found["perplexity"]["value"] = perplexity(float(found["eval_loss"]["value"]))
    return found


def complete(measured: Measured) -> dict[str, float]:
    """Return the numbers that are known and finite, perplexity among them where there is a loss."""
    known = {name: value for name, value in measured.items() if name != "perplexity" and _is_known(value)}
    if "eval_loss" in known:
        known["perplexity"] = perplexity(known["eval_loss"])
    return {name: value for name, value in known.items() if math.isfinite(value)}


def event_of(measured: Measured) -> dict[str, float | int | None]:
    """Return the fields of the event `evaluated`: loss and number of examples always, the others where they are."""
    known = complete(measured)
    counts = {name: int(known[name]) for name in COUNTS if name in known}
    return {"eval_loss": None, "num_eval_examples": 0, **{n: v for n, v in known.items() if n in MEASURES}, **counts}


def measured_in(event: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers of an event `evaluated`."""
    found = {name: event.get(name) for name in (*MEASURES, *COUNTS)}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _weight(measured: Measured, measure: Measure) -> float:
    return measured.get(measure.counted_by) or measured.get("num_eval_examples") or 0.0


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
