import os
import subprocess
import sys

import pytest

from splitfl.telemetry.memory import peak_rss_bytes, pss_bytes, rss_bytes

MB = 1_000_000
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_the_peak_stays_when_the_memory_is_given_back():
    before = rss_bytes()
    block = b"\1" * (150 * MB)
    held = rss_bytes()
    assert held - before > 100 * MB
    del block
    assert rss_bytes() < held - 100 * MB
    assert peak_rss_bytes() > held - 5 * MB  # the kernel counts in batches


@on_linux
def test_a_small_child_of_a_large_parent_reports_its_own_peak():
    block = b"\1" * (200 * MB)
    program = "from splitfl.telemetry.memory import peak_rss_bytes; print(peak_rss_bytes())"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert len(block) > 150 * MB > int(child.stdout) > MB


def test_shared_pages_are_not_counted_twice():
    assert MB < pss_bytes(os.getpid()) <= rss_bytes() + 10 * MB


def test_a_process_that_is_gone_holds_nothing():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert pss_bytes(child.pid) > 0
    child.communicate(b"\n", timeout=60)
    assert pss_bytes(child.pid) == 0


@on_linux
def test_a_zombie_holds_nothing():
    child = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.DEVNULL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has reaped it
    assert pss_bytes(child.pid) == 0
    child.wait(timeout=60)
