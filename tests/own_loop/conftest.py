"""Servers for own-loop clients: see `host.Host`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from own_loop.host import Host, settings, write_model


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """Start a server around a tiny model; sections of settings by name."""
    hosts: list[Host] = []

    def start(*, model: dict[str, Any] | None = None, cut: dict[str, Any] | None = None, **sections: Any) -> Host:
        directory = write_model(tmp_path / "model", **(model or {}))
        hosts.append(Host(tmp_path / f"host-{len(hosts)}", settings(directory, model=cut or {}, **sections)))
        return hosts[-1]

    try:
        yield start
    finally:
        for each in hosts:
            each.stop()
