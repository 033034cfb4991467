"""Random faults of all kinds, every few seconds, on a real training run; then counts what was lost.

`python -m benchmarks.chaos --minutes 30 --seed 1 --json FILE`. A server and some clients train with keys, each client
through a proxy of its own. They are killed, stopped, frozen, cut off, delayed and damaged, and one of them sends its
commits twice. Each is started again with the same command. At the end the histories of all processes are counted
(benchmarks/history.py) and the run is trained again, quietly, from its log (benchmarks/replay.py). Everything stays in
`--folder`.

The tiny model is harmed every one to three seconds and has a link that notices quickly; `--model smollm2` trains
SmolLM2-135M on definitions of the Human Phenotype Ontology. Link and storage have the shipped settings, but all of the
log is kept. There is a harm every ten to thirty seconds, since a process that loads the model is not at work earlier.
"""

import argparse
import itertools
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import tomlkit
import torch
from rich.console import Console

from benchmarks.history import HISTORY_FILE, check
from benchmarks.keyed import KeyRing
from benchmarks.proxy import ChaosProxy
from benchmarks.replay import differences
from splitfl.commands.fleet import free_port
from splitfl.config.operation import LinkSection
from splitfl.config.own import default_cache_dir
from splitfl.config.trees import ClientConfig
from splitfl.demo.hpo import write_clinics
from splitfl.demo.model import prepare_model
from splitfl.telemetry.metrics import read_events
from splitfl.telemetry.versions import versions_of

# A fault that ends within this of the timeout may be over before anybody looks.
_HEARTBEAT_SLACK_S = 1.5
# How long memory is not looked at after a process has loaded everything.
_WARM_S = 10.0
_SPECIAL = {"unk_token": "<unk>", "eos_token": "</s>"}
# Sends some commits twice, as a network that repeats would; everything else is the client as it is.
_TWICE = """
import os, random, sys
from pathlib import Path
from client_edge.command import Client
from client_edge.connection.connection import Connection
from splitfl.command_line import run_one
from splitfl.protocol.messages import Commit
draw, count, send = random.Random(f"{sys.argv.pop(1)} {os.getpid()}"), Path(sys.argv.pop(1)), Connection.send
def twice(self, message):
    send(self, message)
    if isinstance(message, Commit) and draw.random() < 0.2:
        send(self, message)
        with count.open("a") as file:
            file.write("x")
Connection.send = twice
sys.exit(run_one("client", Client(), sys.argv[1:]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What is trained, and how often it is harmed."""

    name: str
    every_s: tuple[float, float]
    """Shortest and longest time from one fault to the next."""
    begins_after_s: float
    settles_within_s: float
    parts_within_s: float
    outage_s: float
    """Longest partition or freeze."""
    settings: Mapping[str, Mapping[str, Any]]
    write_model: Callable[[Path], Path]
    """Given a folder, where a model may be written, returns the model's."""
    write_texts: Callable[[Path, Sequence[str], int], dict[str, Path]]
    """Given a folder, the clients' names and a seed, returns a file for each client."""

    @property
    def heartbeat_timeout_s(self) -> float:
        """When a silent peer counts as gone."""
        return float(self.settings.get("link", {}).get("heartbeat_timeout", LinkSection().heartbeat_timeout))


@dataclass(slots=True, kw_only=True)
class _Process:
    """One role, over all its lives."""

    name: str
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes]
    started_s: float
    history: Path
    rss_bytes: int = 0
    """When it had been at work for a while; 0 before."""
    growth_bytes: int = 0
    measured_s: float = 0.0
    restart_at_s: float = 0.0
    thaw_at_s: float = 0.0


@dataclass(slots=True)
class _Injected:
    """A fault that the server has to notice."""

    client_id: str
    at: float
    until: float


class Chaos:
    """A run, and what is done to it."""

    def __init__(
        self,
        folder: Path,
        material: Material,
        *,
        num_clients: int,
        seed: int,
        has_keys: bool,
        server_mode: str,
        durability: str = "redo",
    ) -> None:
        self.folder = folder
        self.material = material
        self.run_dir = folder / "runs" / "chaos"
        self.counts: Counter[str] = Counter()
        self._draw = random.Random(seed)
        self._seed = seed
        self.names = [f"clinic-{number}" for number in range(num_clients)]
        self._injected: list[_Injected] = []
        self._port = free_port()
        self.proxies = {name: ChaosProxy(self._port, seed=seed) for name in self.names}
        self._has_keys = has_keys
        self._server_mode = server_mode
        self._durability = durability
        self._write_material()
        self.processes = {name: self._begin(name, self._command(name)) for name in ("server", *self.names)}

    # the run

    def _write_material(self) -> None:
        model = self.material.write_model(self.folder)
        texts = self.material.write_texts(self.folder, self.names, self._seed)
        ring = KeyRing(self.folder) if self._has_keys else None
        self._write("server", self._server_settings(model, ring))
        for name in self.names:
            address = f"tcp://127.0.0.1:{self.proxies[name].port}"
            settings = self._client_settings(name, address, texts[name])
            if ring is not None:
                settings["client"] |= ring.enrol(name, address)
            self._write(name, settings)

    def _server_settings(self, model: Path, ring: KeyRing | None) -> dict[str, Any]:
        keys = {"keys": str(ring.server_keys)} if ring is not None else {}
        given = {name: dict(section) for name, section in self.material.settings.items()}
        return {
            **given,
            "model": {"model_name_or_path": str(model), **given.get("model", {})},
            "optimizer": {"lr_scheduler_type": "constant"},
            "federation": {
                "server_mode": self._server_mode,
                "num_rounds": 100_000,
                "min_available_clients": len(self.names),
                **given.get("federation", {}),
            },
            "storage": {"keep_snapshots": 0, "durability": self._durability, **given.get("storage", {})},
            "server": {
                "address": f"tcp://127.0.0.1:{self._port}",
                "runs_dir": str(self.folder / "runs"),
                "run_id": "chaos",
                "cache_dir": str(self.folder / "cache"),
                "num_threads": 1,
                "history": True,
                "export_model": False,
                **keys,
            },
        }

    def _client_settings(self, name: str, address: str, text: Path) -> dict[str, Any]:
        return {
            "client": {
                "client_id": name,
                "server_address": address,
                "output_dir": str(self.folder / "clients"),
                "cache_dir": str(self.folder / "cache"),
                "num_threads": 1,
                "history": True,
            },
            "data": {"path": str(text), "eval_fraction": 0.0},
        }

    def _write(self, name: str, settings: dict[str, Any]) -> None:
        self.config(name).write_text(tomlkit.dumps(settings))

    def config(self, name: str) -> Path:
        """Return a role's settings file."""
        return self.folder / f"{name}.toml"

    def _command(self, name: str) -> list[str]:
        config = ["--config", str(self.config(name))]
        if name == "server":
            return [sys.executable, "-m", "server_backbone", *config]
        if name == self.names[-1]:
            return [sys.executable, "-c", _TWICE, str(self._seed), str(self.folder / "duplicates"), "--accept", *config]
        return [sys.executable, "-m", "client_edge", "--accept", *config]

    def _begin(self, name: str, command: list[str]) -> _Process:
        log = self.folder / f"{name}.log"
        folder = self.run_dir if name == "server" else self.folder / "clients" / "chaos" / name
        process = start(command, log)
        return _Process(
            name=name,
            command=command,
            log=log,
            process=process,
            started_s=time.monotonic(),
            history=folder / HISTORY_FILE,
        )

    # the faults

    def harm(self, minutes: float) -> None:
        """Inject faults until the time is over, and start again each process that has ended."""
        until_s = time.monotonic() + minutes * 60
        next_s = time.monotonic() + self.material.begins_after_s
        kinds = [kind for kind, weight in self._faults().items() for _ in range(weight)]
        while time.monotonic() < until_s:
            if time.monotonic() >= next_s:
                getattr(self, f"_{self._draw.choice(kinds)}")()
                next_s = time.monotonic() + self._draw.uniform(*self.material.every_s)
            self._tend()
            time.sleep(0.05)

    @staticmethod
    def _faults() -> dict[str, int]:
        return {
            "kill_server": 2,
            "kill_client": 3,
            "stop_server": 1,
            "stop_client": 1,
            "freeze": 2,
            "partition": 3,
            "one_way": 2,
            "cut": 3,
            "delay": 3,
            "corrupt": 3,
        }

    def _tend(self) -> None:
        now_s = time.monotonic()
        for each in self.processes.values():
            if each.thaw_at_s and now_s >= each.thaw_at_s:
                each.process.send_signal(signal.SIGCONT)
                each.thaw_at_s = 0.0
            code = each.process.poll()
            if code is None:
                _measure(each, now_s)
                continue
            if code not in (0, -signal.SIGKILL) and not each.restart_at_s:
                self.counts[f"exit_{code}"] += 1
                print(f"{each.name} ended with {code}; see {each.log}", flush=True)
            each.restart_at_s = each.restart_at_s or now_s + self._draw.uniform(0.0, 2.0)
            if now_s >= each.restart_at_s:
                each.process, each.started_s = start(each.command, each.log), now_s
                each.restart_at_s, each.rss_bytes, each.thaw_at_s = 0.0, 0, 0.0

    def _victim(self, *, is_server: bool) -> _Process:
        return self.processes["server" if is_server else self._draw.choice(self.names)]

    def _end(self, victim: _Process, number: int, count: str) -> None:
        if victim.process.poll() is None:
            victim.process.send_signal(number)
            victim.process.send_signal(signal.SIGCONT)
            victim.thaw_at_s = 0.0
            self.counts[count] += 1
            if victim.name != "server" and number == signal.SIGKILL:
                self._expect(victim.name, 2.0)

    def _kill_server(self) -> None:
        self._end(self._victim(is_server=True), signal.SIGKILL, "kills_server")

    def _kill_client(self) -> None:
        self._end(self._victim(is_server=False), signal.SIGKILL, "kills_client")

    def _stop_server(self) -> None:
        self._end(self._victim(is_server=True), signal.SIGTERM, "terms_server")

    def _stop_client(self) -> None:
        self._end(self._victim(is_server=False), signal.SIGTERM, "terms_client")

    def _freeze(self) -> None:
        victim = self._victim(is_server=self._draw.random() < 0.3)
        if victim.process.poll() is None and not victim.thaw_at_s:
            seconds = self._draw.uniform(1.0, 0.6 * self.material.outage_s)
            victim.process.send_signal(signal.SIGSTOP)
            victim.thaw_at_s = time.monotonic() + seconds
            self.counts["freezes"] += 1
            if victim.name != "server":
                self._expect(victim.name, seconds)

    def _partition(self) -> None:
        name, seconds = self._draw.choice(self.names), self._draw.uniform(1.0, self.material.outage_s)
        self.proxies[name].silence(seconds)
        self.counts["partitions"] += 1
        self._expect(name, seconds)

    def _one_way(self) -> None:
        name, seconds = self._draw.choice(self.names), self._draw.uniform(1.0, 0.8 * self.material.outage_s)
        self.proxies[name].silence(seconds, self._draw.choice(["up", "down"]))
        self.counts["partitions"] += 1

    def _cut(self) -> None:
        self.proxies[self._draw.choice(self.names)].cut()
        self.counts["cuts"] += 1

    def _delay(self) -> None:
        harm = self.proxies[self._draw.choice(self.names)].harm[self._draw.choice(["up", "down"])]
        harm.delay_s = 0.0 if harm.delay_s else self._draw.uniform(0.01, 0.2)
        self.counts["delays"] += 1

    def _corrupt(self) -> None:
        self.proxies[self._draw.choice(self.names)].harm[self._draw.choice(["up", "down"])].flips += 1

    def _expect(self, name: str, seconds: float) -> None:
        now = time.time()
        self._injected.append(_Injected(client_id=name, at=now, until=now + seconds))

    # the end

    def settle(self) -> None:
        """Let everybody train in peace for a moment, then stop them in order."""
        for proxy in self.proxies.values():
            proxy.heal()
        before = _last_commit(self.run_dir)
        self._until(lambda: _last_commit(self.run_dir) >= before + 2 * len(self.names), self.material.settles_within_s)
        for name in (*self.names, "server"):
            self.processes[name].process.send_signal(signal.SIGTERM)
        for each in self.processes.values():
            each.process.wait(timeout=self.material.parts_within_s)

    def end(self) -> None:
        """End whatever still runs."""
        for each in self.processes.values():
            if each.process.poll() is None:
                each.process.kill()
                each.process.wait()
        for proxy in self.proxies.values():
            proxy.close()

    def _until(self, is_true: Callable[[], bool], timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not is_true():
            if time.monotonic() > deadline_s:
                raise SystemExit(f"the run did not go on within {timeout_s:g} s without faults; see {self.folder}")
            self._tend()
            time.sleep(0.1)

    def max_detect_seconds(self) -> float:
        """Return the longest time from a death, freeze or partition of a client to the server's word of it.

        Only faults that outlasted the heartbeat timeout while the server lived, of a client that was just at work,
        count: others need not be noticed.
        """
        history = read_events(self.run_dir / HISTORY_FILE)
        worked = [(e["client_id"], e["time"]) for e in history if e["event"] == "acknowledged"]
        events = read_events(self.run_dir / "metrics.jsonl")
        lost = [(e["client_id"], e["time"]) for e in events if e["event"] in ("client_lost", "client_left")]
        restarts = [e["time"] for e in events if e["event"] in ("run_started", "resumed")]
        longest = 0.0
        for fault in self._injected:
            noticed = min((at for name, at in lost if name == fault.client_id and at >= fault.at), default=None)
            due = fault.at + self.material.heartbeat_timeout_s + _HEARTBEAT_SLACK_S
            was_at_work = any(name == fault.client_id and 0 <= fault.at - at < 2 for name, at in worked)
            if (
                noticed is None
                or not was_at_work
                or due > fault.until
                or any(fault.at - 15 < at < due + 2 for at in restarts)
            ):
                continue
            longest = max(longest, noticed - fault.at)
        return longest

    def results(self) -> dict[str, Any]:
        """Count what was lost, and train the run again."""
        histories = {name: self.folder / "clients" / "chaos" / name / HISTORY_FILE for name in self.names}
        verdict = check(self.run_dir / HISTORY_FILE, histories, keeps_records=self._durability == "redo")
        clients = [ClientConfig.load(self.config(name)) for name in self.names]
        different = differences(self.run_dir, clients, histories)
        duplicates = self.folder / "duplicates"
        counted = {name: self.counts[name] for name in ("kills_server", "kills_client", "partitions")}
        others = {name: count for name, count in sorted(self.counts.items()) if name not in counted}
        return {
            **counted,
            "corruptions": sum(proxy.flipped for proxy in self.proxies.values()),
            "duplicates": len(duplicates.read_text()) if duplicates.exists() else 0,
            "steps_acknowledged": verdict.steps_acknowledged,
            "steps_lost": verdict.steps_lost,
            "steps_twice": verdict.steps_twice,
            "steps_undone": verdict.steps_undone,
            "replay_bit_identical": not different,
            "max_detect_seconds": round(self.max_detect_seconds(), 2),
            "rss_growth_bytes": max(each.growth_bytes for each in self.processes.values()),
            "commits": verdict.commits,
            "restarts_resumed": verdict.restarts,
            "other_faults": others,
            "problems": (verdict.problems + different)[:20],
        }


def start(command: list[str], log: Path, **environment: str) -> "subprocess.Popen[bytes]":
    """Start a role as a process; its words are added to the log."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environment},
        )


def _measure(each: _Process, now_s: float) -> None:
    """Follow a process's memory, once a second, from ten seconds after it had loaded everything."""
    if now_s - max(each.started_s + _WARM_S, each.measured_s + 1.0) < 0:
        return
    each.measured_s = now_s
    if not each.rss_bytes and not _has_loaded(each):
        each.started_s = now_s
        return
    try:
        rss = psutil.Process(each.process.pid).memory_info().rss
    except psutil.NoSuchProcess:
        return
    each.rss_bytes = each.rss_bytes or rss
    each.growth_bytes = max(each.growth_bytes, rss - each.rss_bytes)


def _has_loaded(each: _Process) -> bool:
    """Tell whether a process has written that it began: everything is loaded then."""
    lines = each.history.read_bytes().splitlines() if each.history.exists() else []
    return any(b'"started"' in line and b'"process": %d,' % each.process.pid in line for line in lines)


def _last_commit(run_dir: Path) -> int:
    path = run_dir / HISTORY_FILE
    if not path.exists():
        return 0
    return max((event.get("commit_number", 0) for event in read_events(path)), default=0)


def _write_tiny(folder: Path) -> Path:
    """Write a random Llama of four blocks, 32 wide, with a tokenizer of one letter a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = folder / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: number for number, letter in enumerate(letters, start=3)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL).save_pretrained(directory)
    return directory


def _write_letters(folder: Path, names: Sequence[str], seed: int) -> dict[str, Path]:
    draw = random.Random(seed)
    for name in names:
        lines = ["".join(draw.choices("abcdefghij ", k=draw.randint(4, 12))) for _ in range(40)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return {name: folder / f"{name}.txt" for name in names}


def _smollm2(_folder: Path) -> Path:
    """Return the demo's model, converted into the user's cache if it is not there."""
    return prepare_model(default_cache_dir(), Console())


def _write_definitions(folder: Path, names: Sequence[str], seed: int) -> dict[str, Path]:
    """Give each client the definitions of one of the demo's clinics, in turn."""
    clinics = write_clinics(folder / "clinics", num_train=200, num_eval=1, seed=seed)
    return {name: files.train for name, files in zip(names, itertools.cycle(clinics.values()), strict=False)}


MATERIALS = {
    "tiny": Material(
        name="tiny",
        every_s=(1.0, 3.0),
        begins_after_s=10.0,
        settles_within_s=150.0,
        parts_within_s=30.0,
        outage_s=10.0,
        settings={
            "federation": {"local_steps": 25, "step_timeout": 20.0},
            "link": {"heartbeat_interval": 0.5, "heartbeat_timeout": 3.0, "slowest_link_bytes_per_second": 1e6},
            "storage": {"snapshot_steps": 40},
        },
        write_model=_write_tiny,
        write_texts=_write_letters,
    ),
    "smollm2": Material(
        name="smollm2",
        every_s=(10.0, 30.0),
        begins_after_s=60.0,
        settles_within_s=600.0,
        parts_within_s=120.0,
        outage_s=30.0,
        settings={
            "train": {"backbone_layers": 4},
            "federation": {"per_device_train_batch_size": 1},
            "text": {"max_seq_length": 128},
        },
        write_model=_smollm2,
        write_texts=_write_definitions,
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run it; 0 when nothing was lost, nothing counted twice and every bit agrees."""
    parser = argparse.ArgumentParser(prog="benchmarks.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=3, metavar="N")
    parser.add_argument("--model", choices=tuple(MATERIALS), default="tiny")
    parser.add_argument("--server-mode", choices=("shared", "sequential", "per_client", "frozen"), default="shared")
    parser.add_argument("--durability", choices=("redo", "snapshot"), default="redo")
    parser.add_argument("--plain", action="store_true", help="without keys: a checksum instead of encryption")
    parser.add_argument("--folder", type=Path, help="where everything is kept; a new one by default")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="splitfl-chaos-"))
    if folder.exists() and any(folder.iterdir()):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    material = MATERIALS[arguments.model]
    chaos = Chaos(
        folder,
        material,
        num_clients=arguments.clients,
        seed=arguments.seed,
        has_keys=not arguments.plain,
        server_mode=arguments.server_mode,
        durability=arguments.durability,
    )
    begun = datetime.now(UTC)
    try:
        chaos.harm(arguments.minutes)
        chaos.settle()
    finally:
        chaos.end()
    results = chaos.results() | {
        "minutes": arguments.minutes,
        "seed": arguments.seed,
        "clients": arguments.clients,
        "model": material.name,
        "seconds_between_faults": material.every_s,
        "load": os.getloadavg(),
        "keys": not arguments.plain,
        "server_mode": arguments.server_mode,
        "durability": arguments.durability,
        "date": begun.strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "versions": versions_of(("splitfl", "torch", "transformers", "pyzmq")),
        "histories": str(folder),
    }
    for name, value in results.items():
        print(f"{name:24} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    is_good = not results["steps_lost"] and not results["steps_twice"] and results["replay_bit_identical"]
    return 0 if is_good and not results["problems"] else 1


if __name__ == "__main__":
    sys.exit(main())
