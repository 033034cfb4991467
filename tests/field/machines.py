"""Machines that are namespaces of this one: each has a network of its own and names of its own (`/etc/hosts`).

A machine lives as long as a process of ours that reads from a pipe: when the tests end, in whatever way, the pipe
closes, and kernel and machine are rid of each other. So no namespace has a name, and none stays. A user who is not root
needs user namespaces (`unshare --map-root-user`, as `make field` does it).
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_NEEDED = ("unshare", "nsenter", "setpriv", "ip", "tc", "mount")
_APART = ("unshare", "--net", "--mount", "sh", "-c")
_PROBE = "ip link add name probe type veth && tc qdisc add dev lo root tbf rate 1mbit burst 32kb latency 50ms"
_SET_UP = 'mount --bind "$1" /etc/hosts && ip link set lo up && echo ready && exec cat'
_READY_S = 10.0
_END_S = 10.0
# What a queue before a slow link holds at most, as time: routers at home hold more.
_QUEUE = "200ms"


def why_not() -> str:
    """Say why no machines can be made here, "" where they can."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here (util-linux, iproute2)"
    tried = subprocess.run([*_APART, _PROBE], capture_output=True, text=True, timeout=_READY_S, check=False)
    if tried.returncode:
        return f"neither root nor user namespaces, or no veth or tbf in this kernel ({tried.stderr.strip()})"
    return ""


class Program:
    """A program on a machine: its words so far, and how it ended."""

    def __init__(self, command: Sequence[str], said: Path, environment: Mapping[str, str]) -> None:
        """Start it; what it says on standard output and standard error goes to one file, as on a screen."""
        self.said_at = said
        self.name = said.stem
        with said.open("wb") as screen:
            # in a session of its own: a Ctrl-C at the tests' terminal is for the tests
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=screen,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def said(self) -> str:
        return self.said_at.read_text(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        return self._process.poll()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to a program that must be running."""
        assert self.poll() is None, f"{self.name} has ended with {self.poll()}: {self.said}"
        self._process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """Wait for its end, and return its exit code."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {timeout_s:g} s; it has said: {self.said}") from None

    def ends_well(self, timeout_s: float) -> None:
        """Wait for its end, which must be in order."""
        code = self.wait(timeout_s)
        assert code == 0, f"{self.name} ended with {code}; it has said: {self.said}"

    def end(self) -> None:
        """End it if it still runs."""
        if self.poll() is None:
            self._process.kill()
        self._process.wait(_END_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One machine's end of a cable."""

    machine: "Machine"
    device: str
    address: str
    """Its own."""
    peer: str
    """The other end's address."""

    def cut(self) -> None:
        """Pull the plug: nobody is told."""
        self.machine.do("ip", "link", "set", self.device, "down")

    def mend(self) -> None:
        """Put it back in."""
        self.machine.do("ip", "link", "set", self.device, "up")

    def shape(self, rate: str) -> None:
        """Let no more out than this, such as 20mbit."""
        self.machine.do(
            *("tc", "qdisc", "replace", "dev", self.device, "root", "tbf"),
            *("rate", rate, "burst", "32kb", "latency", _QUEUE),
        )


class Machine:
    """A network, a `/etc/hosts` and a home of one's own."""

    def __init__(self, name: str, folder: Path, path: str) -> None:
        """`path` is where its programs are looked for."""
        self.name = name
        self.folder = folder / name
        self.home = self.folder / "home"
        self.home.mkdir(parents=True)
        self.programs: list[Program] = []
        self._hosts = self.folder / "hosts"
        self._hosts.write_text("127.0.0.1 localhost\n", encoding="utf-8")
        self._environment = {"PATH": path, "HOME": str(self.home), "LANG": "C.UTF-8"}
        if "PYTHONPATH" in os.environ:
            self._environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
        self._holder = subprocess.Popen(
            [*_APART, _SET_UP, "sh", str(self._hosts)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n", f"machine {name} did not come up"
        self._num_links = 0

    @property
    def pid(self) -> int:
        """The process that its namespaces are found by."""
        return self._holder.pid

    def knows(self, host: str, address: str) -> None:
        """Let this machine find a host by its name from now on, also one that it knew by another address."""
        lines = self._hosts.read_text(encoding="utf-8").splitlines()
        others = [line for line in lines if line.split()[1] != host]
        self._hosts.write_text("\n".join([*others, f"{address} {host}"]) + "\n", encoding="utf-8")

    def do(self, *command: str, timeout_s: float = 60.0) -> str:
        """Run a command to its end, which must be in order, and return what it said."""
        done = subprocess.run(
            self._here(command),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{command} on {self.name} ended with {done.returncode}: {done.stderr}"
        return done.stdout + done.stderr

    def start(self, *command: str, **environment: str) -> Program:
        """Start a program."""
        said = self.folder / f"{self.name}-{len(self.programs)}.said"
        self.programs.append(Program(self._here(command), said, self._environment | environment))
        return self.programs[-1]

    def new_link(self, address: str, peer: str) -> Link:
        """Name the next cable's end here."""
        self._num_links += 1
        return Link(machine=self, device=f"eth{self._num_links - 1}", address=address, peer=peer)

    def connections(self, kind: str) -> int:
        """Count the TCP connections made so far, "PassiveOpens" to this machine and "ActiveOpens" from it."""
        names, values = (
            line.split()
            for line in Path(f"/proc/{self.pid}/net/snmp").read_text(encoding="ascii").splitlines()
            if line.startswith("Tcp:")
        )
        return int(values[names.index(kind)])

    def _here(self, command: Sequence[str]) -> list[str]:
        # each of these becomes the next, so that the process id is the program's own
        enters = ["nsenter", f"--target={self.pid}", "--net", "--mount"]
        return ["setpriv", "--pdeathsig", "KILL", *enters, "env", f"--chdir={self.folder}", *command]

    def close(self) -> None:
        """End its programs, and it."""
        for program in self.programs:
            program.end()
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.stdout.close()
        self._holder.wait(_END_S)


class Network:
    """Machines and the cables between them."""

    def __init__(self, folder: Path, path: str) -> None:
        self._folder = folder
        self._path = path
        self._machines: list[Machine] = []
        self._num_cables = 0

    def machine(self, name: str) -> Machine:
        """Make a machine."""
        self._machines.append(Machine(name, self._folder, self._path))
        return self._machines[-1]

    def join(self, one: Machine, other: Machine, *, rate: str = "") -> tuple[Link, Link]:
        """Put a cable between two machines, as slow as that both ways; return its ends."""
        net = f"10.201.{self._num_cables}"
        self._num_cables += 1
        ends = one.new_link(f"{net}.1", f"{net}.2"), other.new_link(f"{net}.2", f"{net}.1")
        made = ["ip", "link", "add", "name", ends[0].device, "type", "veth"]
        one.do(*made, "peer", "name", ends[1].device, "netns", str(other.pid))
        for end in ends:
            end.machine.do("ip", "address", "add", f"{end.address}/30", "dev", end.device)
            end.mend()
            if rate:
                end.shape(rate)
        return ends

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as stack:
            for machine in self._machines:
                stack.callback(machine.close)


def until(deadline_s: float, what: str, *programs: Program) -> Iterator[None]:
    """Go round until a deadline; an `AssertionError` when it has passed, or when one of the programs has ended."""
    ends_s = time.monotonic() + deadline_s
    while time.monotonic() < ends_s:
        yield
        for program in programs:
            assert program.poll() is None, f"{program.name} ended before {what}: {program.said}"
        time.sleep(0.05)
    said = "\n".join(f"{program.name}: {program.said}" for program in programs)
    raise AssertionError(f"no {what} within {deadline_s:g} s\n{said}")
