"""The arms: how each is run, how many of the weights learn in it, and what leaves its clients."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from benchmarks.split_vs_full.alone import run_centralised, run_local
from benchmarks.split_vs_full.flower import run_flower
from benchmarks.split_vs_full.measured import Outcome
from benchmarks.split_vs_full.plan import Cell, Job, Table
from benchmarks.split_vs_full.split import run_split, settings
from splitfl.errors import ConfigError


class Run(Protocol):
    """Trains, and says what it took; it writes its files into its job's `out_dir`."""

    def __call__(self, job: Job, cell: Cell) -> Outcome: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A row of a table."""

    name: str
    """As on the command line."""
    title: Mapping[Table, str]
    """What the tables call it; a table that is not named has no such arm."""
    learns: Literal["all", "client blocks", "nothing"]
    leaves: Mapping[Table, str]
    """What leaves a client, in words."""
    run: Run | None = None
    server_mode: str = ""

    def objection(self, cell: Cell, job: Job) -> str:
        """Say why this splitfl cannot run it, "" if it can."""
        if not self.server_mode:
            return ""
        try:
            settings(job, cell, server_mode=self.server_mode, port=5555)
        except ConfigError as error:
            return str(error)
        return ""


def _split(server_mode: str) -> Run:
    def run(job: Job, cell: Cell) -> Outcome:
        return run_split(job, cell, server_mode=server_mode)

    return run


_SPLIT_LEAVES = "activations after block 1, gradients before the last block, and the {} of both blocks"
_NOTHING = dict.fromkeys(("lora", "full"), "nothing")


def _split_arm(server_mode: str, *tables: Table, learns: Literal["all", "client blocks"] = "all") -> Arm:
    weights: Mapping[Table, str] = {"lora": "adapters", "full": "weights and those of the embedding and head"}
    return Arm(
        name=f"split-{server_mode}",
        title=dict.fromkeys(tables, f"split, {server_mode}"),
        learns=learns,
        leaves={table: _SPLIT_LEAVES.format(weights[table]) for table in tables},
        run=_split(server_mode),
        server_mode=server_mode,
    )


ARMS: tuple[Arm, ...] = (
    Arm(name="base", title={"lora": "base, untrained"}, learns="nothing", leaves=_NOTHING),
    Arm(
        name="centralised",
        title={"lora": "centralised", "full": "centralised"},
        learns="all",
        leaves=dict.fromkeys(("lora", "full"), "all text"),
        run=lambda job, _: run_centralised(job),
    ),
    Arm(
        name="local",
        title={"lora": "local only", "full": "local only"},
        learns="all",
        leaves=_NOTHING,
        run=lambda job, _: run_local(job),
    ),
    Arm(
        name="flower",
        title={"lora": "LoRA FL (Flower, peft)", "full": "full FL (Flower)"},
        learns="all",
        leaves={"lora": "the adapters of all blocks", "full": "all weights"},
        run=lambda job, _: run_flower(job),
    ),
    _split_arm("sequential", "lora"),
    _split_arm("shared", "lora", "full"),
    _split_arm("per_client", "lora"),
    _split_arm("frozen", "lora", learns="client blocks"),
)

BY_NAME: Mapping[str, Arm] = {arm.name: arm for arm in ARMS}


def arms_of(table: Table) -> list[Arm]:
    """Return a table's arms, in its order."""
    return [arm for arm in ARMS if table in arm.title]
