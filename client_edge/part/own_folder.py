"""A client's own folder of a run, and which run that is.

The name alone does not tell, since an operator may give it to another run.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from splitfl.config.run import differences
from splitfl.config.trees import RunConfig
from splitfl.durability.disk import make_private_dir, sync_dir
from splitfl.errors import ConfigError, StorageError

# What it needs to go on, and whose that is.
STATE_DIR = "state"
METRICS_FILE = "metrics.jsonl"
_RUN_FILE = "run.json"
# Settings that an operator may set anew for a run that is under way.
_MAY_CHANGE = ("optimizer.num_training_steps",)
_MOST_NAMED = 8


def open_folder(folder: Path, run: RunConfig, *, resumes: bool) -> None:
    """Make the folder ready for this run, without what an earlier start has left there if it is not to resume.

    Raises `ConfigError` when what is kept there is of another run than the server's of that name.
    """
    make_private_dir(folder)
    if not resumes:
        shutil.rmtree(folder / STATE_DIR, ignore_errors=True)
        (folder / _RUN_FILE).unlink(missing_ok=True)
    _check_run(folder, run)
    _write_run(folder, run)


def _check_run(folder: Path, run: RunConfig) -> None:
    if not (folder / STATE_DIR).is_dir() or (before := _identity_in(folder)) is None:
        return
    other = [
        f"{name} (was {then!r}, is {now!r})"
        for name, then, now in differences(before, run.identity())
        if name not in _MAY_CHANGE
    ]
    if other:
        more = f"; and {len(other) - _MOST_NAMED} more" if len(other) > _MOST_NAMED else ""
        raise ConfigError(
            f"{folder} holds this client's part in another run of the same name, which had other settings:"
            f" {'; '.join(other[:_MOST_NAMED])}{more}. Start with --resume never to forget that part and begin anew, or"
            " set client.output_dir to another folder"
        )


def _write_run(folder: Path, run: RunConfig) -> None:
    path = folder / _RUN_FILE
    half_done = folder / f".{_RUN_FILE}.{os.getpid()}.partial"
    try:
        with open(os.open(half_done, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump({"identity": run.identity()}, file)
            file.flush()
            os.fsync(file.fileno())
        half_done.replace(path)
        sync_dir(folder)
    except OSError as error:
        raise StorageError.at(path, error) from None
    finally:
        half_done.unlink(missing_ok=True)


def _identity_in(folder: Path) -> dict[str, Any] | None:
    try:
        match json.loads((folder / _RUN_FILE).read_text(encoding="utf-8")):
            case {"identity": dict(identity)}:
                return identity
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        pass
    raise ConfigError(
        f"{folder / _RUN_FILE} cannot be read, so it is not known which run the folder is of: start with --resume never"
        " to begin anew"
    )
