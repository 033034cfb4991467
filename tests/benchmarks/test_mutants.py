"""Mutants: the list fits the code, and the driver sees what a test notices."""

from pathlib import Path

import pytest

from benchmarks.house import ROOT
from benchmarks.mutants import MUTANTS, Misplaced, Mutant, broken, fate_of

BARREL = """class Barrel:
    def tap(self, litres: int) -> int:
        if litres < 0:
            raise ValueError(litres)
        return litres


def tap(litres: int) -> int:
    if litres < 0:
        raise ValueError(litres)
    return litres
"""
TESTS = """import pytest
from splitfl.barrel import Barrel


@pytest.mark.parametrize("litres", [1, 2])
def test_a_barrel_gives(litres):
    assert Barrel().tap(litres) == litres


def test_no_barrel_takes():
    with pytest.raises(ValueError):
        Barrel().tap(-1)
"""


@pytest.fixture
def inn(tmp_path: Path) -> Path:
    for name, text in {"splitfl/__init__.py": "", "splitfl/barrel.py": BARREL, "tests/test_barrel.py": TESTS}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def mutant(letters: str, instead: str, *, function: str = "Barrel.tap") -> Mutant:
    tests = "tests/test_barrel.py tests/gone.py"
    return Mutant(name="broken", function=function, letters=letters, instead=instead, tests=tests)


@pytest.mark.parametrize("each", MUTANTS, ids=lambda each: each.name)
def test_each_mutant_fits_the_code(each: Mutant) -> None:
    path, text = broken(ROOT, each)
    assert text != path.read_text(encoding="utf-8")
    compile(text, str(path), "exec")


def test_names_are_told_apart() -> None:
    assert len({each.name for each in MUTANTS}) == len(MUTANTS) >= 20


def test_a_method_alone_is_broken(inn: Path) -> None:
    path, text = broken(inn, mutant("litres < 0", "litres < 1"))
    assert path == inn / "splitfl/barrel.py"
    assert text == BARREL.replace("litres < 0", "litres < 1", 1)


@pytest.mark.parametrize(
    ("letters", "function"), [("litres > 0", "Barrel.tap"), ("litres < 0", "Cask.tap"), ("litres", "Barrel.tap")]
)
def test_what_fits_no_more_is_named(inn: Path, letters: str, function: str) -> None:
    with pytest.raises(Misplaced, match=f"broken: 0 functions {function} have '{letters}' once"):
        broken(inn, mutant(letters, "", function=function))


@pytest.mark.parametrize(
    ("letters", "instead", "noticed_by"),
    [
        ("litres < 0", "litres < -1", "tests/test_barrel.py::test_no_barrel_takes"),
        ("return litres", "return 1", "tests/test_barrel.py::test_a_barrel_gives[2]"),
        ("raise ValueError(litres)", "raise ValueError", ""),
    ],
)
def test_what_notices_is_told_and_the_code_is_mended(inn: Path, letters: str, instead: str, noticed_by: str) -> None:
    assert fate_of(inn, mutant(letters, instead)).noticed_by == noticed_by
    assert (inn / "splitfl/barrel.py").read_text(encoding="utf-8") == BARREL
