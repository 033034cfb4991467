import io
import json
import re

import pytest
from rich.console import Console

from splitfl.reporting.display import Display, log_line
from splitfl.reporting.view import RunView
from splitfl.telemetry.units import counted, format_bytes, format_change, format_loss, format_seconds, format_weight


def shown(events, *, terminal=False, width=110):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, height=60, _environ={"TERM": "xterm"})
    with Display(console, clock=lambda: 0.0) as display:
        for event in events:
            display(event)
    return console.file.getvalue()


def last_panel(events):
    """The panel as it stands at the end, without colours; rich draws it once more on stopping."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(events, terminal=True))
    return text[text.rindex("╭") :]


def up_to(events, name, *, count=1):
    """The events to the count-th of that name, it included."""
    found = [at for at, event in enumerate(events) if event["event"] == name]
    return events[: found[count - 1] + 1]


def test_without_a_terminal_each_event_is_one_plain_line(events):
    text = shown(events)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "     0.0 s  run       run-1: tiny, shared, 2 rounds of 2 steps, cpu"
    assert lines[1] == "     1.0 s  joined    clinic-a"
    assert lines[3] == "     3.0 s  evaluated clinic-a  before training: held-out loss 3.000 on 4 examples"
    assert lines[5] == "     5.0 s  round     1/2: steps 1-2 of clinic-a, clinic-b"
    said = "6.0 s step clinic-a step 1 loss 2.750 150 tokens/s sent 1.0 MB received 900.0 kB"
    assert " ".join(lines[6].split()) == said
    assert "    10.0 s  merged    round 1: clinic-a (10), clinic-b (11); 8 tensors, digest ab12ab12ab12" in lines
    assert lines[-1].endswith("end       complete after 33.0 s; model in runs/run-1/model")
    assert not any(" loaded " in line for line in lines)


def test_one_of_a_kind_is_no_plural(events):
    opened = next(event for event in events if event["event"] == "round_opened")
    run = events[0] | {"num_rounds": 1, "local_steps": 1}
    evaluated = events[3] | {"num_eval_examples": 1}
    text = shown([run, evaluated, opened | {"num_steps": 1}])
    assert "tiny, shared, 1 round of 1 step, cpu" in text
    assert "held-out loss 3.000 on 1 example\n" in text
    assert "1/1: step 1 of clinic-a, clinic-b" in text


def test_a_slow_client_is_not_shown_as_one_that_stands_still(events):
    step = next(event for event in events if event["event"] == "step")
    slow = step | {"elapsed_s": 5.0 + 600.0, "num_label_tokens": 0}
    assert "0.2 tokens/s" in shown([*up_to(events, "round_opened"), slow])


def test_a_line_is_never_wrapped(events):
    assert shown(events, width=30) == shown(events, width=300)


@pytest.mark.parametrize(("width", "has_traffic"), [(50, False), (79, False), (80, True)])
def test_a_narrow_panel_keeps_the_clients_names(events, width, has_traffic):
    told = json.loads(json.dumps(up_to(events, "step", count=4)).replace("clinic", "a-long-name-of-a-clinic"))
    rows = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(told, terminal=True, width=width)).splitlines()
    row = next(row for row in rows[-8:] if re.search(r"a-long\S+ +waiting", row))
    assert re.search(r" 1 +2 +2\.500 ", row)
    assert ("2.0 MB" in row) == has_traffic


def test_step_lines_come_at_most_every_two_seconds(events):
    step = next(event for event in events if event["event"] == "step")
    steps = [step | {"elapsed_s": 6.0 + number / 2} for number in range(9)]  # 6.0 to 10.0
    text = shown([*up_to(events, "round_opened"), *steps])
    assert re.findall(r"([\d.]+) s  step ", text) == ["6.0", "8.0", "10.0"]


def test_a_wait_is_said_once_until_something_else_happens(events):
    wait = {"event": "waiting", "time": 0.0, "elapsed_s": 1.0, "text": "2 more clients of 2"}
    text = shown([events[0], wait, wait, events[1], wait])
    assert text.count("waiting   2 more clients of 2") == 2


def test_a_client_that_is_done_does_not_also_leave(events):
    assert " left " not in shown(events)
    gone = {"event": "client_left", "time": 0.0, "elapsed_s": 9.0, "client_id": "clinic-b", "reason": "silent for 10 s"}
    assert "left      clinic-b: silent for 10 s" in shown([*up_to(events, "client_joined", count=2), gone])


def test_a_merge_that_was_not_made_says_why(events):
    merged = next(event for event in events if event["event"] == "merged")
    merged = merged | {"accepted": False, "reason": "1 of 2 clients", "clients": {}, "absent": ["clinic-b"]}
    line = log_line(merged, RunView())
    assert line.endswith("merged    round 1 not merged: 1 of 2 clients; absent: clinic-b")


@pytest.mark.parametrize("name", ["[red]", "[/bold]", ":smile:", "[link=x]y"])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_name_that_looks_like_markup_is_shown_as_it_is(events, name, terminal):
    renamed = [event | {"client_id": name} if "client_id" in event else event for event in events]
    for event in renamed:
        if event["event"] == "round_opened":
            event["trainers"] = [name]
    assert name in shown(up_to(renamed, "step", count=2), terminal=terminal)


def test_control_characters_of_a_peer_do_not_reach_the_terminal(events):
    evil = {
        "event": "client_left",
        "time": 0.0,
        "elapsed_s": 9.0,
        "client_id": "clinic-b",
        "reason": "\x1b[2Jbye\nfake",
    }
    text = shown([*up_to(events, "client_joined", count=2), evil])
    assert text.splitlines()[-1].endswith("left      clinic-b: ?[2Jbye?fake")


def test_the_panel_tells_where_the_run_is(events):
    panel = last_panel(up_to(events, "step", count=3))
    assert re.search(r"run-1 +· +tiny +· +shared +· +round 1/2 +· +step 2/2 +· +8.0 s", panel)
    row_a = re.search(r"clinic-a +(\w+) +(\d) +(\d) +([\d.]+) +(\d+) +([\d.]+ MB) +([\d.]+ MB)", panel)
    assert row_a
    assert row_a.groups() == ("waiting", "1", "2", "2.500", "100", "2.0 MB", "1.8 MB")
    assert re.search(r"clinic-b +training +1 +1 ", panel)


def test_the_panel_says_what_is_waited_for_until_it_comes(events):
    wait = {"event": "waiting", "time": 0.0, "elapsed_s": 9.5, "text": "the layers of clinic-b"}
    so_far = [*up_to(events, "step", count=4), wait]
    assert "waiting: the layers of clinic-b" in last_panel(so_far)
    assert "waiting: the layers" not in last_panel([*so_far, *events[len(so_far) - 1 : len(so_far)]])


def test_the_panel_ends_with_every_client_done(events):
    panel = last_panel(events)
    assert re.search(r"clinic-a +done +2 +4 +2.000", panel)
    assert re.search(r"clinic-b +done", panel)
    assert "complete after 33.0 s" in panel


def test_the_bar_grows_with_every_step_to_the_whole(events):
    view, fractions = RunView(), []
    for event in events:
        view = view.after(event)
        fractions.append(view.fraction)
    steps = [fraction for event, fraction in zip(events, fractions, strict=True) if event["event"] == "step"]
    assert steps == [number / 8 for number in range(1, 9)]
    assert fractions == sorted(fractions)


def test_the_bar_says_how_much_is_done_and_how_long_the_rest_takes(events):
    now_s = [0.0]
    console = Console(file=io.StringIO(), force_terminal=True, width=110, height=60, _environ={"TERM": "xterm"})
    with Display(console, clock=lambda: now_s[0]) as display:
        for event in up_to(events, "merged"):
            now_s[0] = 30.0 * event["elapsed_s"]  # four steps, half of the run, 30 s apart
            display(event)
    panel = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert re.search(r"━+ +50% +0:02:00 left", panel[panel.rindex("╭") :])


def test_a_run_that_goes_on_is_not_taken_for_a_fast_one(events):
    at = next(number for number, event in enumerate(events) if event.get("round") == 2)
    resumed = [events[0], *events[at:]]
    assert re.search(r"━+ +62% +-:--:-- left", last_panel(up_to(resumed, "step", count=1)))  # rich leaves the jump out


def test_the_elapsed_time_goes_on_between_events(events):
    now_s = [50.0]
    console = Console(file=io.StringIO(), force_terminal=True, width=110, height=60, _environ={"TERM": "xterm"})
    with Display(console, clock=lambda: now_s[0]) as display:
        display(events[0])
        now_s[0] += 61.0
    assert "1 min 01 s" in console.file.getvalue()


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (format_bytes(None), "-"),
        (format_bytes(0), "0 B"),
        (format_bytes(999), "999 B"),
        (format_bytes(1000), "1.0 kB"),
        (format_bytes(999_960), "1.0 MB"),
        (format_bytes(2_500_000_000), "2.5 GB"),
        (format_bytes(7e15), "7000.0 TB"),
        (format_seconds(None), "-"),
        (format_seconds(9.44), "9.4 s"),
        (format_seconds(59.96), "1 min 00 s"),
        (format_seconds(185), "3 min 05 s"),
        (format_seconds(7500), "2 h 05 min"),
        (format_loss(None), "-"),
        (format_loss(2.34567), "2.346"),
        (format_change(3.0, 2.5), "-0.500"),
        (format_change(3.0, None), "-"),
        (counted(0, "round"), "0 rounds"),
        (counted(1, "round"), "1 round"),
        (counted(2, "round"), "2 rounds"),
        (counted(2, "batch", "batches"), "2 batches"),
        (format_weight(12345), "12,345"),
        (format_weight(0.25), "0.250"),
    ],
)
def test_units_are_written_as_people_read_them(written, expected):
    assert written == expected
