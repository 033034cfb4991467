"""What no linter checks: every setting is explained, the public names are public, and light modules stay light."""

import ast
import configparser
import functools
import importlib
import inspect
import json
import pkgutil
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import splitfl
from splitfl import config
from splitfl.config.section import Section

ROOT = Path(splitfl.__file__).parent.parent
HEAVY = {"torch", "transformers", "zmq", "peft", "accelerate", "safetensors"}
# Seconds of CPU time that `--help` may take; the best of three, since other work on the machine slows it down.
HELP_SECONDS = 0.3
# What may be installed beside splitfl and some library would load if it were asked to; and the other side.
UNUSED = {
    "matplotlib",
    "sklearn",
    "scipy",
    "pandas",
    "pyarrow",
    "datasets",
    "trl",
    "gguf",
    "torchvision",
    "tensorboard",
}
# CPU time of a role's imports over that of torch's and the transformers modules that any model needs.
IMPORT_RATIO = 1.5
IMPORT_MIB = 80


def sections() -> list[type[Section]]:
    found = {value for module in modules() for value in vars(module).values() if isinstance(value, type)}
    return sorted({each for each in found if issubclass(each, Section)} - {Section}, key=lambda each: each.__name__)


def modules() -> list[ModuleType]:
    """Return the rooms of the settings."""
    return [importlib.import_module(f"splitfl.config.{each.name}") for each in pkgutil.iter_modules(config.__path__)]


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
class TestSettings:
    def test_the_section_has_a_sentence(self, section: type[Section]) -> None:
        assert section.__doc__ != Section.__doc__
        assert is_sentence(inspect.cleandoc(section.__doc__ or ""))

    def test_every_field_has_a_default_and_a_sentence(self, section: type[Section]) -> None:
        for name, field in section.model_fields.items():
            assert not field.is_required(), name
            if not isinstance(field.default, Section):
                assert is_sentence(field.description or ""), name


def is_sentence(text: str) -> bool:
    return len(text.split()) > 1 and (text[0].isupper() or text[0] == "`") and text.endswith(".")


class TestPublicNames:
    def test_all_are_what_the_module_offers(self) -> None:
        tree = ast.parse((ROOT / "splitfl" / "__init__.py").read_text(encoding="utf-8"))
        offered = set()
        for node in tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)]) if name != "__all__":
                    offered.add(name)
                case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                    offered |= {alias.name for line in node.body for alias in getattr(line, "names", [])}
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) if not name.startswith("_"):
                    offered.add(name)
        assert set(splitfl.__all__) == offered
        assert list(splitfl.__all__) == sorted(splitfl.__all__)

    def test_all_can_be_had(self) -> None:
        for name in splitfl.__all__:
            assert not isinstance(getattr(splitfl, name), ModuleType)

    def test_nothing_else_can(self) -> None:
        with pytest.raises(AttributeError, match="module 'splitfl' has no attribute 'merge'"):
            splitfl.merge  # noqa: B018


def entry_points() -> list[str]:
    """Return the modules that the command loads to print its help, from the packaging itself."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [line for group in parser["options.entry_points"].values() for line in group.split("\n") if line]
    return [line.partition("=")[2].strip().partition(":")[0] for line in lines]


LIGHT = [
    "splitfl",
    "splitfl.config.trees",
    "splitfl.config.page",
    "splitfl.errors",
    "splitfl.session.client_session",
    "splitfl.session.server_session",
    "splitfl.session.terms",
    "splitfl.protocol.messages",
    "splitfl.protocol.codec",
    "server_backbone.deciding.gates",
    "server_backbone.deciding.rounds",
    *entry_points(),
]


class TestImports:
    def test_light_modules_bring_nothing_heavy(self) -> None:
        assert len(entry_points()) > 2
        code = (
            "import importlib, sys\n"
            f"for name in {LIGHT}:\n"
            "    importlib.import_module(name)\n"
            f"    brought = {HEAVY} & set(sys.modules)\n"
            "    assert not brought, (name, brought)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_help_is_quick(self) -> None:
        seconds = min(cpu_seconds_of([sys.executable, "-m", "splitfl", "--help"]) for _ in range(3))
        assert seconds < HELP_SECONDS, f"{seconds:.2f} s"

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("module", "other"), [("client_edge.part.run", "server_backbone"), ("server_backbone.host", "client_edge")]
    )
    def test_a_role_imports_little_beside_torch_and_transformers(self, module: str, other: str) -> None:
        needed = "import torch; from transformers import AutoTokenizer, PreTrainedModel"
        least_s, least_bytes, _ = imports_of(needed)
        seconds, num_bytes, names = imports_of(f"{needed}; import {module}")
        assert not names & (UNUSED | {other})
        assert seconds < IMPORT_RATIO * least_s, (seconds, least_s)
        assert num_bytes - least_bytes < IMPORT_MIB << 20, (num_bytes, least_bytes)

    def test_help_brings_nothing_heavy(self) -> None:
        code = (
            "import sys\n"
            "from splitfl.command_line import main\n"
            "try:\n"
            "    main(['--help'])\n"
            "except SystemExit as ended:\n"
            "    assert ended.code == 0\n"
            f"print(sorted({HEAVY} & set(sys.modules)))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"
        for command in ("server", "client"):
            assert f"\n    {command} " in done.stdout

    def test_the_layers_hold(self) -> None:
        command = [
            str(Path(sys.executable).with_name("lint-imports")),
            "--config",
            str(ROOT / "setup.cfg"),
            "--no-cache",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "11 kept, 0 broken" in done.stdout


@functools.cache
def imports_of(code: str) -> tuple[float, int, set[str]]:
    """Return CPU seconds, bytes of RSS, and the packages that are loaded after `code`."""
    report = (
        "import json, sys, time\n"
        "from splitfl.telemetry.memory import rss_bytes\n"
        "packages = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "print(json.dumps([time.process_time(), rss_bytes(), packages]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, num_bytes, packages = json.loads(done.stdout)
    return seconds, num_bytes, set(packages)


def cpu_seconds_of(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_nobody_hides_in_a_drawer() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc"}
    found = [
        path for package in ("splitfl", "server_backbone", "client_edge") for path in (ROOT / package).rglob("*.py")
    ]
    assert found
    assert [path for path in found if drawers & {*path.parts, path.stem}] == []
