"""Signals are noted, acted on at safe points, and a second one ends the process whatever it is doing."""

import signal
import subprocess
import sys
import time
from typing import Self

import pytest

from splitfl.stopping import ENDED_AT_ONCE, Stopped, StopRequest, Terminated

SOON_S = 10.0
_BEGINNING = """
import hashlib, sys, time
from splitfl.stopping import StopRequest, Stopped, Terminated, on_signals
stop = StopRequest()
def say(text):
    sys.stdout.write(text + "\\n")
    sys.stdout.flush()
def compute(seconds):  # in C, without the lock of the interpreter: no handler in Python runs meanwhile
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 5_000_000)
with on_signals(stop, "here"):
"""


class Script:
    """A process of its own that is sent signals."""

    def __init__(self, text: str) -> None:
        indented = "".join(f"    {line}\n" for line in text.strip().splitlines())
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BEGINNING + indented], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def reads(self, text: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == text

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        said = self.process.communicate(timeout=60)[1]
        return self.process.returncode, said


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_signal_ends_a_process_that_computes(numbers: tuple[int, int]) -> None:
    with Script('say("begun")\ncompute(60)') as script:
        script.reads("begun")
        script.signal(numbers[0])
        time.sleep(1.0)
        assert script.process.poll() is None
        begun = time.monotonic()
        script.signal(numbers[1])
        code, said = script.end()
    assert (code, time.monotonic() - begun < SOON_S) == (ENDED_AT_ONCE, True)
    assert "here: stopping where nothing is half done; another signal ends it at once" in said
    assert "here: ended at once by a second signal" in said


def test_the_first_is_noted_while_it_computes_and_acted_on_at_the_next_safe_point() -> None:
    text = """
say("begun")
compute(1.5)
say("whole")
try:
    stop.check()
except Stopped as stopped:
    say(str(isinstance(stopped, Terminated)))
"""
    with Script(text) as script:
        script.reads("begun")
        script.signal(signal.SIGTERM)
        script.reads("whole")
        script.reads("True")
        assert script.end()[0] == 0


_SWALLOWS = """
class Deaf:
    def __del__(self):
        say("deaf")
        until = time.monotonic() + 20
        while time.monotonic() < until:
            time.sleep(0.01)
stop.raises = True
deaf = Deaf()
del deaf
say("on")
stop.raises = False
"""


def test_an_exception_that_is_swallowed_leaves_no_process_deaf_to_the_first() -> None:
    """The handler's exception comes in a `__del__`; the signal is noted all the same."""
    with Script(_SWALLOWS + 'try:\n    stop.sleep(10)\nexcept Stopped:\n    say("heard")') as script:
        script.reads("deaf")
        script.signal(signal.SIGINT)
        script.reads("on")
        script.reads("heard")
        assert script.end()[0] == 0


def test_an_exception_that_is_swallowed_leaves_no_process_deaf_to_the_second() -> None:
    with Script(_SWALLOWS + "compute(60)") as script:
        script.reads("deaf")
        script.signal(signal.SIGINT)
        script.reads("on")
        time.sleep(1.0)
        script.signal(signal.SIGTERM)
        assert script.end()[0] == ENDED_AT_ONCE


def test_before_anything_can_be_half_done_the_first_is_raised_at_once() -> None:
    text = 'stop.raises = True\ntry:\n    say("begun")\n    time.sleep(60)\nexcept Terminated:\n    say("raised")'
    with Script(text) as script:
        script.reads("begun")
        script.signal(signal.SIGTERM)
        script.reads("raised")
        assert script.end()[0] == 0


def test_the_same_signal_sent_twice_at_once_counts_once() -> None:
    """As `timeout` sends it: to the process and to its group."""
    text = 'say("begun")\ntry:\n    stop.sleep(60)\nexcept Stopped:\n    say("stopped")\n    time.sleep(0.5)'
    with Script(text) as script:
        script.reads("begun")
        script.signal(signal.SIGTERM)
        script.signal(signal.SIGTERM)
        script.reads("stopped")
        assert script.end()[0] == 0


def test_a_sleep_ends_soon_after_the_request() -> None:
    stop = StopRequest()
    stop.sleep(0.01)
    stop.ask(signal.SIGTERM)
    begun = time.monotonic()
    with pytest.raises(Terminated):
        stop.sleep(5)
    assert time.monotonic() - begun < 0.5
    with pytest.raises(Stopped):
        stop.check()
