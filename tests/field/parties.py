"""An operator and clinics, each on a machine of its own, who follow README.md and docs word for word."""

import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from field.machines import Link, Machine, Network, Program, until

from splitfl.telemetry.metrics import Event, read_events

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
KEYS_PAGE = ROOT / "docs" / "keys.md"
HOST = "gpu-box"
PORT = 5555

# A server's events about trouble with a client, whether it is to blame or not.
_TROUBLES = (
    "client_lost",
    "client_left",
    "client_rejoins",
    "client_rewinds",
    "violation",
    "cut_off",
    "step_refused",
    "upload_dropped",
    "snapshot_failed",
)


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def command(name: str) -> list[str]:
    """Return the words of the first `splitfl NAME ...` of the README, or else of docs."""
    pages = [README, *sorted(README.parent.glob("docs/*.md"))]
    lines = [line for page in pages for block in blocks(page, "console") for line in block.splitlines()]
    found = next((line for line in lines if line.startswith(f"$ splitfl {name} ")), None)
    assert found is not None, f"no page has a line with `$ splitfl {name}`"
    return shlex.split(found.removeprefix("$ "), comments=True)


def tables(page: Path, section: str) -> tomlkit.TOMLDocument:
    """Return the first TOML block of a page that has this section."""
    found = (tomlkit.parse(block) for block in blocks(page, "toml"))
    return next(tree for tree in found if section in tree)


def long_texts(characters: int, *, num_texts: int) -> list[str]:
    """Return pieces of a long page of that length, some tokens to five letters."""
    prose = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    return [prose[start : start + characters] for start in range(0, characters * num_texts, characters)]


def settings(*names_and_values: str) -> list[str]:
    """Return `--set` for each SECTION.KEY=VALUE."""
    return [word for each in names_and_values for word in ("--set", each)]


class Operator:
    """Who has the machine with the compute, and keys."""

    def __init__(self, machine: Machine, models: Path) -> None:
        """`models` is where `make demo` has left its model."""
        self.machine = machine
        self.folder = machine.folder
        self.runs_dir = self.folder / "runs"
        cache = machine.home / ".cache" / "splitfl"
        cache.mkdir(parents=True)
        (cache / "models").symlink_to(models)
        config = tables(README, "federation")
        config["server"].update(tables(KEYS_PAGE, "server")["server"])  # type: ignore[union-attr, arg-type]
        (self.folder / "server.toml").write_text(tomlkit.dumps(config), encoding="utf-8")
        machine.do(*command("keygen"))

    def enrol(self, clinic: "Clinic") -> None:
        """Let a clinic in, by the files that the two send each other."""
        name = clinic.name
        shutil.copyfile(clinic.folder / "keys" / "public.key", self.folder / f"{name}-public.key")
        said = self.machine.do(*(word.replace("clinic-a", name) for word in command("authorize")))
        assert name in said
        shutil.copyfile(self.folder / f"{name}.enrolment.toml", clinic.folder / f"{name}.enrolment.toml")

    def start(self, *words: str, **environment: str) -> Program:
        """Start the server, or start it again, and wait until it listens."""
        program = self.machine.start(*command("server"), *words, **environment)
        for _ in until(90.0, "word of where clients find it", program):
            if "waiting   clients at" in program.said:
                return program
        return program

    @property
    def run_dir(self) -> Path:
        """The newest run's folder."""
        return max(self.runs_dir.iterdir(), key=lambda path: path.name)

    def events(self, *kinds: str) -> list[Event]:
        """Return what the newest run's log has of these kinds."""
        return [event for event in read_events(self.run_dir / "metrics.jsonl") if event["event"] in kinds]

    def troubles(self) -> list[str]:
        """Name everything that went wrong with a client."""
        found = [event for event in self.events(*_TROUBLES) if event.get("reason") != "done"]
        return [
            f"{event['event']} {event.get('client_id')}: {event.get('reason', event.get('rule'))}" for event in found
        ]

    def steps_of(self, name: str) -> int:
        """Count a client's different steps that were acknowledged."""
        return len({event["step"] for event in self.events("step") if event["client_id"] == name})

    def wait_for_steps(self, count: int, programs: Mapping[str, Program], timeout_s: float = 150.0) -> None:
        """Wait until each of the clinics by these names has done that many steps; their programs must live on."""
        for _ in until(timeout_s, f"{count} steps", *programs.values()):
            if all(self.steps_of(name) >= count for name in programs.keys() - {HOST}):
                return


class Clinic:
    """Who has text, and a key pair."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine = machine
        self.folder = machine.folder
        self.name = name
        self.config: dict[str, Any] = tables(README, "client")
        with_keys = tables(KEYS_PAGE, "client")["client"]
        self.config["client"] |= {
            key: str(value).replace("clinic-a", name)
            for key, value in with_keys.items()  # type: ignore[union-attr]
        }
        self.write()
        (text,) = blocks(README, "json")
        (self.folder / "train.jsonl").write_text(text, encoding="utf-8")
        machine.do(*command("keygen"))

    def takes(self, texts: Sequence[str]) -> None:
        """Have texts of its own instead of the README's."""
        lines = [json.dumps({"text": text}) for text in texts]
        (self.folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def write(self) -> None:
        """Write the file of settings."""
        (self.folder / "client.toml").write_text(tomlkit.dumps(self.config), encoding="utf-8")

    def start(self, *words: str, **environment: str) -> Program:
        """Start the client, or start it again; there is no terminal to ask on."""
        return self.machine.start(*command("client"), "--accept", *words, **environment)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parties:
    """An operator and clinics that are enrolled."""

    operator: Operator
    clinics: list[Clinic]
    links: list[Link]
    """Each clinic's end of its cable to the operator's machine."""

    @classmethod
    def of(cls, network: Network, models: Path, *names: str, rate: str = "") -> "Parties":
        """Set them up, each clinic with a cable of its own, as slow as that."""
        parties = cls(operator=Operator(network.machine(HOST), models), clinics=[], links=[])
        for name in names:
            parties.add(network, name, rate=rate)
        return parties

    def add(self, network: Network, name: str, *, rate: str = "") -> Clinic:
        """Let in one more clinic."""
        clinic = Clinic(network.machine(name), name)
        near, far = network.join(self.operator.machine, clinic.machine, rate=rate)
        clinic.machine.knows(HOST, near.address)
        self.operator.enrol(clinic)
        self.clinics.append(clinic)
        self.links.append(far)
        return clinic
