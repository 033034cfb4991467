"""A server in a thread of this process, for clients that generate with its model over TCP."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conftest import free_port
from served import ServedRun

from splitfl.config.trees import ClientConfig, ServerConfig


class Host(ServedRun):
    """One server, and the settings of clients that generate with it."""

    def __init__(self, folder: Path, directory: Path, **sections: Mapping[str, Any]) -> None:
        self.folder = folder
        self.address = f"tcp://127.0.0.1:{free_port()}"
        own = {"address": self.address, "runs_dir": folder, "run_id": "run", "cache_dir": folder / "cache"}
        tree: dict[str, dict[str, Any]] = {
            "server": own,
            "model": {"model_name_or_path": str(directory)},
            "text": {"max_seq_length": 64},
            "storage": {"fsync": "never"},
        }
        names = {*tree, *sections}
        merged = {name: tree.get(name, {}) | dict(sections.get(name, {})) for name in names}
        super().__init__(ServerConfig.from_tree(merged, source="test"), as_json=True)
        self.start()

    def client(self, client_id: str = "writer", *, address: str = "") -> ClientConfig:
        folders = {"output_dir": str(self.folder / "clients"), "cache_dir": str(self.folder / "cache" / "clients")}
        tree = {
            "client": {"client_id": client_id, "server_address": address or self.address, **folders},
            "policy": {"min_bottom_layers": 0, "min_top_layers": 0},
        }
        return ClientConfig.from_tree(tree, source="test")
