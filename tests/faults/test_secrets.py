"""A whole run at debug level, with keys, a crash and a violation in it: no key, text or token in anything it says."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.test_keys import Office
from faults.town import Town

from splitfl.transport.keys import SECRET_FILE

pytestmark = pytest.mark.slow

PLANTED = "zebrafinch"


def test_nothing_secret_is_said(town: Callable[..., Town], tmp_path: Path) -> None:
    office = Office(tmp_path)
    run = town(2, starts=False, server__keys=office.server, federation__num_rounds=1, federation__local_steps=6)
    for number, name in enumerate(run.names):
        office.enrol(run, name)
        (tmp_path / f"{number}.txt").write_text("\n".join(f"{PLANTED} {name} {line}" for line in range(20)) + "\n")
    logs = {name: (tmp_path / f"{name}.said").open("wb") for name in ("server", *run.names)}
    processes = {
        name: subprocess.Popen(
            [
                sys.executable,
                "-m",
                "server_backbone" if name == "server" else "client_edge",
                "--verbose",
                "--config",
                str(run.config(name)),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for name, log in logs.items()
    }
    run.processes = processes  # so that the fixture ends them
    for process in processes.values():
        assert process.wait(timeout=90) == 0
    for log in logs.values():
        log.close()
    secrets = {folder.name: (folder / SECRET_FILE).read_text().strip() for folder in tmp_path.glob("keys-*")}
    assert len(secrets) == 3
    said = [*tmp_path.glob("*.said"), *(path for path in run.run_dir.rglob("*") if path.is_file())]
    said += [path for name in run.names for path in run.client_dir(name).glob("*.jsonl")]
    assert len(said) > 8
    for path in said:
        content = path.read_bytes()
        assert PLANTED.encode() not in content, path
        for folder, secret in secrets.items():
            assert secret.encode() not in content, (path, folder)
