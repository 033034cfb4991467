"""One step's way through the code, as docs/architecture.md tells it and as a run takes it."""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from conftest import Finished, write_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"

Stop = tuple[str, str]


def told() -> list[Stop]:
    """Return the page's stops: a file and a function of it, in order."""
    rows = re.findall(
        r"^\| (?:client|server) \| `([^`]+/[^`]+)` \| ([^|]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    stops = [(path, name) for path, names in rows for name in re.findall(r"`([^`]+)`", names)]
    assert len(stops) > 30
    return stops


class Walk:
    """Notes how far a run has come along the stops; what it does besides is not looked at."""

    def __init__(self, stops: list[Stop]) -> None:
        self._stops = stops
        self._passed = 0

    def look(self, frame: FrameType, event: str, _: Any) -> None:
        """Take note of a call; threads of both roles come by here."""
        if event == "call" and self._passed < len(self._stops):
            path, name = self._stops[self._passed]
            code = frame.f_code
            if code.co_qualname == name and code.co_filename == str(ROOT / path):
                self._passed += 1

    def next_stop(self) -> Stop | None:
        """Return the first stop that was not passed."""
        return self._stops[self._passed] if self._passed < len(self._stops) else None


@pytest.fixture
def walk() -> Any:
    walk = Walk(told())
    threading.setprofile(walk.look)
    yield walk
    threading.setprofile(None)


def test_a_step_passes_all_stops_in_the_order_of_the_page(
    walk: Walk, make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path
) -> None:
    # several steps: the last stops are on both sides at once, and a later step passes them in the page's order as well
    text = write_text(tmp_path / "a.txt", num_lines=12, seed=1)
    finished = federate(
        {
            "model": {"model_name_or_path": str(make_model("llama"))},
            "federation": {
                "num_rounds": 1,
                "local_steps": 8,
                "per_device_train_batch_size": 2,
                "min_available_clients": 1,
            },
            "server": {"export_model": False},
        },
        {"clinic": {"path": text}},
    )
    assert finished.errors == {}
    assert walk.next_stop() is None
