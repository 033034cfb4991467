"""The documentation says what the code does: settings, commands, exit codes, messages, links and examples."""

import argparse
import ast
import configparser
import importlib
import json
import re
import runpy
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished

import splitfl.errors
from splitfl.command_line import main, run_one
from splitfl.commands.purge import Purge
from splitfl.config.page import render
from splitfl.config.trees import ClientConfig, ServerConfig
from splitfl.errors import ConfigError, SplitflError
from splitfl.protocol.messages import KINDS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
COMMANDS = ROOT / "docs" / "commands.md"
FILES = ROOT / "docs" / "files.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def rows(page: Path, first_header: str) -> list[list[str]]:
    """Return the cells of the tables whose first column has this header, without Markdown's code marks."""
    found, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == first_header:
            inside = True
        elif inside and set(cells[0]) != {"-"}:
            found.append(cells)
    return found


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> dict[str, Any]:
    """Return the sub-commands that setup.cfg registers."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = setup["options.entry_points"]["splitfl.commands"].split("\n")
    pairs = [[part.strip() for part in line.split("=")] for line in lines if line]
    return {name: getattr(importlib.import_module(where.split(":")[0]), where.split(":")[1]) for name, where in pairs}


class TestConfigurationPage:
    def test_is_what_the_settings_say(self) -> None:
        page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
        assert page == render(), "settings have changed: run `make docs`"

    def test_has_every_setting_with_a_meaning(self) -> None:
        meanings = {cells[0]: cells[-1] for cells in rows(ROOT / "docs" / "configuration.md", "setting")}
        sections = [field for tree in (ServerConfig, ClientConfig) for field in tree.model_fields.values()]
        settings = {name for section in sections for name in getattr(section.annotation, "model_fields", {})}
        assert meanings.keys() == settings | {"seed"}
        assert all(meaning.endswith(".") and len(meaning) > 15 for meaning in meanings.values())

    @pytest.mark.parametrize(
        "settings",
        [
            {"federation.min_train_clients": "2"},
            {"link.heartbeat_timeout": "3"},
            {"link.slowest_link_bytes_per_second": "1000"},
        ],
        ids=lambda settings: next(iter(settings)),
    )
    def test_the_rules_between_settings_hold(self, settings: Mapping[str, str]) -> None:
        overrides = [f"{name}={value}" for name, value in settings.items()]
        ServerConfig.load(None, ["model.model_name_or_path=model"])
        with pytest.raises(ConfigError):
            ServerConfig.load(None, ["model.model_name_or_path=model", *overrides])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    broken = []
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_readme_leads_to_every_page() -> None:
    text = README.read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"](docs/{page.name}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_named_exist(page: Path, tests: Set[str]) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"\b(?:test_\w+|Test[A-Z]\w+)", text)) <= tests


@pytest.fixture(scope="module")
def tests() -> Set[str]:
    """Return the names of all tests, their classes and their files."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    return {file.stem for file in files} | {
        node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def test_the_python_block_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(README, "python")
    script = tmp_path / "readme.py"
    script.write_text(block, encoding="utf-8")
    runpy.run_path(str(script))
    split_loss, whole_loss = map(float, capsys.readouterr().out.split())
    assert split_loss == whole_loss


class TestTwoTerminals:
    def trees(self) -> tuple[dict[str, Any], dict[str, Any]]:
        server, client = map(tomllib.loads, blocks(README, "toml"))
        return server, client

    def test_the_files_load(self) -> None:
        server, client = self.trees()
        server["model"]["model_name_or_path"] = "model"
        config = ServerConfig.from_tree(server, source="README.md")
        assert config.federation.min_available_clients == 1  # one client is enough for the two terminals
        mine = ClientConfig.from_tree(client, source="README.md")
        assert mine.client.server_address == config.server.address

    def test_they_train(
        self, make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path
    ) -> None:
        server, client = self.trees()
        server["model"]["model_name_or_path"] = str(make_model(max_position_embeddings=128))
        del server["server"]  # the fixture's own address and folder
        (text,) = blocks(README, "json")
        data = tmp_path / client["data"]["path"]
        data.write_text(text, encoding="utf-8")

        finished = federate(server, {client["client"]["client_id"]: {**client["data"], "path": data}})

        assert finished.errors == {}
        report = json.loads((finished.run_dir / "report.json").read_text(encoding="utf-8"))
        assert report["complete"]
        assert report["steps"] == server["federation"]["num_rounds"] * server["federation"]["local_steps"]
        assert [row["num_examples"] for row in report["clients"]] == [3]
        for folder, told in (
            (finished.run_dir, files_told("path in runs/RUN/")),
            (finished.folders[client["client"]["client_id"]], files_told("path in client-runs/RUN/CLIENT/")),
        ):
            there = {path.name + "/" * path.is_dir() for path in folder.iterdir()}
            assert there <= told.keys()
            assert told.keys() - there <= SOMETIMES


# Files that only some runs leave, or none at its end.
SOMETIMES = {
    *("uploads/", "versions/", "partitions/", "history.jsonl", "trained-CLIENT.safetensors", "best-N.safetensors"),
    *("consent.json", "spent.json"),
}


def files_told(header: str) -> dict[str, bool]:
    """Return the names in one table of the page of files, and whether a name has a star."""
    cells = [cells[0] for cells in rows(FILES, header)]
    return {name: cell.endswith("*") for cell in cells for name in cell.removesuffix(" *").split(", ")}


@pytest.mark.parametrize("header", ["path in runs/RUN/", "path in client-runs/RUN/CLIENT/"])
def test_purge_takes_the_files_with_a_star_and_no_others(header: str, tmp_path: Path) -> None:
    told = files_told(header)
    for name in told:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    assert run_one("purge", Purge(), [str(tmp_path), "--yes"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        Path(name).name for name, starred in told.items() if not starred
    }


class TestExitCodes:
    def test_equal_those_of_the_errors(self) -> None:
        told = {(int(cells[0]), cells[1]) for cells in rows(COMMANDS, "code") if cells[1]}
        kinds = [kind for kind in vars(splitfl.errors).values() if isinstance(kind, type)]
        own = [kind for kind in kinds if issubclass(kind, SplitflError) and "exit_code" in vars(kind)]
        assert told == {(kind.exit_code, kind.__name__) for kind in own}

    def test_a_wrong_command_line_ends_with_the_code_of_a_wrong_setting(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["server", "--no-such-option"])
        assert ended.value.code == ConfigError.exit_code
        assert "--config" in capsys.readouterr().err


class TestCommands:
    def lines(self, page: Path) -> Iterator[str]:
        """Yield each command line of splitfl on a page: in consoles and in running text."""
        text = page.read_text(encoding="utf-8")
        for block in blocks(page, "console"):
            yield from re.findall(r"^\$ splitfl (.*?)(?:\s+#.*)?$", block, flags=re.MULTILINE)
        for span in re.findall(r"`splitfl ([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)):
            yield " ".join(span.split())

    def test_the_page_of_commands_has_them_all(self) -> None:
        assert {
            cell.removeprefix("splitfl ") for cells in rows(COMMANDS, "command") for cell in cells[0].split(", ")
        } == set(commands())

    @pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
    def test_every_command_line_is_understood(self, page: Path) -> None:
        for line in self.lines(page):
            name, *arguments = shlex.split(line)
            if arguments and name in commands():
                parser = argparse.ArgumentParser(exit_on_error=False)
                commands()[name]().configure(parser)
                parser.parse_args(arguments)
            assert name in {*commands(), "--help", "COMMAND"}

    def test_the_readme_shows_the_commands_of_a_first_run(self) -> None:
        assert {line.split()[0] for line in self.lines(README)} >= {"server", "client", "check", "keygen", "authorize"}

    def test_make_targets_exist(self) -> None:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE))
        for page in PAGES:
            named = set(re.findall(r"(?:`|\$ )make (\w+)", page.read_text(encoding="utf-8")))
            assert named - {"PYTHON"} <= targets, page

    @pytest.mark.parametrize("module", ["server_backbone", "client_edge"])
    def test_the_roles_run_as_modules(self, module: str) -> None:
        assert f"python -m {module}" in COMMANDS.read_text(encoding="utf-8")
        assert (ROOT / module / "__main__.py").is_file()


class TestProtocolPage:
    def test_kinds_are_those_of_the_code(self) -> None:
        told = {
            int(number): (kind, direction, tuple(filter(None, names.split(", "))))
            for number, kind, direction, names, _ in rows(ROOT / "docs" / "protocol.md", "number")
        }
        directions = {"Client": "client → server", "Server": "server → client"}
        real = {
            number: (
                kind.__name__,
                directions[re.match(r"\w+", kind.__doc__ or "")[0]],  # type: ignore[index]
                tuple(field.name for field in fields(kind)),
            )
            for number, kind in KINDS.items()
        }
        assert told == real

    def test_the_numbers_in_the_text_are_those_of_the_code(self) -> None:
        from splitfl.protocol.codec import MAX_DIMENSIONS, MAX_ELEMENTS, MAX_HEADER_BYTES
        from splitfl.protocol.messages import DTYPE_BYTES, WIRE_VERSION

        page = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
        assert f"Wire version **{WIRE_VERSION}**" in page
        assert f"at most {MAX_HEADER_BYTES // 1024} KiB" in page
        assert MAX_ELEMENTS == 2**40
        assert f"No more than {MAX_DIMENSIONS} dimensions and 2⁴⁰ elements" in page
        assert f"dtypes: {', '.join(f'`{name}`' for name in DTYPE_BYTES)}." in page


class TestArchitecturePage:
    PAGE = ROOT / "docs" / "architecture.md"

    def test_the_house_has_every_room(self) -> None:
        (tree,) = [block for block in blocks(self.PAGE, "") if block.startswith("splitfl/")]
        told = set(re.findall(r"(\w+)/", tree))
        packages = [ROOT / name for name in ("splitfl", "server_backbone", "client_edge", "benchmarks")]
        there = {path.parent.name for package in packages for path in package.rglob("*.py")}
        assert told == there | {"tests"}

    def test_the_deadlines_are_settings_with_these_defaults(self) -> None:
        text = self.PAGE.read_text(encoding="utf-8")
        found = re.findall(r"`(federation|link|client)\.(\w+)` \((\d+) s\)", text)
        assert len(found) >= 6
        for section, name, default in found:
            tree = ClientConfig if section == "client" else ServerConfig
            field = tree.model_fields[section].annotation.model_fields[name]  # type: ignore[union-attr]
            assert field.default == float(default), name
