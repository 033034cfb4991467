"""A conversation that a script leads: each command makes something happen, and everything that follows is told.

`name > message` is what a client sends and `name < message` what the server sends to it, as the other side takes them.
Below a message, `do:` is an effect that the server's desks, its gate or its rounds decided on, and `say:` an event.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traces.attempts import calls, outcome
from traces.clinic import CALLS, Clinic, Records
from traces.lies import FROM_A_CLIENT, FROM_THE_SERVER, line_of, spoken
from traces.sentences import sentence
from traces.world import World

from splitfl.config.trees import ServerConfig
from splitfl.session.server_session import ServerSession

# Small, and with two tensors that train on each side of the upper cut; `run` lays its settings over these.
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "train": {"bottom": "none", "loss": "plain"},
    "lora": {"r": 1, "target_modules": ["q_proj"]},
    "optimizer": {"lr_scheduler_type": "constant"},
    "text": {"max_seq_length": 6},
    "federation": {
        "num_rounds": 2,
        "local_steps": 2,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "wait_timeout": 60.0,
        "round_timeout": 100.0,
        "step_timeout": 10.0,
        "max_missed_steps": 30,
    },
    "storage": {"fsync": "never"},
}
_SECTIONS = ("federation", "strategy", "link", "storage", "train", "text", "optimizer", "server")
_NEVER_QUIET = ("Refusal", "refuses", "violation", "may not")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One line of a script."""

    verb: str
    words: tuple[str, ...]
    options: Mapping[str, str]

    @classmethod
    def of(cls, line: str) -> "Command":
        """Read `verb word word name=value`."""
        verb, *rest = line.split()
        options = dict(word.split("=", 1) for word in rest if "=" in word)
        return cls(verb=verb, words=tuple(word for word in rest if "=" not in word), options=options)


class Conversation:
    """Carries out the commands of a script in a world."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._world = World(folder=folder)
        self._usual = {
            **_SETTINGS,
            "model": {"model_name_or_path": str(model)},
            "server": {"cache_dir": folder / "cache"},
        }
        self._commands: Mapping[str, Callable[[Command], None]] = {
            "run": self._run,
            "crash": lambda _: self._world.crash(),
            "join": self._join,
            "lose": self._lose,
            "silence": self._silence,
            "step": self._step,
            "train": self._train,
            "tick": lambda command: self._world.tick(float(command.words[0].removesuffix("s"))),
            "hold-results": self._hold,
            "next-results": lambda _: self._world.server.hear_results(),
            "release-results": self._release,
            "slow": self._slow,
            "fast": self._fast,
            "deliver": self._deliver,
            "duplicate": self._duplicate,
            "state": self._state,
            "send": self._send,
            "hear": self._hear,
            "would-take": self._would_take,
            "would-hear": self._would_hear,
            "anything-from": self._anything_from,
            "anything-to": self._anything_to,
            "any-call-of": self._any_call_of,
            **dict.fromkeys(CALLS, self._call),
        }

    def do(self, line: str) -> list[str]:
        """Carry out a line and return what happened; `quietly` leaves all but refusals out, `repeat N` says it once."""
        verb, _, rest = line.partition(" ")
        if verb == "quietly":
            return [told for told in self.do(rest) if any(word in told for word in _NEVER_QUIET)]
        if verb == "repeat":
            times, _, rest = rest.partition(" ")
            return list(_without_repetitions(self.do(rest) for _ in range(int(times))))
        self._world.lines = []
        command = Command.of(line)
        self._commands[command.verb](command)
        return self._world.lines

    def close(self) -> None:
        """End the servers of all runs."""
        self._world.close()

    def _named(self, command: Command) -> list[Clinic]:
        return [self._world.clinic(name) for name in command.words]

    # the run, and who is there

    def _run(self, command: Command) -> None:
        settings: dict[str, dict[str, Any]] = {name: dict(section) for name, section in self._usual.items()}
        for name, value in command.options.items():
            settings.setdefault(_section_of(name), {})[name] = _value(value)
        self._world.begin(settings)

    def _join(self, command: Command) -> None:
        """Connect, with other records than it has where the script gives some."""
        for clinic in self._named(command):
            if command.options:
                clinic.records = Records(**{key: int(value) for key, value in command.options.items()})
            self._world.join(clinic)

    def _lose(self, command: Command) -> None:
        for clinic in self._named(command):
            self._world.lose(clinic)

    def _silence(self, command: Command) -> None:
        """Have clients send no heartbeats any more."""
        for clinic in self._named(command):
            clinic.is_silent = True

    def _hold(self, _: Command) -> None:
        """Let the compute thread work, and the server hear of no result."""
        self._world.is_held = True

    def _release(self, _: Command) -> None:
        self._world.is_held = False
        self._world.go_on()

    # what clients do

    def _call(self, command: Command) -> None:
        for clinic in self._named(command):
            self._world.say(clinic, command.verb, command.options)

    def _step(self, command: Command) -> None:
        """Take a whole step: every micro-batch both ways, and the commit."""
        for clinic in self._named(command):
            self._take_step(clinic)

    def _take_step(self, clinic: Clinic) -> None:
        for _ in range(clinic.terms.micro_batches or 1):
            if not self._world.say(clinic, "forward", {}):
                return
            if clinic.terms.needs_backward and not self._world.say(clinic, "backward", {}):
                return
        self._world.say(clinic, "commit", {})

    def _train(self, command: Command) -> None:
        """Take all steps that are left of the round, in turn where several train, and hand the layers over."""
        for _ in range(self._world.server.terms.local_steps):
            for clinic in self._named(command):
                if clinic.has_steps_left:
                    self._take_step(clinic)
        for clinic in self._named(command):
            self._world.say(clinic, "upload", {})

    def _send(self, command: Command) -> None:
        """Have a client send what its own session would not let it."""
        name, kind = command.words
        clinic = self._world.clinic(name)
        self._world.send(clinic, spoken(kind, command.options, clinic.terms))

    def _hear(self, command: Command) -> None:
        """Have a client hear what no server of ours sends."""
        name, kind = command.words
        clinic = self._world.clinic(name)
        self._world.hear(clinic, spoken(kind, command.options, clinic.terms))

    # a wire that the script holds up

    def _slow(self, command: Command) -> None:
        """Leave on the wire whatever a client says and hears from now on."""
        for clinic in self._named(command):
            clinic.is_slow = True

    def _fast(self, command: Command) -> None:
        """Deliver it."""
        for clinic in self._named(command):
            clinic.is_slow = False
            for message in clinic.down:
                self._world.tell(f"{clinic.name} < {sentence(message)}")
        self._world.go_on()

    def _deliver(self, command: Command) -> None:
        """Deliver the next message, `up` to the server or `down` to the client."""
        name, direction = command.words
        clinic = self._world.clinic(name)
        if direction == "up":
            self._world.take_up(clinic)
        else:
            self._world.hear(clinic, clinic.down.popleft())
        self._world.go_on()

    def _duplicate(self, command: Command) -> None:
        """Have the next message arrive twice."""
        name, direction = command.words
        clinic = self._world.clinic(name)
        queue, arrow = (clinic.up, ">") if direction == "up" else (clinic.down, "<")
        queue.appendleft(queue[0])
        self._world.tell(f"{name} {arrow} {sentence(queue[0])}, twice")

    # what may be said now

    def _state(self, _: Command) -> None:
        """Say where both sides of every session are."""
        for clinic in self._world.clinics.values():
            self._world.tell(f"{clinic.name} at the server: {_place(self._world.server.session_of(clinic.name))}")
            self._world.tell(f"{clinic.name} at home: {sentence(clinic.records)}")
        self._world.tell(f"the server waits for {self._world.server.waits_for()}")

    def _would_take(self, command: Command) -> None:
        """Say what the server's side of a session would make of a message."""
        name, kind = command.words
        message = spoken(kind, command.options, self._world.server.terms)
        self._world.tell(outcome(self._world.server.session_of(name), message))

    def _would_hear(self, command: Command) -> None:
        """Say what the client's side would."""
        name, kind = command.words
        message = spoken(kind, command.options, self._world.server.terms)
        self._world.tell(outcome(self._world.clinic(name).session, message))

    def _anything_from(self, command: Command) -> None:
        """Say what the server's side of a session would make of each kind of message."""
        for clinic in self._named(command):
            session = self._world.server.session_of(clinic.name)
            for text in FROM_A_CLIENT:
                self._world.tell(f"{text}: {outcome(session, line_of(text, clinic.terms))}")

    def _anything_to(self, command: Command) -> None:
        """Say what the client's side would."""
        for clinic in self._named(command):
            for text in FROM_THE_SERVER:
                self._world.tell(f"{text}: {outcome(clinic.session, line_of(text, clinic.terms))}")

    def _any_call_of(self, command: Command) -> None:
        """Say what a client may send, and what not."""
        for clinic in self._named(command):
            for line in calls(clinic):
                self._world.tell(line)


def _place(session: ServerSession | None) -> str:
    """Say where the server's side of a session is."""
    if session is None:
        return "unknown"
    words = [session.phase.name]
    if session.phase.name == "TRAINING":
        words.append("its steps are done" if session.has_done_its_steps else f"step {session.next_step} is next")
    if session.num_in_flight:
        words.append(f"{session.num_in_flight} under way")
    return ", ".join([*words, sentence(session.applied)])


def _section_of(setting: str) -> str:
    fields = ServerConfig.model_fields
    return next(name for name in _SECTIONS if setting in fields[name].default.__class__.model_fields)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _without_repetitions(outcomes: Iterator[list[str]]) -> Iterator[str]:
    last: list[str] = []
    count = 0
    for lines in outcomes:
        if count and lines != last:
            yield from [_times(count), *last]
            count = 0
        last, count = list(lines), count + 1
    yield from [_times(count), *last]


def _times(count: int) -> str:
    return "once:" if count == 1 else f"{count} times:"
