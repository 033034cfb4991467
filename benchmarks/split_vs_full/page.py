"""docs/results.md and the table for a terminal, written from the result's JSON and from nothing else."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks import arithmetic
from benchmarks.split_vs_full.arms import Arm, arms_of
from benchmarks.split_vs_full.claims import (
    PUBLISHED,
    claims_of,
    client_use,
    final_losses,
    mean_and_spread,
    of_arm,
    training_seconds,
    variant_of,
)
from benchmarks.split_vs_full.plan import Table
from benchmarks.split_vs_full.presets import MODE_CLIENTS, MODES

Found: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = list[list[str]]

_TABLES: tuple[Table, ...] = ("lora", "full")
_TITLES = {"lora": "LoRA arms", "full": "Full-weight arms"}


def results_page(result: Mapping[str, Any], plots: Sequence[Path], page: Path) -> str:
    """Write the whole page, as Markdown."""
    cells = result["cells"]
    arms = [found for found in cells if found["study"] == "arms"]
    parts = [
        f"# Split and full federated learning, compared on {result['data']['name']}",
        _introduction(result),
        "## What a client sends and receives",
        _traffic_words(),
        _markdown(_traffic_table(arms)),
        *_quality_parts(arms),
        *_full_size_parts(cells),
        "## What a client and the server need",
        _COST_WORDS,
        _markdown(_cost_table(arms)),
        *(f"![{plot.stem}]({plot.relative_to(page.parent)})" for plot in plots),
        "## What was to be shown",
        _markdown(claim_rows(result)),
        *_strategy_parts(cells),
        *_mode_parts(cells),
        "## The same arms with larger models, by formula",
        arithmetic.WORDS,
        *_check_parts(arms, result),
        _markdown(arithmetic.table()),
        "## How it was measured",
        _method(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def terminal_tables(result: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """Return titles and rows, the header first, for a terminal."""
    arms = [found for found in result["cells"] if found["study"] == "arms"]
    tables = [("what a client sends and receives", _traffic_table(arms))]
    tables += [(_TITLES[table], _quality_table(arms, table)) for table in _TABLES if _of_table(arms, table)]
    tables += [("what a client and the server need", _cost_table(arms))]
    for title, parts in (("strategies", _strategy_rows), ("server modes", _mode_rows)):
        if len(rows := parts(result["cells"])) > 1:
            tables.append((title, rows))
    return [*tables, ("what was to be shown", claim_rows(result))]


def claim_rows(result: Mapping[str, Any]) -> Rows:
    """Return every claim with its verdict."""
    claims = claims_of(result["cells"], result["model"]["shape"])
    return [
        ["claim", "verdict", "figures"],
        *([claim.text, claim.verdict, claim.figures] for claim in claims),
    ]


def _introduction(result: Mapping[str, Any]) -> str:
    seeds = sorted({found["cell"]["seed"] for found in result["cells"]})
    model = result["model"]
    return (
        f"Written by `{result['command']}` from {result['json_name']}; {result['date'][:10]}, {result['machine']}."
        f" Model {model['name']}, {model['num_parameters'] / 1e6:.1f} M parameters; text: {result['data']['name']}"
        f" ({result['data']['citation']}). Seeds: {', '.join(map(str, seeds))}; `+-` is the standard deviation over"
        " seeds, and a figure without it is of one seed."
    )


def _traffic_words() -> str:
    return (
        "Bytes at the sockets of one client in the whole run, mean over clients, counted for every arm by the same"
        " relay (framing, heartbeats and HTTP headers included, TCP's own headers not). Every client has the untrained"
        " model and its tokenizer on its disk. Nothing is evaluated over the wire."
    )


def _traffic_table(cells: Sequence[Found]) -> Rows:
    rows = [["arm", "up", "down", "total", "per round", "what leaves the client"]]
    for table, arm, found in _rows_of(cells):
        title = f"{arm.title[table]} ({table})"
        if not _is_done(found):
            rows.append([title, _status(found), "", "", "", arm.leaves[table]])
            continue
        up, down = (client_use(found, name) or 0.0 for name in ("bytes_up", "bytes_down"))
        if arm.name in ("base", "centralised"):
            up = down = 0.0
        num_rounds = found[0]["cell"]["budget"]["num_rounds"]
        sizes = [_megabytes(value) for value in (up, down, up + down, (up + down) / num_rounds)]
        rows.append([title, *sizes, arm.leaves[table]])
    return rows


def _quality_parts(cells: Sequence[Found]) -> list[str]:
    parts = ["## Held-out loss", _QUALITY_WORDS]
    for table in _TABLES:
        if _of_table(cells, table):
            parts += [f"### {_TITLES[table]}", _budget_words(cells, table), _markdown(_quality_table(cells, table))]
            parts += [
                "Held-out loss after each round, mean over clients, first seed:",
                _markdown(_curve_table(cells, table)),
            ]
    return parts


def _full_size_parts(cells: Sequence[Found]) -> list[str]:
    """Show the LoRA arms at the size of the full-weight ones, so that the tables can be read together."""
    found = [f for f in cells if f["study"] == "full-size"]
    if not found:
        return []
    title = "### LoRA arms at the size of the full-weight arms"
    return [title, _budget_words(found, "lora"), _markdown(_quality_table(found, "lora"))]


def _quality_table(cells: Sequence[Found], table: Table) -> Rows:
    with_accuracy = any("mean_accuracy" in model for f in cells if _is_done([f]) for model in f["models"].values())
    accuracy = ["accuracy, mean", "accuracy, worst client"] if with_accuracy else []
    rows = [["arm", "loss, mean", "loss, worst client", *accuracy, "parameters trained", "label tokens", "seeds"]]
    for _, arm, found in _rows_of(cells, [table]):
        if not _is_done(found):
            rows.append([arm.title[table], _status(found), *[""] * (len(rows[0]) - 2)])
            continue
        means = list(final_losses(found, arm.name, table).values())
        figures = [_spread(means), _spread(_over_models(found, "worst_loss", max))]
        if with_accuracy:
            figures += [_spread(_over_models(found, "mean_accuracy", statistics.fmean))]
            figures += [_spread(_over_models(found, "worst_accuracy", min))]
        tokens = {f.get("num_label_tokens") for f in found if f["cell"]["seed"] == found[0]["cell"]["seed"]}
        rows.append(
            [
                arm.title[table],
                *figures,
                f"{found[0]['num_learned']:,}",
                f"{tokens.pop() or 0:,}",
                str(len(found)),
            ]
        )
        if arm.name == "local":
            best = [min(model["mean_loss"] for model in f["models"].values()) for f in found]
            rows.append([f"{arm.title[table]}, the best client", _spread(best), *[""] * (len(rows[0]) - 2)])
    return rows


def _curve_table(cells: Sequence[Found], table: Table) -> Rows:
    curves = [
        (arm.title[table], found[0]["rounds"])
        for _, arm, found in _rows_of(cells, [table])
        if _is_done(found) and len(found[0]["rounds"]) > 1
    ]
    longest = max((len(rounds) for _, rounds in curves), default=0)
    return [
        ["arm", *(str(number) for number in range(longest))],
        *([title, *(f"{end['mean_loss']:.3f}" for end in rounds)] for title, rounds in curves),
    ]


def _cost_table(cells: Sequence[Found]) -> Rows:
    header = ["arm", "client peak", "above imports", "all its processes", "client CPU s", "without imports"]
    rows = [[*header, "server CPU s", "server peak", "wall s"]]
    for table, arm, found in _rows_of(cells):
        if not _is_done(found) or not found[0].get("clients"):
            continue
        memory = [
            _megabytes(client_use(found, name)) for name in ("peak_rss", "peak_rss_above_imports", "tree_peak_rss")
        ]
        seconds = [_number(client_use(found, name)) for name in ("cpu_seconds", "cpu_seconds_above_imports")]
        server = [_number(_mean(found, "server_cpu_seconds")), _megabytes(_mean(found, "server_peak_rss"))]
        title = f"{arm.title[table]} ({table})"
        rows.append([title, *memory, *seconds, *server, _number(_mean(found, "wall_seconds"))])
    return rows


def _strategy_parts(cells: Sequence[Found]) -> list[str]:
    rows = _strategy_rows(cells)
    return ["## Strategies on unlike data", _STRATEGY_WORDS, _markdown(rows)] if len(rows) > 1 else []


def _strategy_rows(cells: Sequence[Found]) -> Rows:
    groups: dict[tuple[str, int, str], list[Found]] = {}
    for found in cells:
        if found["study"] == "strategies":
            key = (found["cell"]["dealt"], found["cell"]["num_clients"], variant_of(found))
            groups.setdefault(key, []).append(found)
    rows = [["text dealt", "clients", "strategy", "loss, mean", "loss, worst client", "seeds"]]
    for (dealt, num_clients, variant), found in groups.items():
        named = [dealt, str(num_clients), variant]
        if not _is_done(found):
            rows.append([*named, _status(found), "", ""])
            continue
        done = [f for f in found if f["status"] == "done"]
        figures = [_spread([f["models"]["everyone"][name] for f in done]) for name in ("mean_loss", "worst_loss")]
        rows.append([*named, *figures, str(len(done))])
    return rows


def _mode_parts(cells: Sequence[Found]) -> list[str]:
    rows = _mode_rows(cells)
    return ["## The server modes", _MODE_WORDS, _markdown(rows)] if len(rows) > 1 else []


def _mode_rows(cells: Sequence[Found]) -> Rows:
    by_place = {
        (f["cell"]["arm"].removeprefix("split-"), f["cell"]["num_clients"]): f for f in cells if f["study"] == "modes"
    }
    rows = [["clients", "mode", "loss, mean", "training s", "times sequential's speed", "FL-GLM's", "server peak"]]
    for place, num_clients in enumerate(MODE_CLIENTS):
        slow = by_place.get(("sequential", num_clients))
        for mode in MODES:
            found = by_place.get((mode, num_clients))
            if found is None:
                continue
            if found["status"] != "done":
                rows.append([str(num_clients), mode, _status([found]), "", "", "", ""])
                continue
            seconds = training_seconds(found)
            ratio = f"{training_seconds(slow) / seconds:.2f}x" if slow and slow["status"] == "done" else "-"
            published = f"{PUBLISHED[mode][place]}x" if mode in PUBLISHED else ""
            loss = f"{found['models']['everyone']['mean_loss']:.3f}"
            peak = _megabytes(found["server_peak_rss"])
            rows.append([str(num_clients), mode, loss, f"{seconds:.1f}", ratio, published, peak])
    return rows


def _check_parts(cells: Sequence[Found], result: Mapping[str, Any]) -> list[str]:
    """Compare the formulas with what was measured on this model."""
    rows = arithmetic.checks([found for found in cells if found["status"] == "done"], result["model"]["shape"])
    return ["Formula against measurement on the model of this page:", _markdown(rows)] if len(rows) > 1 else []


def _budget_words(cells: Sequence[Found], table: Table) -> str:
    cell = next(found["cell"] for found in cells if found["cell"]["table"] == table)
    budget = cell["budget"]
    examples = budget["batch_size"] * budget["micro_batches"]
    return (
        f"{cell['num_clients']} clients, text dealt {cell['dealt']}; {budget['num_rounds']} rounds of"
        f" {budget['local_steps']} steps of {examples} examples (rows of at most {budget['max_seq_length']} tokens) for"
        f" each client; AdamW, learning rate {budget['learning_rate']:g} falling to 0, clipping at 1;"
        f" {budget['num_eval']} held-out examples of each client."
    )


def _method(result: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"{_METHOD_WORDS}\n\nVersions: {versions}."


_QUALITY_WORDS = """Every arm sees the same examples of each client in the same order, starts from the same weights,
and is scored by the same code: what it has trained is laid over the base model in plain transformers, and all
clients' held-out text is scored. "Mean" is the plain mean over the clients' losses per label token, "worst client"
the largest of them. The centralised arm takes one step where each client takes one, from all clients' examples of
that step, as `shared` does; `sequential` takes a step of the server for every step of a client. For "local only"
each client's model is scored on all clients' text, and the row is the mean over these models. A `frozen` server
trains nothing: fewer parameters."""

_COST_WORDS = """Means over clients and seeds. "Client peak" is the most memory (RSS) of the client's largest
process; "above imports" is without what that process held after its imports; "all its processes" sums what a client
needs at once (a Flower client is a SuperNode with its helpers and one process a round; pages that two of them share
count twice). CPU seconds are of all of a client's processes; "without imports" leaves out importing libraries,
which a Flower client does again every round. For "local only" a client trains alone in one process; the centralised
arm's one process stands in the client's columns. Wall seconds are from the start of the first process to the end of
the last, on two cores: clients share them."""

_STRATEGY_WORDS = """Split, `shared`, LoRA. A strategy acts on the client-side layers alone: the backbone takes the
same steps whatever it is called. "16 clients" have a quarter of the steps and of the held-out text each, so that
row compares with none of the others."""

_MODE_WORDS = """Text dealt evenly; each client takes 3 rounds of 3 steps (fewer in the smaller sizes of this
benchmark). Seconds are from the end of the first round to that of the last. FL-GLM's figures are its authors' own,
on their machines, for the speed of its modes over its serial one; here one process computes all clients' backbone
steps with the threads of this machine, on which the clients run too, so more than the cores there are cannot be
gained. Quality, server memory and the order of the modes can be compared; the ratios themselves cannot."""

_METHOD_WORDS = """- Split arms: `splitfl server` and `splitfl client` as processes on loopback, without encryption;
one block at each end is the client's. The server has all cores' threads, a client one.
- Flower: SuperLink and SuperNodes (`--insecure`, on loopback) with FedAvg weighted by examples; one thread a
client. Its app keeps AdamW's moments in a file of the client's between rounds, as splitfl's clients keep theirs.
The loss is transformers' own; a split client takes splitfl's chunked loss, which never holds the logits, and that
is part of its lower memory.
- LoRA: rank 8 on q, v, gate, up and down of every block. Full: every weight, embeddings and head included.
- Learning rates were chosen once, not tuned for each arm. Held-out sets are small: the spread over seeds, which
draw other examples to hold out too, says how far a figure can be trusted.
- Not compared: a real network, encryption, GPUs, generation, clients that fail."""


def _rows_of(cells: Sequence[Found], tables: Sequence[Table] = _TABLES) -> Iterable[tuple[Table, Arm, list[Found]]]:
    for table in tables:
        for arm in arms_of(table):
            if found := of_arm(cells, arm.name, table):
                yield table, arm, [f for f in found if f["status"] == "done"] or found


def _of_table(cells: Sequence[Found], table: Table) -> bool:
    return any(found["cell"]["table"] == table for found in cells)


def _is_done(found: Sequence[Found]) -> bool:
    return any(f["status"] == "done" for f in found)


def _status(found: Sequence[Found]) -> str:
    return str(found[0]["status"])


def _over_models(cells: Sequence[Found], name: str, over: Callable[[Iterable[float]], float]) -> list[float]:
    return [over([model[name] for model in found["models"].values()]) for found in cells]


def _mean(cells: Sequence[Found], name: str) -> float | None:
    values = [found[name] for found in cells if found.get(name) is not None]
    return statistics.fmean(values) if values else None


def _spread(values: Sequence[float]) -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:.3f} +- {spread:.3f}" if len(values) > 1 else f"{mean:.3f}"


def _megabytes(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1e6:,.0f} MB" if value >= 1e7 else f"{value / 1e6:.2f} MB" if value else "0"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _markdown(rows: Rows) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
