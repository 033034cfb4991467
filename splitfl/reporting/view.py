"""Where a run stands after the events so far, folded once: display and report read this and fold no event themselves.

It grows with clients and starts only, so that a server may keep it for weeks; `whole_run` adds what grows with the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from splitfl.telemetry.metrics import Event

Told: TypeAlias = Mapping[str, Any]
"""The fields of one event; empty before it came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of one client."""

    sent: int = 0
    received: int = 0

    @classmethod
    def of(cls, event: Told) -> "Traffic":
        """Read what an event tells of it."""
        return cls(sent=event.get("bytes_sent") or 0, received=event.get("bytes_received") or 0)

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(sent=self.sent + other.sent, received=self.received + other.received)

    def since(self, earlier: "Traffic") -> "Traffic":
        """Return what was added to an earlier count; one that is lower than the earlier has begun anew."""
        return Traffic(
            sent=self.sent - (earlier.sent if self.sent >= earlier.sent else 0),
            received=self.received - (earlier.received if self.received >= earlier.received else 0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One process that served the run: what it counts begins at nothing. Times are seconds since 1970."""

    started: Told = field(default_factory=dict)
    finished: Told = field(default_factory=dict)
    stopped: Told = field(default_factory=dict)
    first_s: float
    last_s: float
    traffic: Traffic | None = None
    """What its clients' steps tell of; None before the first."""
    compute_seconds: float | None = None
    """As the last step tells it."""

    @property
    def end(self) -> Told:
        """The process's own totals at its end, nothing if it was killed."""
        return self.finished or self.stopped

    @property
    def bytes_sent(self) -> int | None:
        """The server's bytes sent; of a killed one, the bytes that its clients' steps say they have received."""
        return self.end.get("bytes_sent", None if self.traffic is None else self.traffic.received)

    @property
    def bytes_received(self) -> int | None:
        """The server's bytes received; of a killed one, the bytes that its clients' steps say they have sent."""
        return self.end.get("bytes_received", None if self.traffic is None else self.traffic.sent)

    def after(self, event: Event) -> "Life":
        """Take an event in, but for the traffic, which the clients count."""
        life = replace(self, last_s=event["time"])
        match event["event"]:
            case "step":
                return replace(life, compute_seconds=event.get("compute_seconds"))
            case "run_finished":
                return replace(life, finished=event)
            case "run_stopped":
                return replace(life, stopped=event)
        return life


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundView:
    """The round that was opened last; `number` is 0 before the first."""

    number: int = 0
    num_steps: int = 0
    trainers: tuple[str, ...] = ()
    opened_s: float = 0.0
    """Seconds since its server began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientView:
    """What is known of one client."""

    client_id: str
    state: str = "connected"
    round: int = 0
    step: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    """Of all tokens that went through in this round's steps, those without a loss included."""
    round_tokens: int = 0
    round_steps: int = 0
    num_tokens: int = 0
    num_positions: int = 0
    """Tokens and padding of all its steps that were seen, repeated ones included."""
    traffic: Traffic | None = None
    """What its steps tell of, over all lives of the server; None before the first."""
    counted: Traffic = Traffic()
    """The count of its last step, which begins anew with each life."""
    done: Told = field(default_factory=dict)
    """What it told at its goodbye."""
    left: str | None = None
    """Why it left last."""

    @property
    def bytes_sent(self) -> int:
        """Its own total, or what its steps tell before it has said goodbye."""
        return self.done.get("bytes_sent") or (self.traffic or Traffic()).sent

    @property
    def bytes_received(self) -> int:
        """Its own total, or what its steps tell before it has said goodbye."""
        return self.done.get("bytes_received") or (self.traffic or Traffic()).received

    def opened(self, round_: RoundView) -> "ClientView":
        """Begin a round, in which it trains or waits."""
        state = "training" if self.client_id in round_.trainers else "waiting"
        is_here = self.state not in {"done", "left"}
        return replace(self, round_tokens=0, round_steps=0, state=state if is_here else self.state)

    def stepped(self, event: Event, round_: RoundView) -> "ClientView":
        """Take a step in."""
        tokens, counted = event.get("num_tokens", 0), Traffic.of(event)
        round_tokens, round_steps = self.round_tokens + tokens, self.round_steps + 1
        seconds = event["elapsed_s"] - round_.opened_s
        return replace(
            self,
            state="waiting" if round_steps >= round_.num_steps else "training",
            round=event["round"],
            step=event["step"],
            loss=event["loss"],
            tokens_per_second=round_tokens / seconds if seconds > 0 else None,
            round_tokens=round_tokens,
            round_steps=round_steps,
            num_tokens=self.num_tokens + tokens,
            num_positions=self.num_positions + event.get("num_positions", 0),
            traffic=(self.traffic or Traffic()) + counted.since(self.counted),
            counted=counted,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """Where a run stands after the events so far. Nothing here changes in place, so any thread may read it."""

    lives: tuple[Life, ...] = ()
    round: RoundView = RoundView()
    clients: Mapping[str, ClientView] = field(default_factory=dict)
    """In the order in which they were first heard of."""
    rounds_ended: Told = field(default_factory=dict)
    waiting_for: str = ""
    elapsed_s: float = 0.0
    """When the last event was, in seconds since its process began."""

    @property
    def started(self) -> Told:
        """What the run said of itself at its last start."""
        return self.lives[-1].started if self.lives else {}

    @property
    def finished(self) -> Told:
        """How the run ended; a run may end, and be prolonged."""
        return self.lives[-1].finished if self.lives else {}

    @property
    def complete(self) -> bool:
        """Whether it went through to its end."""
        return bool(self.finished.get("complete", False))

    @property
    def round_steps(self) -> int:
        """Steps of the open round that its furthest client has done."""
        return max((client.round_steps for client in self._trainers()), default=0)

    @property
    def fraction(self) -> float:
        """Share of the run that is done, from 0 to 1, all trainers of the open round counted alike."""
        if self.complete:
            return 1.0
        if not self.round.number or not self.started:
            return 0.0
        trainers = self._trainers()
        steps = sum(client.round_steps for client in trainers) / max(1, len(trainers) * self.round.num_steps)
        return min(1.0, (self.round.number - 1 + steps) / max(1, self.started["num_rounds"]))

    def client(self, client_id: str) -> ClientView:
        """Return what is known of a client, nothing if it was never heard of."""
        return self.clients.get(client_id, ClientView(client_id=client_id))

    def after(self, event: Event) -> "RunView":
        """Return the view with one event more; one that says nothing of it changes the time only."""
        view = replace(self, elapsed_s=event["elapsed_s"], lives=_lives_after(self.lives, event))
        match event["event"]:
            case "run_started":
                return view._with(*(replace(client, counted=Traffic()) for client in self.clients.values()))
            case "waiting":
                return replace(view, waiting_for=event["text"])
            case "client_joined" | "client_returned":
                return view._with(replace(self.client(event["client_id"]), state="connected"))
            case "client_lost":
                return view._with(replace(self.client(event["client_id"]), state="away"))
            case "client_left":
                return view._with(_parted(self.client(event["client_id"]), event["reason"]))
            case "client_done":
                return view._with(replace(self.client(event["client_id"]), state="done", done=event))
            case "round_opened":
                return view._opened(event)
            case "step":
                return view._stepped(event)
            case "rounds_ended":
                return replace(view, rounds_ended=event)
            case "merged" | "run_finished":
                return replace(view, waiting_for="")
        return view

    def _with(self, *clients: ClientView) -> "RunView":
        return replace(self, clients={**self.clients, **{client.client_id: client for client in clients}})

    def _trainers(self) -> list[ClientView]:
        return [self.client(client_id) for client_id in self.round.trainers]

    def _opened(self, event: Event) -> "RunView":
        round_ = RoundView(
            number=event["round"],
            num_steps=event["num_steps"],
            trainers=tuple(event["trainers"]),
            opened_s=event["elapsed_s"],
        )
        known = {**self.clients, **{name: self.client(name) for name in round_.trainers}}
        view = replace(self, round=round_, waiting_for="")
        return view._with(*(client.opened(round_) for client in known.values()))

    def _stepped(self, event: Event) -> "RunView":
        before, life = self.client(event["client_id"]), self.lives[-1]
        added = Traffic.of(event).since(before.counted)
        life = replace(life, traffic=(life.traffic or Traffic()) + added)
        view = replace(self, waiting_for="", lives=(*self.lives[:-1], life))
        return view._with(before.stepped(event, self.round))


def _lives_after(lives: tuple[Life, ...], event: Event) -> tuple[Life, ...]:
    if event["event"] == "run_started":
        return (*lives, Life(started=event, first_s=event["time"], last_s=event["time"]))
    if not lives:
        lives = (Life(first_s=event["time"], last_s=event["time"]),)
    return (*lives[:-1], lives[-1].after(event))


def _parted(client: ClientView, reason: str) -> ClientView:
    """Say goodbye to a client; one that is done leaves as well."""
    return replace(client, state="done" if client.state == "done" else "left", left=reason)
