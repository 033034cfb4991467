"""A server in a thread of the test's own process, which is stopped as Ctrl-C stops one."""

import threading
import time
from pathlib import Path

from server_backbone.host import serve
from splitfl.config.trees import ServerConfig
from splitfl.stopping import StopRequest
from splitfl.telemetry.metrics import read_events

_SOON_S = 30.0


class ServedRun:
    """One server; `stop` saves it as SIGTERM does, and `start` goes on with the same run."""

    def __init__(self, config: ServerConfig, *, as_json: bool = False) -> None:
        """With `as_json` what it displays goes to standard error."""
        self.config = config
        self.run_dir = config.server.runs_dir / config.server.run_id
        self.error: BaseException | None = None
        self._as_json = as_json

    @property
    def metrics_path(self) -> Path:
        return self.run_dir / "metrics.jsonl"

    def start(self) -> None:
        """Return when it waits for clients, or has ended."""
        before, deadline = self._num_starts(), time.monotonic() + _SOON_S
        self._request = StopRequest()
        self._thread = threading.Thread(target=self._serve, name="host", daemon=True)
        self._thread.start()
        while self._thread.is_alive() and self._num_starts() == before:
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.02)

    def stop(self) -> None:
        """Interrupt it, as Ctrl-C does a process."""
        self._request.ask()
        self._thread.join(timeout=_SOON_S)
        assert not self._thread.is_alive(), "the server does not stop"
        assert self.error is None, self.error

    def _num_starts(self) -> int:
        started = read_events(self.metrics_path) if self.metrics_path.exists() else []
        return sum(event["event"] == "waiting" and event["text"].startswith("clients at ") for event in started)

    def _serve(self) -> None:
        try:
            serve(self.config, as_json=self._as_json, stop=self._request)
        except KeyboardInterrupt:
            pass
        except BaseException as error:  # noqa: BLE001  # whatever ends it is the test's to see
            self.error = error
