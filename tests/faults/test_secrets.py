"""A whole run at debug level, with keys, a crash and a violation in it: no key, text or token in anything it says."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.test_keys import Office
from faults.town import Town
from forked import Forked

from splitfl.transport.keys import SECRET_FILE

pytestmark = pytest.mark.slow

PLANTED = "zebrafinch"


def test_nothing_secret_is_said(town: Callable[..., Town], tmp_path: Path) -> None:
    office = Office(tmp_path)
    run = town(2, starts=False, server__keys=office.server, federation__num_rounds=1, federation__local_steps=6)
    for number, name in enumerate(run.names):
        office.enrol(run, name)
        (tmp_path / f"{number}.txt").write_text("\n".join(f"{PLANTED} {name} {line}" for line in range(20)) + "\n")
    said = {name: tmp_path / f"{name}.said" for name in ("server", *run.names)}
    for name, file in said.items():
        module = "server_backbone" if name == "server" else "client_edge"
        arguments = ("--verbose", "--config", str(run.config(name)))
        run.processes[name] = Forked(module, *arguments, said=file, env=os.environ)
    assert [run.processes[name].wait(timeout=90) for name in said] == [0, 0, 0]
    secrets = {folder.name: (folder / SECRET_FILE).read_text().strip() for folder in tmp_path.glob("keys-*")}
    assert len(secrets) == 3
    printed = [file.with_suffix(".out") for file in said.values()]
    files = [*said.values(), *printed, *(path for path in run.run_dir.rglob("*") if path.is_file())]
    files += [path for name in run.names for path in run.client_dir(name).glob("*.jsonl")]
    assert len(files) > 8
    for path in files:
        content = path.read_bytes()
        assert PLANTED.encode() not in content, path
        for folder, secret in secrets.items():
            assert secret.encode() not in content, (path, folder)
