import itertools
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from splitfl.errors import ConfigError, DataError
from splitfl.telemetry.metrics import MetricsLog, read_events


def test_an_event_is_one_line_of_json_with_both_times(tmp_path):
    ticks = itertools.count(100.0, 0.5)
    with MetricsLog(tmp_path / "run" / "metrics.jsonl", clock=lambda: next(ticks), wall_clock=lambda: 1.8e9) as log:
        first = log.emit("step", client_id="a", loss=1.5)
        second = log.emit("merged", round=1)
    assert first == {"event": "step", "time": 1.8e9, "elapsed_s": 0.5, "client_id": "a", "loss": 1.5}
    assert second["elapsed_s"] == 1.0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [first, second] == read_events(log.path)


def test_numbers_that_are_not_finite_become_null_at_any_depth(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        written = log.emit("evaluated", eval_loss=math.nan, also={"general": math.inf, "other": [-math.inf, 2.0]})
    assert written["eval_loss"] is None
    assert written["also"] == {"general": None, "other": [None, 2.0]}
    assert read_events(log.path) == [written]


def test_paths_and_tuples_are_written_as_json_has_them(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        written = log.emit("run_finished", model_dir=Path("runs") / "model", absent=("a", "b"))
    assert (written["model_dir"], written["absent"]) == (str(Path("runs") / "model"), ["a", "b"])


def test_listeners_hear_an_event_once_it_is_on_disk(tmp_path):
    path, heard = tmp_path / "metrics.jsonl", []
    with MetricsLog(path, listeners=[lambda event: heard.append((event, read_events(path)[-1]))]) as log:
        log.emit("waiting", text="a client")
        log.listen(lambda event: heard.append((event, "second")))
        log.emit("waiting", text="another")
    texts = [event["text"] for event, _ in heard]
    assert texts == ["a client", "another", "another"]
    assert heard[0][0] == heard[0][1]


def test_close_may_be_called_twice_and_nothing_is_written_after(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.close()
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.emit("step")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_process_leaves_every_line_it_emitted(tmp_path):
    program = (
        "import os, pathlib, signal, sys\n"
        "from splitfl.telemetry.metrics import MetricsLog\n"
        "log = MetricsLog(pathlib.Path(sys.argv[1]))\n"
        "for step in range(50):\n"
        "    log.emit('step', step=step, padding='x' * 20_000)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "metrics.jsonl"
    ended = subprocess.run([sys.executable, "-c", program, str(path)], timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert [event["step"] for event in read_events(path)] == list(range(50))


def test_a_torn_last_line_is_left_out_and_the_next_run_writes_after_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "st')
    assert [event["step"] for event in read_events(path)] == [1]
    with MetricsLog(path) as log:
        log.emit("step", step=2)
    assert [event["step"] for event in read_events(path)] == [1, 2]


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "step": 1}')
    assert [event["step"] for event in read_events(path)] == [1]
    with MetricsLog(path) as log:
        log.emit("step", step=2)
    assert [event["step"] for event in read_events(path)] == [1, 2]


@pytest.mark.parametrize("line", ['{"event": "st', "[1, 2]", '{"step": 1}', '{"event": 3}', "\xff"])
def test_a_line_that_is_no_event_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "step"}\n' + line.encode("latin-1") + b'\n{"event": "step"}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: not"):
        read_events(path)


def test_a_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read"):
        read_events(tmp_path / "nowhere.jsonl")


def test_a_folder_that_cannot_be_made_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written: .*; choose a folder"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl")


def test_reading_and_writing_events_loads_nothing_heavy():
    program = (
        "import sys\n"
        "from splitfl.reporting import page, plots, report, view\n"
        "from splitfl.telemetry import memory, metrics, units\n"
        "heavy = {'torch', 'zmq', 'msgpack', 'matplotlib', 'numpy', 'rich', 'psutil', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
