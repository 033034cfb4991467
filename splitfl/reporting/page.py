"""The report as one HTML page that needs nothing beside itself: style, plots and numbers inline, all text escaped."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, TypeAlias

from splitfl.reporting import plots
from splitfl.reporting.figures import client_rows, measure_rows
from splitfl.reporting.page_style import STYLE
from splitfl.telemetry.units import (
    format_bytes,
    format_change,
    format_loss,
    format_seconds,
    format_share,
    format_weights,
)

Report: TypeAlias = Mapping[str, Any]
Cell: TypeAlias = str
"""HTML, already escaped."""

_DASH = "&ndash;"
_UNKNOWN = "\u2013"
_DIGEST_CHARACTERS = 12
_PATH = re.compile(r"(?:(?<=ipc://)|(?<![\w/.:~<-]))(?:/|[A-Za-z]:[\\/])[^\s\"'<>|,;]+")


def render_page(report: Report) -> str:
    """Write the whole page; `samples` and `alone` are shown where the report has them."""
    sections = [
        _headline(report),
        _loss_section(report),
        _alone_section(report),
        _sample_section(report),
        _measure_section(report),
        _client_section(report),
        _merge_section(report),
        _changes_section(report),
        _limits_section(),
        _settings_section(report),
    ]
    title = f"{_text(report.get('run_id') or 'run')} - splitfl"
    return _PAGE.format(title=title, style=STYLE, body="\n".join(section for section in sections if section))


def _headline(report: Report) -> str:
    about = [report.get("model"), _mode(report), report.get("device"), report.get("machine"), _date(report)]
    line = " &middot; ".join(_text(_without_paths(str(part))) for part in about if part)
    name = _text(report.get("run_id") or "unnamed run")
    head = f'<header><p class="eyebrow">splitfl run report</p><h1>{name}</h1><p class="about">{line}</p></header>'
    return "\n".join([head, _unfinished(report), f'<div class="cards">{"".join(_cards(report))}</div>'])


def _mode(report: Report) -> str | None:
    return f"{report['server_mode']} backbone" if report.get("server_mode") else None


def _date(report: Report) -> str | None:
    """Write the report's ISO date, which is in UTC, to the minute."""
    return f"{report['date'][:16].replace('T', ' ')} UTC" if report.get("date") else None


def _unfinished(report: Report) -> str:
    if report["complete"]:
        return ""
    why = f" It was {_text(report['stopped'])}." if report.get("stopped") else ""
    if report.get("reason"):
        why = f" Why: {_text(_without_paths(report['reason']))}."
    known = "The numbers below are what was known when it stopped."
    return f'<p class="banner">This run did not finish.{why} {known}</p>'


def _cards(report: Report) -> list[str]:
    clients = report["clients"]
    left = sum(client["left"] is not None for client in clients)
    wanted = report.get("num_rounds_planned")
    traffic = report["server"].get("bytes_sent"), report["server"].get("bytes_received")
    through = None if None in traffic else sum(traffic)
    return [
        _loss_card(report["eval_loss_before"], report["eval_loss_after"]),
        _card("Rounds", str(report["num_rounds"]), f"of {wanted} merged" if wanted else "merged"),
        _card("Clients", str(len(clients)), f"{left} left early" if left else "none left early"),
        _card(
            "Wall time",
            format_seconds(report["wall_seconds"]),
            f"{report['steps']:,} {'step' if report['steps'] == 1 else 'steps'} committed",
        ),
        _card("Traffic", "unknown" if through is None else format_bytes(through), "server, both ways"),
    ]


def _loss_card(before: float | None, after: float | None) -> str:
    """Show the one number the run is for; no claim where either end is unknown."""
    note = "plain mean over clients"
    if before and after is not None:
        note = f"{format_change(before, after)} ({(after - before) / before:+.1%}), {note}"
    value = f'{_number(before)} <span class="arrow">&rarr;</span> {_number(after)}'
    return f'<div class="card wide"><h3>Mean held-out loss</h3><p class="value">{value}</p><p>{_text(note)}</p></div>'


def _card(name: str, value: str, note: str) -> str:
    return f'<div class="card"><h3>{name}</h3><p class="value">{_text(value)}</p><p>{_text(note)}</p></div>'


def _loss_section(report: Report) -> str:
    if not plots.have_matplotlib():
        missing = "The plots need matplotlib, which is not installed here: <code>pip install splitfl[demo]</code>."
        return _section("Loss", f'<p class="banner">{missing}</p>')
    training = {client_id: _known(points) for client_id, points in report["curves"].items()}
    held_out = report["held_out"]
    figures = []
    if any(training.values()):
        figures.append(_figure(plots.plot_training(training), "Training loss by step: smoothed, raw points faint."))
    if any(held_out.values()):
        means = _mean_points(held_out)
        plot = plots.plot_held_out(held_out, means, ended=any(client["measures_after"] for client in report["clients"]))
        mean = " Broad grey line: mean over clients." if len(held_out) > 1 and len(means) > 1 else ""
        figures.append(_figure(plot, f"Loss on each client's held-out text (dots).{mean}"))
    if not figures:
        return _section("Loss", "<p>No step was committed and nothing was evaluated.</p>")
    return _section("Loss", f'{_legend(training)}<div class="figures">{"".join(figures)}</div>')


def _mean_points(curves: Mapping[str, Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Average over clients at each x that every evaluated client has, so that the mean never changes its members."""
    evaluated = [dict(points) for points in curves.values() if points]
    shared = sorted(set.intersection(*map(set, evaluated)))
    return [(x, sum(points[x] for points in evaluated) / len(evaluated)) for x in shared]


def _known(points: Iterable[Sequence[Any]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None]


def _legend(names: Iterable[str]) -> str:
    chips = [
        f'<li><i style="border-color: var(--c{number % plots.NUM_COLOURS})"'
        f"{' class=dashed' if number >= plots.NUM_COLOURS else ''}></i>{_text(name)}</li>"
        for number, name in enumerate(names)
    ]
    return f'<ul class="legend">{"".join(chips)}</ul>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def _alone_section(report: Report) -> str:
    """Compare with each client trained alone, where the caller measured that."""
    alone = report.get("alone")
    if not alone:
        return ""
    text = (
        f"Trained on its own text alone, a model reaches a mean loss of {_number(alone['mean_own'])} on its own"
        f" client's held-out text and {_number(alone['mean_all'])} on the held-out text of all clients. The model"
        f" trained together reaches {_number(alone['federation_mean'])} on all of them."
    )
    together = {client["client_id"]: client["eval_loss_after"] for client in report["clients"]}
    rows = [_alone_row(client, together.get(client["client_id"])) for client in alone["clients"]]
    means = ["mean", "", *map(_number, (alone["mean_own"], report["eval_loss_after"], alone["mean_all"]))]
    joint = ["trained together", "", "", "", _number(alone["federation_mean"])]
    header = ["client", "own text, before", "own text, alone", "own text, together", "all clients' text, alone"]
    return _section("Alone and together", f"<p>{text}</p>{_table(header, rows, foot=[means, joint])}")


def _alone_row(client: Mapping[str, Any], together: float | None) -> list[Cell]:
    losses = [client["eval_loss_before"], client["eval_loss_after"], together, client["mean_eval_loss_all"]]
    return [_text(client["client_id"]), *map(_number, losses)]


def _sample_section(report: Report) -> str:
    samples = report.get("samples") or []
    return _section("Generated text", "".join(map(_sample, samples))) if samples else ""


def _sample(sample: Mapping[str, Any]) -> str:
    parts = [f"<h3>{_text(sample.get('title') or 'Sample')}</h3>", _quote("Prompt", sample.get("prompt"))]
    pair = _quote("Before training", sample.get("before")) + _quote("After training", sample.get("after"))
    parts += [f'<div class="pair">{pair}</div>', _quote("Reference", sample.get("reference"))]
    return f'<article class="sample">{"".join(parts)}</article>'


def _quote(name: str, text: str | None) -> str:
    return "" if text is None else f"<div><h4>{name}</h4><pre>{_text(text)}</pre></div>"


def _measure_section(report: Report) -> str:
    """Show what was measured of held-out text, over all clients and for each."""
    figures = measure_rows(report)
    if not figures:
        return ""
    together = [
        [
            _text(row["title"]),
            *(_text(row[name] or _UNKNOWN) for name in ("before", "after", "mean")),
            _DASH if row["worst"] is None else f"{_text(row['worst'])} <small>{_text(row['worst_client'])}</small>",
        ]
        for row in figures
    ]
    titles, clients = client_rows(report)
    header = ["measure", "before", "after", "mean of clients", "worst client"]
    note = (
        "Before and after are over the held-out text of all clients: weighted by label tokens, or by examples where"
        " answers or labels are counted. Mean and worst are of the clients' own figures, the last ones."
    )
    best = f"<p>{_text(_ending(report))}</p>" if _ending(report) else ""
    body = f"{best}{_table(header, together)}<p class=note>{note}</p>"
    rows = [[_text(cell) for cell in row] for row in clients]
    return _section("Held-out measures", body + _table(["client, before and after", *titles], rows))


def _ending(report: Report) -> str:
    """Say how the comparison of rounds has ended the run, "" where it has not."""
    said = []
    if report["stopped_early"]:
        said.append(f"The run was ended early: {report['stopped_early']}.")
    if report["best_round"]:
        said.append(f"It ended with the layers and the backbone of round {report['best_round']}, the best one.")
    return " ".join(said)


def _client_section(report: Report) -> str:
    header = ["client", "examples", "cut short", "steps", "tokens", "label tokens", "padding"]
    header += ["loss before", "loss after", "change", "sent", "received", "peak memory", "seconds", "computing"]
    mean = [report["eval_loss_before"], report["eval_loss_after"]]
    means = ["mean", *[""] * 6, *map(_number, mean), _change(*mean), *[""] * 5]
    rows = [_client_row(client) for client in report["clients"]]
    server = ["server", *[""] * 9, *_use(report["server"] | {"wall_seconds": report["wall_seconds"]})]
    note = (
        "Held-out loss in nats a token. Tokens are those sent in training, label tokens those a loss was taken on."
        " Padding is"
        " the part of the positions sent in training that holds no token. Sent"
        " and received are each one's own bytes; sizes in decimal units."
    )
    note += _copies_note(report.get("copies"))
    return _section("Clients", f"{_table(header, rows, foot=[means, server])}<p class=note>{note}</p>{_also(report)}")


def _copies_note(copies: Mapping[str, Any] | None) -> str:
    if copies is None:
        return ""
    most = f", for {copies['most_at_once']} at once at most" if copies["most_at_once"] else ""
    return (
        f" The server held a copy of what trains of the backbone for each client: {format_bytes(copies['bytes_each'])}"
        f" with gradients and optimizer state{most}."
    )


def _client_row(client: Mapping[str, Any]) -> list[Cell]:
    counts = [client[key] for key in ("num_examples", "num_truncated", "steps", "num_tokens", "num_label_tokens")]
    losses = [client["eval_loss_before"], client["eval_loss_after"]]
    left = "" if client["left"] is None else f" <small>left: {_text(_without_paths(client['left']))}</small>"
    name = _text(client["client_id"]) + left
    known = [*map(_count, counts), _share(client["padding_share"]), *map(_number, losses), _change(*losses)]
    return [name, *known, *_use(client)]


def _use(row: Mapping[str, Any]) -> list[Cell]:
    sizes = [_size(row[key]) for key in ("bytes_sent", "bytes_received", "peak_rss_bytes")]
    seconds = [row["wall_seconds"], row["compute_seconds"]]
    return [*sizes, *(_DASH if value is None else f"{value:,.1f}" for value in seconds)]


def _also(report: Report) -> str:
    rows = [
        [_text(client["client_id"]), _text(name), _number(client["also_before"].get(name)), _number(loss)]
        for client in report["clients"]
        for name, loss in client["also"].items()
    ]
    table = _table(["client", "text", "loss before", "loss after"], rows, num_words=2)
    return f"<h3>Further held-out text</h3>{table}" if rows else ""


def _merge_section(report: Report) -> str:
    header = ["round", "clients (weight)", "absent", "digest", "equal on all clients"]
    rows = [_merge_row(merge) for merge in report["merges"]]
    if not rows:
        return _section("Merges", "<p>Nothing was merged.</p>")
    note = (
        "The digest is the server's over the merged tensors; each client computes its own after loading them. Who would"
        " be more than strategy.max_client_weight of a merge of three clients or more is held down to that share."
    )
    return _section("Merges", f"{_table(header, rows, num_words=5)}<p class=note>{note}</p>")


def _merge_row(merge: Mapping[str, Any]) -> list[Cell]:
    if not merge["accepted"]:
        return [
            str(merge["round"]),
            f"not merged: {_text(_without_paths(merge['reason']))}",
            _absent(merge),
            _DASH,
            _DASH,
        ]
    weights = [f"{_text(client_id)} ({weight})" for client_id, weight in format_weights(merge)]
    digest = f"<code>{_text(merge['digest'][:_DIGEST_CHARACTERS])}</code>"
    return [str(merge["round"]), ", ".join(weights), _absent(merge), digest, _equal(merge)]


def _absent(merge: Mapping[str, Any]) -> Cell:
    return _text(", ".join(merge["absent"])) or _DASH


def _equal(merge: Mapping[str, Any]) -> Cell:
    """Say how many clients loaded what the server merged; silence is not reported as a difference."""
    digests = merge["client_digests"]
    if not digests:
        return "not reported"
    same = sum(digest == merge["digest"] for digest in digests.values())
    answer = '<span class="good">yes</span>' if merge["equal"] else '<span class="bad">no</span>'
    return f"{answer} ({same} of {max(len(digests), len(merge['clients']))})"


def _changes_section(report: Report) -> str:
    """Show which settings were others at an earlier start."""
    rows = [
        [_when(each["time"]), f"<code>{_text(each['name'])}</code>", _setting(each["before"]), _setting(each["now"])]
        for each in report["settings_changed"]
    ]
    header = ["from the start at (UTC)", "setting", "before", "now"]
    return _section("Settings changed between starts", _table(header, rows, num_words=4)) if rows else ""


def _when(seconds: float | None) -> Cell:
    """Write seconds since 1970 as a date and time in UTC."""
    if seconds is None:
        return _DASH
    return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M")


def _limits_section() -> str:
    text = (
        "This is one run with one seed: another seed gives other numbers, and a difference as small as that between two"
        " seeds means nothing. Held-out loss is not usefulness at a task. Nothing here is a privacy claim: what"
        " activations, gradients and merged layers may tell the server is described in the documentation"
        " (<code>docs/privacy.md</code>)."
    )
    return _section("What these numbers do not show", f"<p>{text}</p>")


def _settings_section(report: Report) -> str:
    settings = [[f"<code>{_text(name)}</code>", _setting(value)] for name, value in _flat(report["settings"])]
    versions = [[_text(name), _text(version)] for name, version in report["versions"].items()]
    parts = [_run_facts(report)]
    if versions:
        parts.append(f"<h3>Versions</h3>{_table(['package', 'version'], versions, num_words=2)}")
    if settings:
        table = _table(["setting", "value"], settings, num_words=2)
        parts.append(f"<details><summary>All {len(settings)} settings</summary>{table}</details>")
    return _section("Settings", "".join(parts))


def _run_facts(report: Report) -> str:
    facts = {
        "Trained model": report.get("model_dir"),
        "Settings fingerprint": report.get("fingerprint"),
        "Steps a round": report.get("local_steps"),
        "Server threads": report.get("num_threads"),
    }
    known = "".join(f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in facts.items() if value is not None)
    return f"<dl>{known}</dl>" if known else ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Name each setting in full, as `--set` takes it."""
    rows = []
    for name, value in tree.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else [(prefix + name, value)]
    return rows


def _setting(value: Any) -> Cell:
    match value:
        case None | {} | []:
            return _DASH
        case bool():
            return str(value).lower()
        case list():
            return ", ".join(map(_setting, value))
        case _:
            return _text(_without_paths(str(value)))


def _without_paths(text: str) -> str:
    """Shorten absolute paths to their last part: a page that is passed on says nothing of the machine's folders."""
    for flavour in (PurePosixPath, PureWindowsPath):
        if flavour(text).is_absolute():
            return f"…/{flavour(text).name}"
    return _PATH.sub(lambda found: "…/" + re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _table(header: Sequence[str], rows: Iterable[Sequence[Cell]], *, num_words: int = 1, foot: Any = ()) -> str:
    """Lay out a table whose first `num_words` columns are words and the others numbers."""
    head = _row([html.escape(name) for name in header], "th", num_words)
    body = "".join(_row(row, "td", num_words) for row in rows)
    end = "".join(_row(row, "td", num_words) for row in foot)
    tail = f"<tfoot>{end}</tfoot>" if end else ""
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody>{tail}</table></div>'


def _row(cells: Iterable[Cell], tag: str, num_words: int) -> str:
    written = [f"<{tag}{' class=n' * (at >= num_words)}>{cell}</{tag}>" for at, cell in enumerate(cells)]
    return f"<tr>{''.join(written)}</tr>"


def _number(loss: float | None) -> Cell:
    return _DASH if loss is None else format_loss(loss)


def _change(before: float | None, after: float | None) -> Cell:
    return _DASH if before is None or after is None else format_change(before, after)


def _size(num_bytes: int | None) -> Cell:
    return _DASH if num_bytes is None else format_bytes(num_bytes)


def _share(share: float | None) -> Cell:
    return _DASH if share is None else format_share(share)


def _count(count: int | None) -> Cell:
    return _DASH if count is None else f"{count:,}"


def _text(value: object) -> str:
    return html.escape(str(value))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
