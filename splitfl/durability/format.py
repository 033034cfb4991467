"""In which form a folder's records are, and which splitfl wrote them: another form is refused, by name.

A record says nothing of what its fields mean. So the folder has a number. It is raised whenever records, their kinds or
their fields change so that an older or a newer splitfl would read them wrongly or not at all.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from splitfl.durability.disk import Disk
from splitfl.errors import ConfigError

STATE_FORMAT = 2
"""1 was never written down: a folder with records and without this file is of that form."""
FORMAT_FILE = "format.json"


def check_format(disk: Disk, folder: Path) -> bool:
    """Tell whether a folder says in which form its records are; raise `ConfigError` when that is not ours."""
    names = disk.names(folder)
    if FORMAT_FILE in names:
        number, writer = _said(disk, folder / FORMAT_FILE)
    elif any(name.endswith(".bin") for name in names):
        number, writer = 1, "an older splitfl"
    else:
        return False
    if number != STATE_FORMAT:
        raise ConfigError(
            f"{folder} was written by {writer} in format {number}, and this is splitfl {version('splitfl')}, which"
            f" reads format {STATE_FORMAT}: go on with the splitfl that wrote it, or begin anew (a server with another"
            " server.run_id, a client with --resume never)"
        )
    return True


def write_format(disk: Disk, folder: Path) -> None:
    """Write in which form the records are going to be."""
    said = json.dumps({"format": STATE_FORMAT, "splitfl": version("splitfl")})
    disk.write_whole(folder / FORMAT_FILE, [said.encode()])


def _said(disk: Disk, path: Path) -> tuple[Any, str]:
    with disk.open(path) as file:
        content = file.read()
    try:
        match json.loads(content):
            case {"format": int(number), "splitfl": str(writer)}:
                return number, f"splitfl {writer:.40}"
    except ValueError:
        pass
    raise ConfigError(f"{path} cannot be read, so it is not known which splitfl wrote the records in this folder")
