"""What a conversation is between: a server, its clients, the messages on the wires between them, and one clock."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from traces.attempts import check_unchanged, state_of
from traces.clinic import CALLS, Clinic
from traces.sentences import sentence
from traces.told_server import ToldServer, Wire, told_server

from splitfl.config.kind import RunKind
from splitfl.config.trees import ServerConfig
from splitfl.errors import LocalProtocolError, RemoteProtocolError
from splitfl.protocol.messages import Attach, Leave, Message, Ping, Pong

_TICK_S = 0.25
_PING_S = 2.0
# No line of a script leads to more messages.
_MOST_ROUNDTRIPS = 1000
_ON_CONTROL = (Attach, Ping, Leave)


@dataclass(kw_only=True, eq=False)
class World:
    """One run at a time; `lines` is what has happened."""

    folder: Path
    lines: list[str] = field(default_factory=list, init=False)
    clinics: dict[str, Clinic] = field(default_factory=dict, init=False)
    is_held: bool = field(default=False, init=False)
    """Whether the server hears of nothing that its compute thread has done."""

    def __post_init__(self) -> None:
        self._servers: list[ToldServer] = []
        self._now_s = self._pinged_s = 0.0
        self._is_over = self._beats = False

    @property
    def server(self) -> ToldServer:
        """The server of the run."""
        return self._servers[-1]

    def tell(self, line: str) -> None:
        """Write down what has happened."""
        self.lines.append(line)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Begin another run."""
        self._config = ServerConfig.from_tree(settings, source="a trace")
        self._run_dir = self.folder / f"run-{len(self._servers)}"
        self.clinics, self.is_held = {}, False
        self._now_s = self._pinged_s = 0.0
        self._start()

    def _start(self) -> None:
        self._wire, self._is_over = Wire(self._arrives), False
        self._servers.append(told_server(self._config, self._run_dir, self._wire, lambda: self._now_s, self.tell))
        self.tell(f"the server waits for {self.server.waits_for()}")

    def crash(self) -> None:
        """Kill the server, and start it again."""
        self.server.close()
        self.is_held = False
        for clinic in self.clinics.values():
            clinic.is_connected = False
        self._start()
        self.go_on()

    def close(self) -> None:
        """End the servers of all runs."""
        for server in self._servers:
            server.close()

    # clients

    def clinic(self, name: str) -> Clinic:
        """Return a client, which may never have said anything."""
        if name not in self.clinics:
            has_own_loop = self.server.run.kind is RunKind.OWN_LOOPS
            self.clinics[name] = Clinic(name=name, terms=self.server.terms, has_own_loop=has_own_loop)
        return self.clinics[name]

    def join(self, clinic: Clinic) -> None:
        """Have a client say hello on a new connection."""
        clinic.connect()
        self._wire.connections[clinic.name] = clinic.number
        self.go_on()

    def lose(self, clinic: Clinic) -> None:
        """Break a client's connection, and have the server notice."""
        clinic.is_connected = False
        self._wire.connections.pop(clinic.name, None)
        self.server.loses(clinic.name)
        self.go_on()

    def say(self, clinic: Clinic, verb: str, options: Mapping[str, str]) -> bool:
        """Have a client do something by its own session; return whether that lets it."""
        try:
            clinic.up.append(CALLS[verb](clinic, options))
        except LocalProtocolError as error:
            self.tell(f"{clinic.name} may not: {error}")
            return False
        self.go_on()
        return True

    def send(self, clinic: Clinic, message: Message) -> None:
        """Have a client send what its own session would not let it."""
        self._wire.connections.setdefault(clinic.name, clinic.number)
        clinic.up.append(message)
        self.go_on()

    def hear(self, clinic: Clinic, message: Message) -> None:
        """Have a client hear something, whoever sent it."""
        self.tell(f"{clinic.name} < {sentence(message)}")
        self._take_down(clinic, message)

    # the wire

    def _arrives(self, name: str, message: Message) -> bool:
        clinic = self.clinics[name]
        if isinstance(message, Pong) and self._beats:
            return True
        self.tell(f"{name} < {sentence(message)}" + (", on its way" if clinic.is_slow else ""))
        clinic.down.append(message)
        return True

    def go_on(self) -> None:
        """Carry messages both ways until nothing moves any more."""
        for _ in range(_MOST_ROUNDTRIPS):
            self._settle()
            clinic = next((each for each in self.clinics.values() if each.has_mail), None)
            if clinic is None:
                return
            if clinic.down:
                self._take_down(clinic, clinic.down.popleft())
            else:
                self.take_up(clinic)
        raise AssertionError("the conversation does not come to an end")

    def _settle(self) -> None:
        if not self.is_held:
            self.server.settle()
        if self.server.is_over and not self._is_over:
            self._is_over = True
            self.tell(f"the run is over{': ' * bool(self.server.reason)}{self.server.reason}")
            self.server.dismiss(self.server.reason or "the run is over")

    def take_up(self, clinic: Clinic) -> None:
        """Have the server take the next message of a client."""
        message = clinic.up.popleft()
        self.tell(f"{clinic.name} > {sentence(message)}{', to nobody' * self._is_over}")
        if not self._is_over:
            self.server.take(clinic.control_peer if isinstance(message, _ON_CONTROL) else clinic.peer, message)

    def _take_down(self, clinic: Clinic, message: Message) -> None:
        before = state_of(clinic.session)
        try:
            clinic.hear(message)
        except RemoteProtocolError as error:
            self.tell(f"  {clinic.name} refuses that: {error}")
            check_unchanged(before, state_of(clinic.session))

    # the clock

    def tick(self, seconds: float) -> None:
        """Let time go by; clients that are there and not silent send their heartbeats."""
        end_s = self._now_s + seconds
        while self._now_s < end_s and not self._is_over:
            self._now_s += _TICK_S
            before = len(self.lines)
            self._beat()
            self._settle()
            self.server.tick()
            self.go_on()
            if len(self.lines) > before:
                self.lines.insert(before, f"at {self._now_s:g} s:")

    def _beat(self) -> None:
        if self._now_s - self._pinged_s < _PING_S:
            return
        self._pinged_s, self._beats = self._now_s, True
        for clinic in self.clinics.values():
            if clinic.is_connected and not clinic.is_silent:
                self.server.take(clinic.control_peer, Ping(number=1))
        self._beats = False
