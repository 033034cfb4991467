"""Split learning against full federated learning: the same model, text, seed and tokens in every arm.

`python -m benchmarks.split_vs_full --data hpo --json FILE` trains SmolLM2-135M in two tables, in each of which all arms
train the same parameters (a frozen server's arm fewer): LoRA arms (base; centralised; local only; LoRA FL by Flower and
peft; split `sequential`, `shared`, `per_client`, `frozen`) and full-weight arms (centralised; local only; full FL by
Flower; split `shared`). Everything runs as processes of this machine. An arm's results are kept in the work directory,
so the same command goes on where it was. An arm is given up after 40 minutes. Linux only: memory and CPU time are read
from /proc.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from benchmarks import arithmetic
from benchmarks.material import TINY as TINY_SHAPE
from benchmarks.material import write_model
from benchmarks.split_vs_full import presets
from benchmarks.split_vs_full.arms import BY_NAME
from benchmarks.split_vs_full.cells import Bench
from benchmarks.split_vs_full.flower_home import flower_version
from benchmarks.split_vs_full.page import results_page, terminal_tables
from benchmarks.split_vs_full.plan import Cell, Preset
from benchmarks.split_vs_full.plots import write_plots
from benchmarks.split_vs_full.text import Source, source_of
from splitfl.config.own import default_cache_dir
from splitfl.errors import ConfigError, SplitflError
from splitfl.telemetry.versions import versions_of

_VERSIONED = ("torch", "transformers", "peft", "pyzmq")
_PLAIN_WIDTH = 200
_OF_BUDGETS = ("num_rounds", "local_steps", "num_eval")
_PRESETS = {"full": presets.FULL, "quick": presets.QUICK, "tiny": presets.TINY}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what has not been run, and write JSON, tables, plots and page from all of it."""
    arguments = _parser().parse_args(argv)
    # in a file or a pipe tables get the width they need
    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    try:
        result = _run(arguments, console)
    except SplitflError as error:
        console.print(str(error), markup=False)
        sys.exit(error.exit_code)
    arguments.json.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    for title, rows in terminal_tables(result):
        console.print(_table(title, rows))
    folder = arguments.write.parent if arguments.write else arguments.json.parent
    plots = write_plots(result["cells"], folder.resolve(), arguments.write.stem if arguments.write else "split-vs-full")
    if arguments.write:
        arguments.write.write_text(results_page(result, plots, arguments.write.resolve()), encoding="utf-8")
    if any(found["status"] == "failed" for found in result["cells"]):
        sys.exit(1)


def _run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    unknown = sorted(set(arguments.arms) - BY_NAME.keys())
    if unknown:
        raise ConfigError(f"--arms {unknown[0]}: unknown; known are {', '.join(BY_NAME)}")
    if arguments.size == "tiny" and arguments.data != "hpo":
        raise ConfigError(f"--tiny has made-up words of its own: leave --data {arguments.data} out, or take --quick")
    source = source_of(
        "toy" if arguments.size == "tiny" else arguments.data,
        client_field=arguments.client_field,
        label_field=arguments.label_field,
    )
    if arguments.alpha and not source.label_field:
        raise ConfigError(f"--alpha skews by a label, and {source.name} has none: name its column with --label-field")
    work_dir = arguments.work.resolve()
    model_dir = _model(arguments, work_dir, console)
    cells = _cells(arguments, source)
    bench = Bench(
        work_dir=work_dir, model_dir=model_dir, source=source, say=lambda text: console.print(text, markup=False)
    )
    found = []
    for number, cell in enumerate(cells, start=1):
        if arguments.no_run:
            found += [kept] if (kept := bench.kept(cell)) is not None else []
            continue
        console.print(f"{number} of {len(cells)}: {cell.key}", markup=False)
        found.append(bench.run(cell))
    if not found:
        raise ConfigError(f"nothing of this has been run in {work_dir}: leave --no-run out")
    return {
        "command": "python -m benchmarks.split_vs_full "
        + " ".join(word for word in arguments.shown if word != "--no-run"),
        "json_name": arguments.json.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **versions_of(_VERSIONED),
            "flwr": flower_version(),
        },
        "model": _described(model_dir),
        "data": {"name": source.name, "citation": source.citation},
        "preset": arguments.size,
        "cells": found,
    }


def _cells(arguments: argparse.Namespace, source: Source) -> list[Cell]:
    preset = _sized(arguments)
    dealt = f"dirichlet:{arguments.alpha:g}" if arguments.alpha else "natural" if source.client_field else "iid"
    num_clients = arguments.clients or preset.num_clients
    tables = [arguments.table] if arguments.table else ["lora", "full"]
    cells: list[Cell] = []
    if "arms" in arguments.studies:
        cells += presets.cells_of_arms(preset, tables=tables, arms=arguments.arms, dealt=dealt, num_clients=num_clients)
    if "full-size" in arguments.studies:
        cells += presets.cells_at_full_size(preset, dealt=dealt)
    if "strategies" in arguments.studies:
        cells += presets.cells_of_strategies(preset, num_clients=num_clients)
    if "modes" in arguments.studies:
        cells += presets.cells_of_modes(preset)
    return cells


def _sized(arguments: argparse.Namespace) -> Preset:
    """Return the size asked for, with what was named in its place; full weights get the first seed unless told."""
    preset = _PRESETS[arguments.size]
    named = {name: getattr(arguments, name) for name in _OF_BUDGETS if getattr(arguments, name)}
    lora, full = (dataclasses.replace(budget, **named) for budget in (preset.lora, preset.full))
    preset = dataclasses.replace(preset, lora=lora, full=full)
    if arguments.full_clients:
        preset = dataclasses.replace(preset, full_clients=arguments.full_clients)
    if not arguments.seeds:
        return preset
    full_seeds = arguments.full_seeds or arguments.seeds[:1]
    return dataclasses.replace(preset, seeds=tuple(arguments.seeds), full_seeds=tuple(full_seeds))


def _model(arguments: argparse.Namespace, work_dir: Path, console: Console) -> Path:
    if arguments.model:
        return arguments.model.resolve()
    if arguments.size != "tiny":
        from splitfl.demo.model import prepare_model

        return prepare_model(default_cache_dir(), console)
    directory = work_dir / "toy-model"
    if not directory.exists():
        write_model(directory, TINY_SHAPE)
    return directory


def _described(model_dir: Path) -> dict[str, Any]:
    shape = arithmetic.Shape.of(AutoConfig.from_pretrained(model_dir))
    return {
        "name": model_dir.name,
        "num_parameters": arithmetic.num_parameters(shape),
        "shape": dataclasses.asdict(shape),
    }


def _table(title: str, rows: Sequence[Sequence[str]]) -> RichTable:
    table = RichTable(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def _count(text: str) -> int:
    """Read a number of things, of which there must be one."""
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def _seed(text: str) -> int:
    number = _whole(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} must not be negative")
    return number


def _alpha(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0, and finite")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.split_vs_full", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--data",
        default="hpo",
        metavar="hpo|vader|FILE",
        help="the text (default: hpo; hpo:HP:0025031,HP:0001939 for other organ systems)",
    )
    parser.add_argument(
        "--client-field", default="", metavar="NAME", help="of a FILE: the column that names the client"
    )
    parser.add_argument("--label-field", default="", metavar="NAME", help="of a FILE: the column --alpha skews")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where to write the result")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="also write it as a page, with plots next to it")
    parser.add_argument("--work", type=Path, default=Path("runs/split-vs-full"), metavar="DIR", help="work directory")
    parser.add_argument("--no-run", action="store_true", help="run nothing: report what there is already")
    parser.add_argument("--model", type=Path, metavar="DIR", help="another Llama-like model than SmolLM2-135M")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", dest="size", const="quick", help="all arms in 15 minutes")
    size.add_argument("--tiny", action="store_const", dest="size", const="tiny", help="a toy model: does it run?")
    parser.add_argument("--seeds", type=_seed, nargs="+", default=[], metavar="N", help="seeds (default: 1 2 3)")
    parser.add_argument(
        "--full-seeds", type=_seed, nargs="+", default=[], metavar="N", help="seeds of full weights (1)"
    )
    for name in _OF_BUDGETS:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=_count, default=0, metavar="N", help="in place of the size's own")
    parser.add_argument("--table", choices=("lora", "full"), help="only this table")
    parser.add_argument("--arms", nargs="+", default=[], metavar="ARM", help=f"some of: {', '.join(BY_NAME)}")
    parser.add_argument("--clients", type=_count, default=0, metavar="N", help="clients (default: 4, quick: 2)")
    parser.add_argument(
        "--full-clients", type=_count, default=0, metavar="N", help="of the full-weight arms (default: 2)"
    )
    parser.add_argument("--alpha", type=_alpha, metavar="A", help="deal by Dirichlet over the label, not naturally")
    parser.add_argument(
        "--studies",
        nargs="+",
        choices=presets.STUDIES,
        default=["arms"],
        metavar="STUDY",
        help=" ".join(presets.STUDIES),
    )
    parser.set_defaults(size="full", shown=sys.argv[1:])
    return parser


if __name__ == "__main__":
    main()
