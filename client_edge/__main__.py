"""`python -m client_edge` is `splitfl client`."""

import sys

from client_edge.command import Client
from splitfl.command_line import run_one

sys.exit(run_one("client", Client()))
