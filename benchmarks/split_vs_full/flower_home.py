"""Flower in a virtual environment of its own: it needs older releases of packages that splitfl is tested with.

The environment also sees the packages of the Python that runs this, torch, transformers and peft among them; where both
have a package, Flower's processes get Flower's.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from splitfl.config.own import default_cache_dir
from splitfl.errors import DataError

REQUIREMENTS = Path(__file__).with_name("flower-requirements.txt")


def flower_home() -> Path:
    """Return the environment's folder of programs, made the first time (about half a minute, 300 MB)."""
    if named := os.environ.get("SPLITFL_FLOWER_VENV"):
        return Path(named) / "bin"
    home = default_cache_dir() / "benchmarks" / f"flower-{_version()}-py{sys.version_info[0]}{sys.version_info[1]}"
    done = home / "installed"
    if not done.exists():
        _run([sys.executable, "-m", "venv", "--clear", str(home)])
        _run([str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--requirement", str(REQUIREMENTS)])
        done.touch()
    _see_ours(home)
    return home / "bin"


def flower_version() -> str:
    """Return which release of Flower is compared."""
    return _version()


def _see_ours(home: Path) -> None:
    """Let the environment see the packages of this one, after its own."""
    (site,) = home.glob("lib/python*/site-packages")
    (site / "splitfl-benchmark.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")


def _version() -> str:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("flwr=="))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataError(f"Flower could not be installed: {words}; needed are {REQUIREMENTS} and a package index")
