"""Uploads on disk, until a merge takes them, so that memory does not grow with the number of clients."""

import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from server_backbone.deciding.uploads import by_client, owner_of
from server_backbone.records.state import RoundState, RunState
from splitfl.errors import ModelError
from splitfl.federation.movement import Bound
from splitfl.federation.weights import capped
from splitfl.models import checkpoint
from splitfl.models.checkpoint import TensorFile
from splitfl.protocol.messages import Upload
from splitfl.protocol.roles import Role
from splitfl.protocol.tensors import Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the server itself knows of the work that an upload holds: no claim of its client goes beyond it."""

    num_examples: float = math.inf
    """Announced when the client joined."""
    num_tokens: float = math.inf
    """Label tokens of the steps of this round that were committed."""
    share: float = 1.0
    """Of the round's steps that count."""
    path: float = math.inf
    """Sum of the learning rates of those steps."""

    @classmethod
    def of(cls, client_id: str, round_: RoundState | None, state: RunState, *, takes_partial: bool) -> "Seen":
        """Return what is known of a client's round; where that has closed meanwhile, its upload is late.

        `takes_partial` says that fewer steps than the round has count by their share.
        """
        num_examples = state.members[client_id].num_examples or math.inf
        if round_ is None:
            return cls(num_examples=num_examples)
        return cls(
            num_examples=num_examples,
            num_tokens=round_.tokens.get(client_id, 0),
            share=round_.finished.get(client_id, 0) / round_.num_steps if takes_partial else 1.0,
            path=round_.paths.get(client_id, 0.0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """An upload that is on disk."""

    weight: float
    moved: float
    """How far its layers have gone of what they may (`federation.movement`), from 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """What the uploads of a merge count."""

    used: Mapping[str, float]
    lowered: Mapping[str, float]
    """What those would have weighed who were held to `strategy.max_client_weight`, by client."""


class Uploads:
    """Clients' layers by the name of the upload, each a file, and what each weighs."""

    def __init__(
        self,
        names: Sequence[str],
        run_dir: Path,
        weight_by: Literal["num_examples", "num_tokens", "uniform"],
        tensors: Tensors,
        bound: Bound | None = None,
    ) -> None:
        """`names` are the layers' names, in the model's order."""
        self._names = list(names)
        self._folder = run_dir / "uploads"
        self._weight_by = weight_by
        self._tensors = tensors
        self._bound = bound
        self._weights: dict[str, float] = {}

    def restore(self, weights: Mapping[str, float]) -> None:
        """Go on with those that a log knows; those that cannot be read are let go (`names`)."""
        self._weights = {name: weight for name, weight in weights.items() if self._is_readable(name)}

    def names(self) -> Collection[str]:
        """Return the names of all that wait."""
        return self._weights.keys()

    def drop(self, name: str) -> None:
        """Take one out of every merge."""
        self._weights.pop(name, None)

    def spool(self, name: str, upload: Upload, begun_with: Mapping[str, Tensor], seen: Seen | None = None) -> Taken:
        """Write a client's layers to disk and return what they weigh; raise `RemoteProtocolError` for poison.

        `begun_with` are the layers that the client began with. Examples count by the share of the round's steps that
        were made; tokens are counted step by step anyway.
        """
        seen = seen or Seen()
        layers = {
            layer: self._tensors.unpack(Role.LAYER, frames)
            for layer, frames in zip(self._names, upload.layers, strict=True)
        }
        moved = self._bound.check(layers, begun_with, seen.path) if self._bound is not None else 0.0
        self._folder.mkdir(exist_ok=True)
        checkpoint.save_tensors(self._path(name), layers)
        self._weights[name] = {
            "num_examples": min(upload.num_examples, seen.num_examples) * seen.share,
            "num_tokens": min(upload.num_tokens, seen.num_tokens),
            "uniform": 1,
        }[self._weight_by]
        return Taken(weight=self._weights[name], moved=moved)

    def weights_of(self, names: Collection[str]) -> dict[str, float]:
        """Return the weights of those that weigh anything, in the order of their names.

        Rules that know no weights must not count the others.
        """
        return {name: self._weights[name] for name in sorted(names) if self._weights[name] > 0}

    def weighed(self, names: Collection[str], max_client_weight: float) -> Weighed:
        """Bound what each client counts, however many of the uploads are its own."""
        weights = self.weights_of(names)
        owners = by_client(weights)
        bounded = capped(owners, max_client_weight)
        lowered = {owner: weight for owner, weight in owners.items() if bounded[owner] < weight}
        used = {
            name: weight * (bounded[owner] / lowered[owner]) if (owner := owner_of(name)) in lowered else weight
            for name, weight in weights.items()
        }
        return Weighed(used=used, lowered=lowered)

    def layers_of(self, name: str) -> Mapping[str, Tensor]:
        """Return one's layers, each read when it is asked for."""
        return TensorFile(self._path(name))

    def forget(self, waiting: Collection[str] = ()) -> None:
        """Remove what was spooled, merged or not, but for those that wait for another merge."""
        self._weights = {name: weight for name, weight in self._weights.items() if name in waiting}
        if not waiting:
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        kept = {self._path(name) for name in waiting}
        for path in self._folder.iterdir():
            if path not in kept:
                path.unlink()

    def _is_readable(self, name: str) -> bool:
        try:
            return list(checkpoint.entries_of(self._path(name))) == self._names
        except ModelError:
            return False

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"
