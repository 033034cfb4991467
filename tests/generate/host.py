"""A server in a thread of this process, for clients that generate with its model over TCP."""

import ctypes
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conftest import free_port

from server_backbone.serve import serve
from splitfl.config import ClientConfig, ClientSection, ServerConfig


class Host:
    """One server; `stop` saves it as SIGTERM does, and `start` goes on with the same run."""

    def __init__(self, folder: Path, directory: Path, **sections: Mapping[str, Any]) -> None:
        self.folder = folder
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.error: BaseException | None = None
        own = {"address": self.address, "runs_dir": folder, "run_id": "run", "cache_dir": folder / "cache"}
        tree: dict[str, dict[str, Any]] = {
            "server": own,
            "model": {"model_name_or_path": str(directory)},
            "text": {"max_seq_length": 64},
            "storage": {"fsync": "never"},
        }
        names = {*tree, *sections}
        merged = {name: tree.get(name, {}) | dict(sections.get(name, {})) for name in names}
        self.config = ServerConfig.from_tree(merged, source="test")
        self.start()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._serve, name="host", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            serve(self.config, as_json=True)  # what it displays goes to standard error
        except KeyboardInterrupt:
            pass
        except BaseException as error:  # noqa: BLE001  # whatever ends it is the test's to see
            self.error = error

    def stop(self) -> None:
        """Interrupt it, as Ctrl-C does a process."""
        while self._thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._thread.ident or 0), ctypes.py_object(KeyboardInterrupt)
            )
            self._thread.join(timeout=2.0)
        assert self.error is None, self.error

    def client(self, client_id: str = "writer") -> ClientSection:
        folders = {"output_dir": str(self.folder / "clients"), "cache_dir": str(self.folder / "cache" / "clients")}
        tree = {"client": {"client_id": client_id, "server_address": self.address, **folders}}
        return ClientConfig.from_tree(tree, source="test").client
