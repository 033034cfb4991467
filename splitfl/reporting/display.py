"""The progress of a run for people: a live panel on a terminal, one line an event elsewhere."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from splitfl.reporting.view import ClientView, RunView
from splitfl.telemetry.measures import MEASURES
from splitfl.telemetry.metrics import Event
from splitfl.telemetry.units import (
    counted,
    format_bytes,
    format_loss,
    format_measure,
    format_seconds,
    format_share,
    format_weights,
    printable,
)

_STEP_LINE_EVERY_S = 2.0
_SPEED_SEEN_FOR_S = 600.0
"""How far back the time that is left is estimated from: merges and evaluations should be in it."""
_DIGEST_CHARACTERS = 12
_NUMBERS = ("round", "step", "loss", "tokens/s", "sent", "received")
_WIDE = 80
"""Columns of a terminal that all numbers have room in."""
_STATE_STYLES = {"training": "green", "waiting": "yellow", "done": "cyan", "left": "red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """What the panel is drawn from."""

    view: RunView
    at_s: float
    """When its last event came, by the display's clock."""
    news: str


class Display:
    """A listener of events that shows the run on the console; use it in a `with`, from one thread.

    Names and reasons come from peers, so they are shown as plain text: no markup, no control characters.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._shown = _Shown(view=RunView(), at_s=clock(), news="")  # read by rich's refresh thread, replaced whole
        self._bar = Progress(
            BarColumn(bar_width=None, complete_style="cyan"),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("left", style="progress.remaining"),
            console=console,
            get_time=clock,
            speed_estimate_period=_SPEED_SEEN_FOR_S,
            expand=True,
        )
        self._whole = self._bar.add_task("", total=1.0)
        self._last_step_line_s = -_STEP_LINE_EVERY_S
        self._last_waiting_line = ""
        self._live: Live | None = None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        view = self._shown.view.after(event)
        line = log_line(event, view)
        is_news = bool(line) and event["event"] not in {"step", "waiting"}
        self._shown = _Shown(view=view, at_s=self._clock(), news=line if is_news else self._shown.news)
        self._bar.update(self._whole, completed=view.fraction)
        if self._live is None and line and self._is_due(event):
            self._console.print(Text(line), soft_wrap=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, get_renderable=self._panel, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _is_due(self, event: Event) -> bool:
        """Thin out what comes often: step lines by time, waiting lines by what they say."""
        match event["event"]:
            case "step":
                due = event["elapsed_s"] - self._last_step_line_s >= _STEP_LINE_EVERY_S
                self._last_step_line_s = event["elapsed_s"] if due else self._last_step_line_s
            case "waiting":
                due = event["text"] != self._last_waiting_line
                self._last_waiting_line = event["text"]
            case _:
                due, self._last_waiting_line = True, ""
        return bool(due)

    def _panel(self) -> Panel:
        shown = self._shown
        since_s = 0.0 if shown.view.finished else self._clock() - shown.at_s
        return panel(shown.view, shown.view.elapsed_s + since_s, self._bar, shown.news, self._console.width)


def panel(view: RunView, elapsed_s: float, bar: Progress, news: str, width: int) -> Panel:
    """Draw the run: where it is, a bar, a row a client, what is waited for and the latest news."""
    parts: list[RenderableType] = [_header(view, elapsed_s), bar, Text(), _client_table(view, width)]
    if view.waiting_for:
        parts.append(Text(f"waiting: {printable(view.waiting_for)}", style="yellow"))
    if news:
        parts.append(Text(news, style="dim", no_wrap=True, overflow="ellipsis"))
    return Panel(Group(*parts), title=Text("splitfl"), title_align="left", border_style="dim")


def log_line(event: Event, view: RunView) -> str:
    """Write an event as one line of plain text; empty for events that are not worth one."""
    said = _say(event, view)
    if not said:
        return ""
    kind, text = said
    return f"{event['elapsed_s']:8.1f} s  {kind:<10}{printable(text)}"


def _say(event: Event, view: RunView) -> tuple[str, str] | None:
    """Return the word an event's line begins with and what it says."""
    match event["event"]:
        case "run_started":
            return "run", _say_run(event)
        case "waiting":
            return "waiting", event["text"]
        case "client_joined":
            return "joined", event["client_id"]
        case "client_left" if view.client(event["client_id"]).state != "done":
            return "left", f"{event['client_id']}: {event['reason']}"
        case "client_lost":
            return "lost", f"{event['client_id']}: {event['reason']}; waiting for it to come back"
        case "client_returned":
            return "back", f"{event['client_id']}, at step {event['step'] + 1}"
        case "sits_out":
            return "sits out", f"{event['client_id']} {event['reason']}"
        case "taken_back":
            return "back", f"{event['client_id']} shows work again, and is waited for"
        case "failed":
            return "failed", f"{event['client_id']}, {event['count']}. time: {event['reason']}"
        case "client_rejoins":
            return "rejoins", f"{event['client_id']}: {event['reason']}; it takes part from the next round on"
        case "client_rewinds":
            return "rewinds", f"{event['client_id']} goes back to step {event['step']} with this server"
        case "resumed":
            return "resumed", f"at commit {event['commit_number']} of round {event['round']}"
        case "settings_changed":
            return "settings", "; ".join(f"{c['name']}: {c['before']!r} -> {c['now']!r}" for c in event["changes"])
        case "violation":
            return "violation", f"{event['client_id']}, {event['strikes']}. time: {event['rule']}"
        case "cut_off":
            return "cut off", f"{event['client_id'] or event['address']}: a message without end"
        case "snapshot_failed":
            return "disk", f"no snapshot: {event['reason']}"
        case "note":
            return "note", event["text"]
        case "rejoined" | "rewound":
            return event["event"], event["reason"]
        case "round_opened":
            return "round", _say_round(event, view)
        case "step":
            return "step", _say_step(event, view)
        case "evaluated":
            return "evaluated", _say_evaluation(event, view)
        case "federated" if event["num_clients"] > 1:
            return "together", _say_federated(event)
        case "judged":
            return "compared", _say_judgement(event)
        case "rounds_ended":
            return "ended", _say_rounds_ended(event)
        case "merged":
            return "merged", _say_merge(event)
        case "last_call":
            return (
                "closing",
                f"round {event['round']} waits for the finished steps of {', '.join(event['clients']) or 'nobody'}",
            )
        case "stuck":
            where = f"cannot go on from the layers of merge {event['round']}"
            return "stuck", f"{event['client_id']} {where}: {event['reason']}"
        case "upload_dropped":
            return "dropped", f"{event['client_id']}: its layers, {event['reason']}"
        case "client_done":
            return "done", _say_done(event, view)
        case "run_finished":
            return "end", _say_end(event)
    return None


def _say_run(event: Event) -> str:
    rounds, steps = counted(event["num_rounds"], "round"), counted(event["local_steps"], "step")
    what = f"{rounds} of {steps}" if event["num_rounds"] else "own-loop clients"
    return f"{event['run_id']}: {event['model']}, {event['server_mode']}, {what}, {event['device']}"


def _say_round(event: Event, view: RunView) -> str:
    last_step = event["first_step"] + event["num_steps"] - 1
    which = f"{event['round']}/{view.started.get('num_rounds', '?')}"
    steps = f"steps {event['first_step']}-{last_step}" if event["num_steps"] > 1 else f"step {last_step}"
    return f"{which}: {steps} of {', '.join(event['trainers'])}"


def _say_step(event: Event, view: RunView) -> str:
    client = view.client(event["client_id"])
    loss, rate = format_loss(event["loss"]), _rate(client.tokens_per_second)
    return f"{_padded(event, view)}  step {event['step']:>4}  loss {loss:>6}  {rate:>6} tokens/s  {_traffic(event)}"


def _say_evaluation(event: Event, view: RunView) -> str:
    phase = f"after round {event['round']}" if event["phase"] == "round" else f"{event['phase']} training"
    loss = f"held-out loss {format_loss(event['eval_loss'])} on {counted(event['num_eval_examples'], 'example')}"
    others = "".join(
        f", {measure.title} {format_measure(name, event[name])}"
        for name, measure in MEASURES.items()
        if name != "eval_loss" and event.get(name) is not None
    )
    also = "".join(f", {name} {format_loss(loss)}" for name, loss in (event.get("also") or {}).items())
    return f"{_padded(event, view)}  {phase}: {loss}{others}{also}"


def _say_federated(event: Event) -> str:
    phase = f"after round {event['round']}" if event["phase"] == "round" else f"{event['phase']} training"
    said = [f"{MEASURES[name].title} {format_measure(name, found['value'])}" for name, found in _in_order(event)]
    worst = "".join(
        f"; worst {MEASURES[name].title} {format_measure(name, found['worst'])} ({found['worst_client']})"
        for name, found in _in_order(event)[:1]
    )
    return f"{event['num_clients']} clients {phase}: {', '.join(said)}{worst}"


def _in_order(event: Event) -> list[tuple[str, dict[str, Any]]]:
    """Return what was measured of all clients' text, the loss first."""
    return [(name, event["measures"][name]) for name in MEASURES if name in event["measures"]]


def _say_judgement(event: Event) -> str:
    title = MEASURES[event["metric"]].title
    if event["value"] is None:
        return f"round {event['round']}: no client has measured {title}"
    value, best = (format_measure(event["metric"], event[name]) for name in ("value", "best_value"))
    if event["best_round"] == event["round"]:
        return f"round {event['round']}: {title} {value}, the best so far"
    return f"round {event['round']}: {title} {value}; the best was {best} after round {event['best_round']}"


def _say_rounds_ended(event: Event) -> str:
    said = event["reason"] or "all rounds are done"
    return said + (f"; the run ends with the layers of round {event['best_round']}" if event["best_round"] else "")


def _say_merge(event: Event) -> str:
    absent = f"; absent: {', '.join(event['absent'])}" if event["absent"] else ""
    if not event["accepted"]:
        return f"round {event['round']} not merged: {event['reason']}{absent}"
    weights = ", ".join(f"{client_id} ({weight})" for client_id, weight in format_weights(event))
    digest = event["digest"][:_DIGEST_CHARACTERS]
    return f"round {event['round']}: {weights}; {counted(event['num_tensors'], 'tensor')}, digest {digest}{absent}"


def _say_done(event: Event, view: RunView) -> str:
    client = view.client(event["client_id"])
    share = 1 - client.num_tokens / client.num_positions if client.num_positions else None
    padding = "" if share is None else f"{format_share(share)} padding  "
    said = counted(event["num_examples"], "example") if event["num_examples"] is not None else "- examples"
    return f"{_padded(event, view)}  {said}  {padding}{_traffic(event)}"


def _say_end(event: Event) -> str:
    how = "complete" if event["complete"] else "incomplete"
    where = f"; model in {event['model_dir']}" if event["model_dir"] else ""
    return f"{how} after {format_seconds(event['wall_seconds'])}{where}"


def _header(view: RunView, elapsed_s: float) -> Text:
    run, opened = view.started, view.round
    parts = [run.get("run_id", "starting"), run.get("model"), run.get("server_mode")]
    if run and run["num_rounds"]:
        parts.append(f"round {opened.number}/{run['num_rounds']}")
    if opened.number:
        parts.append(f"step {view.round_steps}/{opened.num_steps}")
    words = [printable(part) for part in parts if part] + [format_seconds(elapsed_s)]
    return Text("  ·  ").join([Text(words[0], style="bold"), *map(Text, words[1:])])


def _client_table(view: RunView, width: int) -> Table:
    """Draw a row a client; a narrow terminal keeps the names and leaves out the columns to the right."""
    numbers = _NUMBERS if width >= _WIDE else _NUMBERS[:3]
    table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
    table.add_column("client", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("state", no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for client in view.clients.values():
        table.add_row(*_client_row(client)[: 2 + len(numbers)])
    return table


def _client_row(client: ClientView) -> list[Text]:
    numbers = [str(client.round or "-"), str(client.step or "-"), format_loss(client.loss)]
    numbers += [_rate(client.tokens_per_second), format_bytes(client.bytes_sent), format_bytes(client.bytes_received)]
    state = Text(client.state, style=_STATE_STYLES.get(client.state, ""))
    return [Text(printable(client.client_id)), state, *map(Text, numbers)]


def _rate(tokens_per_second: float | None) -> str:
    """Write tokens a second; a slow client's are not rounded to none."""
    if tokens_per_second is None:
        return "-"
    return f"{tokens_per_second:.0f}" if tokens_per_second >= 10 else f"{tokens_per_second:.1f}"


def _padded(event: Event, view: RunView) -> str:
    """Return the client's name, as wide as the longest name so far."""
    width = max(map(len, view.clients), default=0)
    return f"{event['client_id']:<{width}}"


def _traffic(event: dict[str, Any]) -> str:
    return f"sent {format_bytes(event['bytes_sent']):>8}  received {format_bytes(event['bytes_received']):>8}"
