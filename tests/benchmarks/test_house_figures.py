"""The figures of the house are counted from the code; what they may not pass."""

import json
from pathlib import Path

import pytest

from benchmarks.house import PACKAGES, ROOT, Crossing, figures_of, main, rooms_of, survey

# A house of three rooms: `inn.door`, `inn.cellar`, and what lies in `inn` itself.
HOUSE = {
    "inn/__init__.py": "from inn.door.bell import ring\n",
    "inn/cellar.py": "import json\n\n\nclass Barrel:\n    def tap(self) -> None:\n        pass\n",
    "inn/door/__init__.py": "",
    "inn/door/bell.py": (
        "from inn import cellar\n"
        "from inn.cellar import Barrel\n"
        "from . import latch\n"
        "\n"
        "\n"
        "def ring() -> None:\n"
        "    def inner() -> None:\n"
        "        from ..cellar import Barrel\n"
        "\n"
        "    inner()\n"
    ),
    "inn/door/latch.py": "def lift() -> None: ...\n",
}


@pytest.fixture
def inn(tmp_path: Path) -> Path:
    for name, text in HOUSE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_lengths_go_from_the_first_line_to_the_last(inn: Path) -> None:
    house = survey(inn, ["inn"])
    assert {part.name: part.num_lines for part in house.classes} == {"inn.cellar.Barrel": 3}
    assert {part.name: part.num_lines for part in house.functions} == {
        "inn.cellar.Barrel.tap": 2,
        "inn.door.bell.ring": 5,
        "inn.door.bell.ring.inner": 2,
        "inn.door.latch.lift": 1,
    }
    figures = figures_of(house)
    assert (figures.num_files, figures.num_lines) == (5, 18)
    assert figures.longest_file.name == "inn/door/bell.py"
    assert (figures.median_function_lines, figures.ninetieth_function_lines) == (2.0, 5)


def test_a_name_crosses_where_its_room_is_another(inn: Path) -> None:
    crossings = survey(inn, ["inn"]).crossings
    assert sorted((crossing.importer, crossing.name) for crossing in crossings) == [
        ("inn", "inn.door.bell.ring"),
        ("inn.door", "inn.cellar"),
        ("inn.door", "inn.cellar.Barrel"),
        ("inn.door", "inn.cellar.Barrel"),
    ]
    assert Crossing(importer="inn", owner="inn.door", name="inn.door.bell.ring") in crossings


def test_a_room_takes_and_gives(inn: Path) -> None:
    rooms = {room.name: (room.num_files, room.num_taken, room.num_given) for room in rooms_of(survey(inn, ["inn"]))}
    assert rooms == {"inn": (1, 1, 0), "inn.cellar": (1, 0, 3), "inn.door": (3, 3, 1)}


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "figures.json"
    main(["--longest", "2", "--crossings", "--json", str(written)])
    said = capsys.readouterr().out
    figures = json.loads(written.read_text(encoding="utf-8"))["figures"]
    assert f"longest class: {figures['longest_class']['num_lines']} lines, " in said
    assert "\nlongest functions\n" in said
    assert "server_backbone.desks  splitfl.protocol" in said


def test_every_module_is_counted() -> None:
    names = {file.name for file in survey(ROOT).files}
    assert {name.split("/")[0] for name in names} == set(PACKAGES)
    assert "splitfl/protocol/messages.py" in names


# Longer than that is looked at again: it has more than one thing to do. A session is the whole table of what is legal
# when, for one side.
MOST_LINES = {"file": 640, "class": 300, "function": 80}
SESSIONS = {
    "splitfl.session.server_session.ServerSession": 440,
    "splitfl.session.client_session.ClientSession": 340,
}
MEDIAN_FUNCTION, NINETIETH_FUNCTION = 6, 17


def test_nothing_is_longer_than_it_may_be() -> None:
    house = survey(ROOT)
    kinds = {"file": house.files, "class": house.classes, "function": house.functions}
    assert {
        part.name: part.num_lines
        for kind, parts in kinds.items()
        for part in parts
        if part.num_lines > SESSIONS.get(part.name, MOST_LINES[kind])
    } == {}
    figures = figures_of(house)
    assert figures.median_function_lines <= MEDIAN_FUNCTION
    assert figures.ninetieth_function_lines <= NINETIETH_FUNCTION
