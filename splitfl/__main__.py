"""`python -m splitfl` is the command `splitfl`."""

import sys

from splitfl.command_line import main

sys.exit(main())
