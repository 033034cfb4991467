"""What names and texts in the settings may look like."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

# TOML has no null: an empty string says "not set" for a path as it does for a name.
OptionalPath = Annotated[Path | None, BeforeValidator(lambda value: None if value == "" else value)]

# A name that is a safe file name on every system, in a log line and in a header.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

SHA256_PATTERN = r"^[0-9a-f]{64}$"

# What a further held-out text may be called: in a log, on a terminal, in a page and in a header; and how many.
ALSO_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,57}$"
MAX_ALSO = 16

# A machine and a port, an IPv6 address in brackets.
PROXY_PATTERN = r"^(\[[0-9A-Fa-f:.]+\]|[^\s:/]+):[0-9]{1,5}$"
