"""`python -m server_backbone` is `splitfl server`."""

import sys

from server_backbone.command import Server
from splitfl.command_line import run_one

sys.exit(run_one("server", Server()))
