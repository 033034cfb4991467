"""Towns for the tests of faults: see `town.Town`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.town import Town


@pytest.fixture
def town(tmp_path: Path, make_model: Callable[..., Path]) -> Iterator[Callable[..., Town]]:
    """Start a server and clients; settings as `section__key=value`."""
    towns: list[Town] = []

    def start(clients: int, *, model: dict[str, Any] | None = None, **settings: Any) -> Town:
        special = {key: settings.pop(key) for key in ("own", "crash", "pause", "starts", "ports") if key in settings}
        named = {key.replace("__", "."): value for key, value in settings.items()}
        towns.append(Town(tmp_path, make_model("llama", **(model or {})), clients, named, **special))
        return towns[-1]

    try:
        yield start
    finally:
        for each in towns:
            each.end()
