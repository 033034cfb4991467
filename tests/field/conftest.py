"""Machines, the real model and the parties for the tests of the field: see machines.py and parties.py.

`make field` runs them. Where no machines can be made they are skipped, and with `CI` set they fail.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from field.machines import Network, why_not
from rich.console import Console

from splitfl.config.own import default_cache_dir
from splitfl.demo.model import prepare_model

_TIMEOUT_S = 600.0


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.field)
            item.add_marker(pytest.mark.timeout(_TIMEOUT_S))


@pytest.fixture(scope="session")
def can_make_machines() -> None:
    """Skip, or with `CI` set fail, where no machines can be made."""
    reason = why_not()
    if reason and os.environ.get("CI"):
        pytest.fail(f"the tests of the field cannot run, and CI is set: {reason}")
    if reason:
        pytest.skip(f"the tests of the field cannot run: {reason}")


@pytest.fixture(scope="session")
def models(can_make_machines: None) -> Path:
    """Return the folder with SmolLM2, converted the first time."""
    return prepare_model(default_cache_dir(), Console(stderr=True)).parent


@pytest.fixture(scope="module")
def new_network(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Network]]:
    """Make networks, whose machines go with the module."""
    with ExitStack() as stack:

        def make() -> Network:
            folder = tmp_path_factory.mktemp("field")
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
            return stack.enter_context(Network(folder, path))

        yield make


@pytest.fixture(scope="module")
def network(new_network: Callable[[], Network]) -> Network:
    """Return this module's machines and cables."""
    return new_network()
