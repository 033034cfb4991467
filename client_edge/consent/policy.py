"""What the client's own `[policy]` allows: the settings when it joins, and what the run takes while it goes on."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from splitfl.config.own import PolicySection
from splitfl.config.rules import objections_to
from splitfl.config.trees import RunConfig
from splitfl.durability.disk import RealDisk
from splitfl.errors import NotAllowed
from splitfl.models.checkpoint import TensorFile
from splitfl.protocol.messages import Welcome

# Within a client's folder: its steps, bytes and hours for the run so far, over all its starts.
SPENT_FILE = "spent.json"
_WRITE_EVERY_S = 10.0
_OTHERWISE = (
    "To take part all the same, change [policy] in your own file (docs/consent.md); or ask the server's operator for"
    " other settings"
)


def check_policy(policy: PolicySection, run: RunConfig, welcome: Welcome) -> None:
    """Raise `NotAllowed` for settings or files that this client does not take part with."""
    objections = objections_to(policy, run)
    if (size := sum(welcome.file_sizes)) > policy.max_file_bytes:
        objections.append(f"{size:,} bytes of files (policy.max_file_bytes = {policy.max_file_bytes:,})")
    if objections:
        raise NotAllowed(f"your policy does not allow this run: {'; '.join(objections)}. {_OTHERWISE}")


def check_known(policy: PolicySection, digest: str, own_digest: Callable[[], str], adapters: TensorFile | None) -> None:
    """Raise `NotAllowed` unless the first layers are what `policy.known_weights` says, and their adapters do nothing.

    `digest` is the SHA-256 (hex) of what the server sends, `own_digest` computes that of this machine's own copy.
    """
    if not policy.known_weights:
        return
    wanted = own_digest() if policy.known_weights == "own" else policy.known_weights
    if digest != wanted:
        raise NotAllowed(
            f"the server's layers have SHA-256 {digest:.16}..., and policy.known_weights wants {wanted:.16}...: they"
            " come from another checkpoint, or the model is cut elsewhere (`splitfl check` prints the server's)."
            " Ask the server's operator, or set policy.known_weights anew"
        )
    for name in adapters or ():
        if ".lora_B." in name and adapters is not None and bool(torch.count_nonzero(adapters[name])):
            raise NotAllowed(
                f"the server's adapter {name} is not zero at the start, so the layers are not the ones"
                " of policy.known_weights"
            )


class Allowance:
    """The rest that a client may give to one run; counted over all its starts, and kept in its folder."""

    def __init__(self, policy: PolicySection, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Read what earlier starts have given; a file that cannot be read counts as nothing given."""
        self._policy = policy
        self._path = folder / SPENT_FILE
        self._clock = clock
        self._begun_s = self._written_s = clock()
        before = _read(self._path)
        self._steps = int(before.get("steps", 0))
        self._rounds = int(before.get("rounds", 0))
        self._earlier_bytes = int(before.get("bytes_sent", 0))
        self._earlier_s = before.get("seconds", 0.0)
        self._bytes = 0

    def step(self) -> None:
        """Take note of a step that begins."""
        self._steps += 1
        self._check("max_steps", self._steps, "training steps begun")

    def round(self, number: int) -> None:
        """Take note of a round that this client takes part in."""
        self._rounds = max(self._rounds, number)
        self._check("max_rounds", self._rounds, "rounds")

    def sent(self, num_bytes: int) -> None:
        """Take note of all bytes sent since this start, and of the time."""
        self._bytes = num_bytes
        self._check("max_bytes_sent", self._earlier_bytes + num_bytes, "bytes sent")
        self._check("max_hours", self._seconds / 3600, "hours")
        if self._clock() - self._written_s > _WRITE_EVERY_S:
            self.write()

    def sent_at_last(self, num_bytes: int) -> None:
        """Take note of all bytes sent by the end of this start, and keep the counts."""
        self._bytes = num_bytes
        self.write()

    def write(self) -> None:
        """Keep the counts for the next start; raises `StorageError` when the disk does not take them."""
        self._written_s = self._clock()
        spent = {
            "steps": self._steps,
            "rounds": self._rounds,
            "bytes_sent": self._earlier_bytes + self._bytes,
            "seconds": self._seconds,
        }
        RealDisk().write_whole(self._path, [json.dumps(spent).encode()])

    @property
    def _seconds(self) -> float:
        return self._earlier_s + self._clock() - self._begun_s

    def _check(self, name: str, value: float, what: str) -> None:
        most = getattr(self._policy, name)
        if value > most:
            raise NotAllowed(
                f"more than {most:g} {what} in this run: policy.{name} is reached and this client ends; the"
                " learned layers are kept, and a higher bound goes on from there"
            )


def _read(path: Path) -> dict[str, float]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, int | float) and value >= 0}
