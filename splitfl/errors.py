"""Every error a caller may want to catch, and the exit code a command ends with.

SplitflError               1
  ConfigError              2   a value the user gave is wrong
  DataError                3   a data file is missing, empty or malformed
  ModelError               4   a model or checkpoint cannot be used, or cannot be cut there
  ProtocolError
    LocalProtocolError    70   we tried to break the protocol: a bug on this side
    RemoteProtocolError    5   the peer broke it: drop the peer, keep serving
  TransportError           6   an address cannot be used
    PeerGone               7   the peer did not answer, closed, or fell silent past its deadline
  Refused                  8   the server said no, and why
  Incomplete               9   the run ended before its last round
  StorageError            10   the disk is full, or does not take or give back what must be kept
  NotAllowed              11   the client's own [policy] does not allow what the server asks for, or a bound is reached
  NotAccepted             12   nobody at the client has accepted what the run's settings let the server see

Ctrl-C ends a command with 130, as shells expect; SIGTERM ends a server or client that has saved its state with 0. A
second signal ends it at once, with 137: what is on disk is as after a kill.
"""

import errno
import os
from pathlib import Path
from typing import ClassVar, Self

_REMEDIES = (
    ((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    ((errno.EACCES, errno.EPERM), "choose a folder that this user may write to"),
    ((errno.ENOTDIR, errno.EEXIST), "choose another folder, since a file has that name"),
)
_SEE_TO_THE_DISK = "see that the disk is mounted, writable and sound"


class SplitflError(Exception):
    """Anything splitfl raises on purpose; its text is one sentence for a person."""

    exit_code: ClassVar[int] = 1


class ConfigError(SplitflError):
    """A value the user gave is wrong; the text names the setting, the value and the rule."""

    exit_code = 2


class DataError(SplitflError):
    """A data file is missing, empty or malformed; the text names the file and the line."""

    exit_code = 3


class ModelError(SplitflError):
    """A model or checkpoint cannot be used, or cannot be cut there."""

    exit_code = 4


class ProtocolError(SplitflError):
    """A message that the protocol does not allow here."""


class LocalProtocolError(ProtocolError):
    """We tried to break the protocol: a bug on this side."""

    exit_code = 70


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol: drop the peer, keep serving."""

    exit_code = 5


class TransportError(SplitflError):
    """An address cannot be used."""

    exit_code = 6


class PeerGone(TransportError):  # noqa: N818  # the name is the finding, not that it is an error
    """The peer did not answer, closed, or fell silent past its deadline."""

    exit_code = 7


class Refused(SplitflError):  # noqa: N818
    """The server said no, and why; `code` is its name on the wire (`protocol.messages.Why`), "" without one."""

    exit_code = 8

    def __init__(self, text: str, *, code: str = "") -> None:
        super().__init__(text)
        self.code = code


class Incomplete(SplitflError):  # noqa: N818
    """The run ended before its last round; the text says what is kept and where."""

    exit_code = 9


class StorageError(SplitflError):
    """The disk is full, or does not take or give back what must be kept; the text names the file and the remedy."""

    exit_code = 10

    @classmethod
    def at(cls, path: Path, error: OSError) -> Self:
        """Say what failed where, how much room there is, and what helps."""
        where = path if path.exists() else path.parent
        try:
            free = f"{os.statvfs(where).f_bavail * os.statvfs(where).f_frsize / 2**20:,.0f} MiB free"
        except OSError:
            free = "free space unknown"
        remedy = next((text for numbers, text in _REMEDIES if error.errno in numbers), _SEE_TO_THE_DISK)
        return cls(f"{path}: {error.strerror} ({free}): {remedy}, then start the same command again")


class NotAllowed(SplitflError):  # noqa: N818
    """The client's own `[policy]` does not allow this; the text names the setting there and what the server wants."""

    exit_code = 11


class NotAccepted(SplitflError):  # noqa: N818
    """Nobody at the client has accepted these settings of the run, or they have changed since."""

    exit_code = 12
