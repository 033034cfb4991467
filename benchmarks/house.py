"""Counts how the house is built: lengths of files, classes and functions, and the names that cross between rooms.

`python -m benchmarks.house` prints the figures and a table of the rooms; `--longest N` adds the N longest files,
classes and functions, `--crossings` how many names each room imports from each other one, and `--json FILE` writes it
all down. `--root DIR` counts another checkout.

The length of a class or a function goes from its first line to its last, with docstring and comments. A room is what
lies directly in one of the three packages: a package or a module. A crossing is one name that a module imports from
another room, at its top or inside a function. Two modules that import the same name are two crossings.
"""

import argparse
import ast
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("splitfl", "server_backbone", "client_edge")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A file, a class or a function, and how many lines it has."""

    name: str
    room: str
    num_lines: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """A name that a module imports from another room."""

    importer: str
    """The room that imports."""
    owner: str
    """The room that the name is from."""
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class House:
    """Everything that is counted."""

    files: tuple[Part, ...]
    classes: tuple[Part, ...]
    functions: tuple[Part, ...]
    crossings: tuple[Crossing, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A house in a few numbers."""

    num_files: int
    num_lines: int
    longest_file: Part
    longest_class: Part
    longest_function: Part
    median_function_lines: float
    ninetieth_function_lines: int
    """Nine functions in ten have at most that many lines."""
    num_crossings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """One row of the table."""

    name: str
    num_files: int
    num_lines: int
    longest_file_lines: int
    num_taken: int
    """Names that it imports from other rooms."""
    num_given: int
    """Names that other rooms import from it."""


def survey(root: Path, packages: Sequence[str] = PACKAGES) -> House:
    """Read every module of these packages below `root`."""
    files: list[Part] = []
    classes: list[Part] = []
    functions: list[Part] = []
    crossings: list[Crossing] = []
    for path in sorted(path for package in packages for path in (root / package).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        package = ".".join(path.relative_to(root).parent.parts)
        module = package if path.stem == "__init__" else f"{package}.{path.stem}"
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        files.append(Part(name=name, room=room_of(module), num_lines=len(source.splitlines())))
        classes += _parts(tree, module, ast.ClassDef)
        functions += _parts(tree, module, ast.FunctionDef)
        crossings += _crossings(tree, module, package, packages)
    return House(files=tuple(files), classes=tuple(classes), functions=tuple(functions), crossings=tuple(crossings))


def room_of(module: str) -> str:
    """Return the room of a module or of a name in it; what stands in `__init__.py` of a package is a room as well."""
    return ".".join(module.split(".")[:2])


def _parts(tree: ast.Module, module: str, kind: type[ast.ClassDef | ast.FunctionDef]) -> Iterator[Part]:
    for name, node in _named(tree, module):
        if isinstance(node, kind):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Part(name=name, room=room_of(module), num_lines=num_lines)


def _named(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield classes and functions with their dotted names, the inner ones too."""
    for child in ast.iter_child_nodes(node):
        inner = name
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            inner = f"{name}.{child.name}"
            yield inner, child
        yield from _named(child, inner)


def _crossings(tree: ast.Module, module: str, package: str, packages: Sequence[str]) -> Iterator[Crossing]:
    for imported in _imported(tree, package):
        ours = imported.split(".")[0] in packages
        if ours and room_of(imported) != room_of(module):
            yield Crossing(importer=room_of(module), owner=room_of(imported), name=imported)


def _imported(tree: ast.Module, package: str) -> Iterator[str]:
    """Yield the full name of everything that a module imports."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                parents = package.split(".")[: package.count(".") + 2 - level] if level else []
                yield from (".".join([*parents, *([source] if source else []), alias.name]) for alias in names)


def figures_of(house: House) -> Figures:
    """Return the numbers that docs/architecture.md speaks of."""
    lengths = sorted(function.num_lines for function in house.functions)
    return Figures(
        num_files=len(house.files),
        num_lines=sum(file.num_lines for file in house.files),
        longest_file=_longest(house.files, 1)[0],
        longest_class=_longest(house.classes, 1)[0],
        longest_function=_longest(house.functions, 1)[0],
        median_function_lines=statistics.median(lengths),
        ninetieth_function_lines=lengths[-(-9 * len(lengths) // 10) - 1],
        num_crossings=len(house.crossings),
    )


def _longest(parts: Sequence[Part], num: int) -> list[Part]:
    return sorted(parts, key=lambda part: (-part.num_lines, part.name))[:num]


def rooms_of(house: House) -> list[Room]:
    """Return the rooms by name."""
    taken = Counter(crossing.importer for crossing in house.crossings)
    given = Counter(crossing.owner for crossing in house.crossings)
    return [
        Room(
            name=name,
            num_files=len(lengths),
            num_lines=sum(lengths),
            longest_file_lines=max(lengths),
            num_taken=taken[name],
            num_given=given[name],
        )
        for name in sorted({file.room for file in house.files})
        if (lengths := [file.num_lines for file in house.files if file.room == name])
    ]


def _print_figures(figures: Figures) -> None:
    print(f"{figures.num_files} files, {figures.num_lines:,} lines")
    for word in ("file", "class", "function"):
        longest: Part = getattr(figures, f"longest_{word}")
        print(f"longest {word}: {longest.num_lines} lines, {longest.name}")
    print(f"a function: {figures.median_function_lines:g} lines at the median,", end=" ")
    print(f"{figures.ninetieth_function_lines} at the 90th percentile")
    print(f"names that cross between rooms: {figures.num_crossings:,}")


def _print_rooms(rooms: Sequence[Room]) -> None:
    width = max(len(room.name) for room in rooms)
    print(f"\n{'room':<{width}}  files   lines  longest file  takes  gives")
    for room in rooms:
        print(f"{room.name:<{width}}  {room.num_files:5}  {room.num_lines:6,}", end="")
        print(f"  {room.longest_file_lines:12}  {room.num_taken:5}  {room.num_given:5}")


def _print_longest(house: House, num: int) -> None:
    for words, parts in (("files", house.files), ("classes", house.classes), ("functions", house.functions)):
        print(f"\nlongest {words}")
        for part in _longest(parts, num):
            print(f"{part.num_lines:6}  {part.name}")


def _print_crossings(house: House) -> None:
    pairs = Counter((crossing.importer, crossing.owner) for crossing in house.crossings)
    print("\nnames  imported by  from")
    for (importer, owner), count in sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0])):
        print(f"{count:5}  {importer}  {owner}")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=0, metavar="N", help="also the N longest of each kind")
    parser.add_argument("--crossings", action="store_true", help="also who imports how many names from whom")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, rooms and crossings there")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="count this checkout instead")
    arguments = parser.parse_args(argv)
    house = survey(arguments.root)
    figures, rooms = figures_of(house), rooms_of(house)
    _print_figures(figures)
    _print_rooms(rooms)
    if arguments.longest:
        _print_longest(house, arguments.longest)
    if arguments.crossings:
        _print_crossings(house)
    if arguments.json:
        found = {"figures": asdict(figures), "rooms": [asdict(room) for room in rooms]}
        found["crossings"] = [asdict(crossing) for crossing in house.crossings]
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
