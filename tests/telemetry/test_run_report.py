import io
import json
import re
import sys
from html.parser import HTMLParser

import pytest
from markupsafe import escape
from rich.console import Console

from splitfl.reporting.plots import smooth
from splitfl.reporting.report import build_report, measures_table, summary_table, write_report

VOID = {"meta", "br", "path", "use"}


class Outline(HTMLParser):
    """Fails on tags that do not close, and keeps ids, what is linked, and the text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.words = [], [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open += [] if tag in VOID else [tag]
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in {"src", "href", "xlink:href"}:
                self.links.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def page_of(report, folder):
    return write_report(folder, report).read_text(encoding="utf-8")


def without(events, *names):
    return [event for event in events if event["event"] not in names]


def test_the_report_holds_what_the_events_say(events):
    report = build_report(events)
    assert (report["run_id"], report["complete"], report["date"]) == ("run-1", True, "2027-01-15T08:00:00+00:00")
    assert (report["num_rounds"], report["steps"], report["wall_seconds"]) == (2, 4, 33.0)
    assert (report["eval_loss_before"], report["eval_loss_after"]) == (3.25, 2.25)
    assert (report["model_dir"], report["pids"]) == ("runs/run-1/model", {"server": 77})
    assert report["server"] == {
        "peak_rss_bytes": 900_000_000,
        "bytes_sent": 8_000_000,
        "bytes_received": 10_000_000,
        "compute_seconds": 11.0,
    }
    assert report["curves"]["clinic-b"] == [[1, 2.75], [2, 2.5], [3, 2.25], [4, 2.0]]
    assert report["clients"][1] == {
        "client_id": "clinic-b",
        "num_examples": 11,
        "num_truncated": 1,
        "peak_rss_bytes": 600_000_000,
        "wall_seconds": 20.5,
        "compute_seconds": 7.25,
        "eval_loss_before": 3.5,
        "eval_loss_after": 2.5,
        "num_eval_examples": 4,
        "measures_before": {"eval_loss": 3.5, "num_eval_examples": 4.0},
        "measures_after": {"eval_loss": 2.5, "num_eval_examples": 4.0},
        "also": {"general": 3.0},
        "also_before": {},
        "bytes_sent": 5_000_000,
        "bytes_received": 4_000_000,
        "steps": 4,
        "num_tokens": 600,
        "num_label_tokens": 400,
        "padding_share": 0.25,
        "left": None,
    }


@pytest.mark.parametrize(("server_mode", "commits"), [("shared", 4), ("sequential", 8), ("per_client", 8)])
def test_a_shared_commit_holds_a_step_of_each_client(events, server_mode, commits):
    assert build_report([events[0] | {"server_mode": server_mode}, *events[1:]])["steps"] == commits


def test_steps_that_a_resumed_run_says_again_count_once(events):
    again = [event | {"loss": 9.0} for event in events if event["event"] == "step" and event["step"] == 4]
    report = build_report([*events, *again])
    assert report["steps"] == 4
    assert report["curves"]["clinic-a"] == [[1, 2.75], [2, 2.5], [3, 2.25], [4, 9.0]]


def test_padding_is_unknown_where_nobody_has_counted_it(events, tmp_path):
    old = [{name: value for name, value in event.items() if name != "num_positions"} for event in events]
    report = build_report(old)
    assert [client["padding_share"] for client in report["clients"]] == [None, None]
    write_report(tmp_path, report)
    assert "25.0 %" not in (tmp_path / "report.html").read_text()
    write_report(tmp_path, build_report(events))
    assert (tmp_path / "report.html").read_text().count(">25.0 %<") == 2


def test_a_merge_is_equal_when_every_client_loaded_what_the_server_merged(events):
    assert [merge["equal"] for merge in build_report(events)["merges"]] == [True, True]
    wrong = [
        event | {"digest": "ff"} if event["event"] == "loaded" and event["client_id"] == "clinic-b" else event
        for event in events
    ]
    merge = build_report(wrong)["merges"][0]
    assert merge["equal"] is False
    assert merge["client_digests"] == {"clinic-a": merge["digest"], "clinic-b": "ff"}


def test_a_client_that_did_not_say_what_it_loaded_is_not_taken_as_equal(events):
    silent = [event for event in events if (event["event"], event.get("client_id")) != ("loaded", "clinic-b")]
    assert build_report(silent)["merges"][0]["equal"] is False
    assert build_report(without(events, "loaded"))["merges"][0]["equal"] is False


def test_a_client_that_left_early_is_reported_with_what_is_known(events, tmp_path):
    left = events[-1] | {"event": "client_left", "client_id": "clinic-b", "reason": "silent for 10 s"}
    early = [
        event
        for event in events
        if event.get("client_id") != "clinic-b"
        or (event["event"] != "client_done" and event.get("phase") != "after" and event.get("round") != 2)
    ]
    report = build_report([*[e for e in early if e["event"] != "client_left"], left])
    client = report["clients"][1]
    assert (client["num_examples"], client["eval_loss_after"], client["peak_rss_bytes"]) == (None, None, None)
    assert (client["steps"], client["bytes_sent"], client["left"]) == (2, 2_000_000, "silent for 10 s")
    assert (report["eval_loss_before"], report["eval_loss_after"]) == (3.0, 2.0)  # clinic-a's, both times
    assert report["merges"][1]["equal"] is True  # of those who stayed
    assert "1 left early" in Outline(page_of(report, tmp_path)).text


def test_a_run_killed_after_any_event_gives_an_incomplete_report(events):
    for length in range(len(events)):
        report = build_report(events[:length])
        assert report["complete"] is False
        assert report["server"]["peak_rss_bytes"] is None
        assert summary_table(report).row_count == len(report["clients"]) + 2


@pytest.fixture
def lives(events):
    """The run, stopped after its first merge, gone on with, killed after its third step, and gone on with again."""
    started, rest = events[0], events[1:]
    at = next(number for number, event in enumerate(rest) if event["event"] == "merged") + 1
    then = next(number for number, event in enumerate(rest[at:], at) if event["event"] == "step") + 1
    spent = {"bytes_sent": 1000, "bytes_received": 2000, "peak_rss_bytes": 9_000_000_000, "compute_seconds": 3.0}
    stopped = {"event": "run_stopped", "wall_seconds": 12.0, "complete": False, "reason": "stopped by <its> operator"}
    here = {"time": rest[at - 1]["time"], "elapsed_s": 12.0}
    return [started, *rest[:at], stopped | spent | here, started, *rest[at:then], started, *rest[then:]]


def test_the_report_of_a_run_that_was_stopped_and_killed_is_over_all_of_it(events, lives):
    whole, report = build_report(events), build_report(lives)
    assert (report["complete"], report["stopped"], report["steps"]) == (True, None, whole["steps"])
    assert report["curves"] == whole["curves"]
    assert report["server"]["peak_rss_bytes"] == 9_000_000_000
    of_killed = next(event for event in lives[lives.index(lives[0], 1) :] if event["event"] == "step")
    assert of_killed["bytes_sent"] > 0
    assert report["server"]["bytes_sent"] == 1000 + of_killed["bytes_received"] + whole["server"]["bytes_sent"]
    assert report["server"]["bytes_received"] == 2000 + of_killed["bytes_sent"] + whole["server"]["bytes_received"]
    assert report["wall_seconds"] > 12.0 + whole["wall_seconds"] - 0.001


def test_the_report_of_a_run_that_is_stopped_says_that_it_is_not_complete(lives, tmp_path):
    stopped = next(number for number, event in enumerate(lives) if event["event"] == "run_stopped")
    report = build_report(lives[: stopped + 1])
    assert (report["complete"], report["stopped"]) == (False, "stopped by <its> operator")
    assert (report["server"]["bytes_sent"], report["wall_seconds"]) == (1000, 12.0)
    text = Outline(page_of(report, tmp_path)).text
    assert "This run did not finish. It was stopped by <its> operator." in text


@pytest.mark.parametrize("length", [0, 4, 10, 27])
def test_an_incomplete_report_makes_a_page_that_says_so(events, tmp_path, length):
    report = build_report(events[:length])
    page = page_of(report, tmp_path)
    assert "This run did not finish" in Outline(page).text
    assert (">after</text>" in page) == (length == 27)  # the last to be drawn is the end only where it was evaluated


def test_both_files_are_written_whole_and_nothing_else(events, tmp_path):
    report = build_report(events)
    report["clients"][0]["eval_loss_after"] = float("nan")
    page = write_report(tmp_path / "run", report)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["report.html", "report.json"]
    assert page == tmp_path / "run" / "report.html"
    read = json.loads((tmp_path / "run" / "report.json").read_text(), parse_constant=pytest.fail)
    assert read["clients"][0]["eval_loss_after"] is None
    assert read["clients"][1] == report["clients"][1]


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be replaced there")
def test_a_reader_of_the_old_files_never_sees_a_half_written_one(events, tmp_path):
    write_report(tmp_path, build_report(events))
    for name in ("report.json", "report.html"):
        before = (tmp_path / name).read_bytes()
        with (tmp_path / name).open("rb") as reader:
            write_report(tmp_path, build_report([events[0] | {"run_id": name}, *events[1:]]))
            assert reader.read() == before
        assert name.encode() in (tmp_path / name).read_bytes()


def test_a_report_that_is_no_json_leaves_the_old_files(events, tmp_path):
    report = build_report(events)
    write_report(tmp_path, report)
    old = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    with pytest.raises(TypeError):
        write_report(tmp_path, report | {"samples": object()})
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == old


def test_the_page_stands_alone_and_says_the_numbers(events, tmp_path):
    page = page_of(build_report(events), tmp_path)
    outline = Outline(page)
    assert outline.tags.count("svg") == 2
    assert {"script", "link", "img", "iframe"}.isdisjoint(outline.tags)
    assert all(link.startswith("#") and link[1:] in outline.ids for link in outline.links)
    assert len(set(outline.ids)) == len(outline.ids)
    assert not re.search(r"@import|url\((?!#)", page)
    for said in ("3.250 → 2.250", "-1.000 (-30.8%)", "of 2 merged", "33.0 s", "yes (2 of 2)", "ab12ab12ab12"):
        assert said in outline.text
    assert "one run with one seed" in outline.text
    assert "Nothing here is a privacy claim" in outline.text
    assert "clinic-a (10), clinic-b (11)" in outline.text
    assert "prefers-color-scheme: dark" in page


def test_plots_leave_their_colours_to_the_page(events, tmp_path):
    svgs = re.findall(r"<svg.*?</svg>", page_of(build_report(events), tmp_path), re.DOTALL)
    for svg in svgs:
        assert not re.search(r"#[0-9a-f]{6}\b", svg)
        assert {"var(--c0)", "var(--c1)", "var(--muted)"} <= set(re.findall(r"var\(--\w+\)", svg))


def test_everything_from_users_is_escaped(events, tmp_path):
    evil = "<script>alert('x')</script>\"&"
    told = json.loads(json.dumps(events).replace("clinic-b", json.dumps(evil)[1:-1]))
    told[0] |= {"run_id": evil, "model": evil, "machine": evil, "versions": {evil: evil}, "settings": {evil: [evil]}}
    report = build_report(told)
    report["model_dir"] = report["fingerprint"] = evil
    report["merges"][0] |= {"accepted": False, "reason": evil, "absent": [evil]}
    report["clients"][0] |= {"left": evil}
    report["clients"][1]["also"] = {evil: 1.0}
    report["samples"] = [dict.fromkeys(("title", "prompt", "before", "after", "reference"), evil)]
    page = page_of(report, tmp_path)
    outline = Outline(page)
    assert "script" not in outline.tags
    assert page.count(escape(evil)) > 20
    assert page.count(escape("<script>alert")) == page.count("script&gt;alert")


def test_the_page_tells_no_folder_but_the_models(events, tmp_path):
    report = build_report(events) | {"model_dir": "/srv/runs/run-1/model", "model": "/secret/place/tiny"}
    report["clients"][0]["left"] = "cannot read /secret/place/notes.txt: gone"
    report["settings"]["data"] = {"windows": r"C:\secret\place\data", "with space": "/secret/place of ours/data"}
    outline = Outline(page_of(report, tmp_path))
    assert "secret" not in outline.text
    assert "place" not in outline.text
    assert "/srv/runs/run-1/model" in outline.text
    for kept in ("…/runs", "ipc://…/s.sock", "…/notes.txt: gone", "…/tiny", "…/data"):
        assert kept in outline.text


def test_addresses_and_slashes_that_are_no_paths_stay(events, tmp_path):
    report = build_report(events)
    report["settings"] = {"a": "tcp://127.0.0.1:5555", "b": "org/model", "c": "runs/here/x"}
    text = Outline(page_of(report, tmp_path)).text
    for kept in report["settings"].values():
        assert kept in text


def test_without_matplotlib_the_page_says_how_to_get_it_and_keeps_its_tables(events, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # how Python itself marks a module that cannot be imported
    outline = Outline(page_of(build_report(events), tmp_path))
    assert "pip install splitfl[demo]" in outline.text
    assert "svg" not in outline.tags
    assert "yes (2 of 2)" in outline.text


def test_samples_and_the_comparison_are_shown_where_the_caller_has_them(events, tmp_path):
    report = build_report(events)
    plain = Outline(page_of(report, tmp_path)).text
    assert "Generated text" not in plain
    assert "Alone and together" not in plain
    report["samples"] = [{"title": "a note", "prompt": "The", "before": "x x", "after": "patient", "reference": None}]
    one = {"client_id": "clinic-a", "eval_loss_before": 3.0, "eval_loss_after": 2.1, "mean_eval_loss_all": 2.9}
    report["alone"] = {"clients": [one], "mean_own": 2.11, "mean_all": 2.92, "federation_mean": 2.25}
    text = Outline(page_of(report, tmp_path)).text
    assert "PromptTheBefore trainingx xAfter trainingpatient" in text
    assert "Reference" not in text
    assert "a mean loss of 2.110 on its own client's held-out text and 2.920 on the held-out text of all" in text
    assert "clinic-a3.0002.1002.0002.900" in text  # before, alone, together, all clients' text


def test_a_merge_with_different_layers_says_no(events, tmp_path):
    report = build_report([event | {"digest": "ff"} if event["event"] == "loaded" else event for event in events])
    assert "no (0 of 2)" in Outline(page_of(report, tmp_path)).text


def test_more_clients_than_colours_are_told_apart(events, tmp_path):
    more = [
        event | {"client_id": f"c{number}"}
        for event in events
        for number in (range(10) if event.get("client_id") == "clinic-a" else ())
    ]
    page = page_of(build_report([events[0], *more]), tmp_path)
    assert page.count('class="dashed"') == 2
    assert "stroke-dasharray" in page


def test_smoothing_keeps_a_constant_and_calms_a_zigzag():
    assert [loss for _, loss in smooth([(step, 2.0) for step in range(9)])] == pytest.approx([2.0] * 9)
    zigzag = smooth([(step, float(step % 2)) for step in range(40)])
    assert zigzag[0] == (0, 0.0)
    assert all(0.3 < loss < 0.7 for _, loss in zigzag[10:])


def test_the_summary_shows_clients_then_their_mean_then_the_server(events):
    report = build_report(events)
    report["clients"][0]["client_id"] = "[red]a"
    console = Console(width=140, file=io.StringIO())
    console.print(summary_table(report))
    rows = [" ".join(line.split()) for line in console.file.getvalue().splitlines() if re.search(r"\d", line)]
    assert rows == [
        "[red]a 10 3.000 2.000 -1.000 5.0 MB 4.0 MB 600.0 MB 20.5",
        "clinic-b 11 3.500 2.500 -1.000 5.0 MB 4.0 MB 600.0 MB 20.5",
        "mean 3.250 2.250 -1.000",
        "server 8.0 MB 10.0 MB 900.0 MB 33.0",
    ]


def measured(events):
    """Add to each evaluation what clients measure nowadays; clinic-b has three times the tokens."""
    more = {"clinic-a": (100, 0.4), "clinic-b": (300, 0.2)}
    return [
        event
        | {
            "perplexity": 2.0,
            "token_accuracy": more[event["client_id"]][1] + (event["phase"] == "after") / 2,
            "num_eval_tokens": more[event["client_id"]][0],
        }
        if event["event"] == "evaluated"
        else event
        for event in events
    ]


def test_measures_of_all_clients_are_weighted_with_mean_and_worst_beside(events, tmp_path):
    report = build_report(measured(events))
    before, after = report["federated"]
    assert (before["phase"], after["phase"], after["round"], after["num_clients"]) == ("before", "after", 2, 2)
    loss = {"value": (2.0 + 3 * 2.5) / 4, "mean": 2.25, "worst": 2.5, "worst_client": "clinic-b"}
    assert after["measures"]["eval_loss"] == loss
    assert after["measures"]["token_accuracy"]["value"] == pytest.approx((0.9 + 3 * 0.7) / 4)
    assert report["clients"][0]["measures_after"]["token_accuracy"] == 0.9
    text = Outline(page_of(report, tmp_path)).text
    for said in ("Held-out measures", "2.375", "75.0%", "2.500 clinic-b", "40.0% → 90.0%"):
        assert said in text
    console = Console(file=io.StringIO(), width=120)
    console.print(measures_table(report))
    drawn = console.file.getvalue()
    assert re.search(r"token accuracy +25.0% +75.0% +80.0% +70.0% \(clinic-b\)", drawn)


def test_the_report_says_how_comparing_rounds_has_ended_the_run(events, tmp_path):
    assert "best one" not in Outline(page_of(build_report(measured(events)), tmp_path)).text
    ended = events[-1] | {"event": "rounds_ended", "reason": "no <better>", "round": 2, "best_round": 1}
    report = build_report([*measured(events)[:-1], ended, events[-1]])
    assert (report["stopped_early"], report["best_round"]) == ("no <better>", 1)
    text = Outline(page_of(report, tmp_path)).text
    assert "The run was ended early: no <better>. It ended with the layers and the backbone of round 1" in text


def test_where_nothing_was_measured_there_is_no_table(events, tmp_path):
    report = build_report(without(events, "evaluated"))
    assert measures_table(report) is None
    assert "Held-out measures" not in Outline(page_of(report, tmp_path)).text


def test_settings_that_were_changed_between_starts_are_shown(events, tmp_path):
    assert "Settings changed" not in Outline(page_of(build_report(events), tmp_path)).text
    changes = [
        {"name": "federation.step_timeout", "before": 120.0, "now": 30.0},
        {"name": "<b>", "before": None, "now": ["<i>&", "/secret/place/file"]},
    ]
    report = build_report(
        [*events, {"event": "settings_changed", "time": 1_800_000_000.0, "elapsed_s": 0.0, "changes": changes}]
    )
    page = page_of(report, tmp_path)
    text = Outline(page).text
    assert "Settings changed between starts" in text
    assert "2027-01-15 08:00federation.step_timeout120.030.0" in text
    assert "2027-01-15 08:00<b>\u2013<i>&, …/file" in text
    assert "<b>" not in page
    assert "<i>" not in page
    assert "/secret" not in page


def test_a_run_that_ended_early_says_why(events, tmp_path):
    ended = events[-1] | {"complete": False, "reason": "waited 600 s for <b>; see /secret/place"}
    page = page_of(build_report([*events[:-1], ended]), tmp_path)
    said = "This run did not finish. Why: waited 600 s for <b>; see …/place. The numbers below"
    assert said in Outline(page).text
    assert "<b>" not in page
