"""What is compared: which weights learn, how much of what text every arm sees, and one cell of the comparison."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

Table: TypeAlias = Literal["lora", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What learns: adapters in every block, or all weights, embeddings and head included."""

    table: Table
    r: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much every client of every arm learns from; the centralised arm takes all clients' micro-batches a step."""

    num_rounds: int
    local_steps: int
    batch_size: int
    """Rows of a micro-batch."""
    micro_batches: int
    """Micro-batches of a client's step."""
    max_seq_length: int
    num_eval: int
    """Held-out examples of each client."""
    learning_rate: float
    """Peak; it falls in a straight line to 0 over all steps."""

    @property
    def num_steps(self) -> int:
        """Steps of one client."""
        return self.num_rounds * self.local_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One arm on one text with one seed: what is run once, and then read from its file."""

    study: str
    """Which question it belongs to; no part of its identity, so two studies may share a cell."""
    arm: str
    table: Table
    seed: int
    num_clients: int
    dealt: str
    """How the text is dealt to the clients: "natural", "iid" or "dirichlet:ALPHA"."""
    budget: Budget
    strategy: str = "FedAvg"
    options: Mapping[str, float] = field(default_factory=dict)
    """Options of the strategy."""
    optim: Literal["adamw_torch", "sgd"] = "adamw_torch"
    weight_by: Literal["num_examples", "uniform"] = "num_examples"

    @property
    def key(self) -> str:
        """A folder's name: readable, and different for cells that differ in anything."""
        known = {name: value for name, value in asdict(self).items() if name != "study"}
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]
        words = [self.table, self.arm, self.dealt.replace(":", "-"), f"{self.num_clients}-clients", self.strategy]
        return "-".join([*words, str(self.seed), digest])


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientText:
    """One client's files (JSON lines with `prompt` and `completion`, or `text`)."""

    train: Path
    eval: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a process of an arm has to do; it travels as a file of JSON."""

    model_dir: Path
    learned: Learned
    budget: Budget
    seed: int
    clients: Mapping[str, ClientText]
    out_dir: Path
    """Where `round-N.safetensors` go, counted from 1, and what else the process has to tell."""
    num_threads: int = 1

    def write(self, path: Path) -> Path:
        """Write it, and return the path."""
        path.write_text(json.dumps(asdict(self), default=str, indent=1), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> "Job":
        """Read what `write` has written."""
        tree = json.loads(path.read_text(encoding="utf-8"))
        learned = tree["learned"] | {"target_modules": tuple(tree["learned"]["target_modules"])}
        clients = {
            name: ClientText(train=Path(text["train"]), eval=Path(text["eval"]))
            for name, text in tree["clients"].items()
        }
        return cls(
            model_dir=Path(tree["model_dir"]),
            learned=Learned(**learned),
            budget=Budget(**tree["budget"]),
            seed=tree["seed"],
            clients=clients,
            out_dir=Path(tree["out_dir"]),
            num_threads=tree["num_threads"],
        )


def round_file(folder: Path, number: int) -> Path:
    """Return the path of the trained tensors after a round, counted from 1."""
    return folder / f"round-{number}.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A size of the whole comparison."""

    name: str
    lora: Budget
    full: Budget
    seeds: Sequence[int]
    full_seeds: Sequence[int]
    num_clients: int
    full_clients: int
    """Four of Flower's clients with all weights of a 135 M model, and its server, need more than 24 GB."""

    def budget(self, table: Table) -> Budget:
        """Return the budget of a table's arms."""
        return self.lora if table == "lora" else self.full

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)
