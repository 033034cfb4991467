"""The merge at the end of a round: uploads wait on disk, the strategy folds them, and the result is everyone's.

Uploads are spooled so that memory does not grow with the number of clients. They are folded in the order of the
clients' ids, one tensor at a time, so their order of arrival never matters.
"""

import itertools
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from server_backbone.compute.blocks_worker import COMMON, BlocksWorker
from server_backbone.compute.copies import weights_in
from splitfl.errors import ModelError
from splitfl.federation.movement import Bound
from splitfl.federation.strategy import Strategy
from splitfl.federation.weights import capped
from splitfl.models import checkpoint
from splitfl.models.checkpoint import TensorFile
from splitfl.models.export import trained_file
from splitfl.protocol.messages import Upload
from splitfl.protocol.roles import Role
from splitfl.protocol.tensors import Tensors

_BEST_FILES = "best-*.safetensors"


class FirstLayers(Mapping[str, Tensor]):
    """What every client starts with: read from the checkpoint when asked for, since a server need not hold it."""

    def __init__(self, names: Sequence[str], read: Callable[[str], Tensor]) -> None:
        self._names = list(names)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Backbones(Protocol):
    """Clients' copies of what trains of the backbone, all of the same names; none where the clients share one."""

    def before_merge(self) -> Mapping[str, Tensor]:
        """Return what they began with."""
        ...

    def to_merge(self, client_id: str) -> Mapping[str, Tensor]:
        """Return one client's."""
        ...


class _Shared:
    """One backbone for all: there is nothing of it to merge."""

    def before_merge(self) -> Mapping[str, Tensor]:
        """Return nothing."""
        return {}

    def to_merge(self, client_id: str) -> Mapping[str, Tensor]:
        """Return nothing."""
        return {}


SHARED = _Shared()


class OwnCopies:
    """A copy of the backbone for each client."""

    def __init__(self, worker: BlocksWorker) -> None:
        self._worker = worker

    def before_merge(self) -> Mapping[str, Tensor]:
        """Return what all have in common, the live tensors."""
        return weights_in(self._worker.state(COMMON))

    def to_merge(self, client_id: str) -> Mapping[str, Tensor]:
        """Return what this client's steps have made of that, the live tensors."""
        return weights_in(self._worker.state(client_id))


class _Joined(Mapping[str, Tensor]):
    """A client's layers and its copy of the backbone as one, each tensor brought here when it is asked for."""

    def __init__(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        self._both = (first, second)

    def __getitem__(self, name: str) -> Tensor:
        first, second = self._both
        return second[name].cpu() if name in second else first[name]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(*self._both)

    def __len__(self) -> int:
        return sum(map(len, self._both))


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the server itself knows of the work for an upload: no claim of its client goes beyond it."""

    num_examples: float = math.inf
    """Announced when the client joined."""
    num_tokens: float = math.inf
    """Label tokens of the steps of this round that were committed."""
    share: float = 1.0
    """Of the round's steps that count."""
    path: float = math.inf
    """Sum of the learning rates of those steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """An upload that is on disk."""

    weight: float
    moved: float
    """How far its layers have gone of what they may (`federation.movement`), from 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """What the uploads of a merge counted."""

    used: dict[str, float]
    lowered: dict[str, float]
    """What those would have weighed who were held to `strategy.max_client_weight`, by client."""


class Merger:
    """Keeps the client-side layers that are everyone's."""

    def __init__(
        self,
        strategy: Strategy,
        first_layers: Mapping[str, Tensor],
        run_dir: Path,
        weight_by: Literal["num_examples", "num_tokens", "uniform"],
        tensors: Tensors,
        bound: Bound | None = None,
    ) -> None:
        """`first_layers` are what every client starts with, by name, in the model's order."""
        self.strategy = strategy
        self._names = list(first_layers)
        self._first_layers = self._layers = first_layers
        self._run_dir = run_dir
        self._weight_by = weight_by
        self._tensors = tensors
        self._bound = bound
        self._weights: dict[str, float] = {}
        self._state: Mapping[str, Tensor] = {}
        self._backbone: Mapping[str, Tensor] = {}

    def restore(
        self, layers: Mapping[str, Tensor] | None, state: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> list[str]:
        """Go on with what the last merge has left and the uploads on disk; return whose uploads cannot be read."""
        self._state = state
        if layers is not None:
            self._layers = {name: layers[name] for name in self._names}
        self._weights = {client_id: weight for client_id, weight in weights.items() if self._is_readable(client_id)}
        return sorted(weights.keys() - self._weights.keys())

    def spool(self, client_id: str, upload: Upload, seen: Seen | None = None) -> Taken:
        """Write one client's layers to disk and return what they weigh; raise `RemoteProtocolError` for poison.

        Examples count by the share of the round's steps that are done; tokens are counted step by step anyway.
        """
        seen = seen or Seen()
        layers = {
            name: self._tensors.unpack(Role.LAYER, frames)
            for name, frames in zip(self._names, upload.layers, strict=True)
        }
        moved = self._bound.check(layers, self._begun_with(client_id), seen.path) if self._bound is not None else 0.0
        self._spool_dir.mkdir(exist_ok=True)
        checkpoint.save_tensors(self._spooled(client_id), layers)
        self._weights[client_id] = {
            "num_examples": min(upload.num_examples, seen.num_examples) * seen.share,
            "num_tokens": min(upload.num_tokens, seen.num_tokens),
            "uniform": 1,
        }[self._weight_by]
        return Taken(weight=self._weights[client_id], moved=moved)

    def objection(self, clients: Sequence[str]) -> str:
        """Say why these clients' layers cannot be merged, "" if they can."""
        return self.strategy.objection(list(self._weights_of(clients).values()))

    def merge(
        self,
        clients: Sequence[str],
        backbones: Backbones = SHARED,
        *,
        rates: Mapping[str, float] | None = None,
        num_clients: int = 0,
    ) -> Weighed:
        """Fold these clients' layers into everyone's, and their copies of the backbone; return what each counted.

        The strategy sees a client's layers and its copy as one update. For control variates: `rates` by client and
        `num_clients` as in `Strategy.aggregate_controls`; whom `rates` does not name has taken no step.
        """
        weighed = self._weigh(clients)
        weights = weighed.used
        before = backbones.before_merge()
        updates = [
            (_Joined(self._update_of(client_id), backbones.to_merge(client_id)), weight)
            for client_id, weight in weights.items()
        ]
        old = _Joined(self._layers, before)
        folded = self.strategy.aggregate_train(updates, old, self._state)
        controls = self.strategy.aggregate_controls(
            updates,
            old,
            self._state,
            rates=[(rates or {}).get(client_id, 0.0) for client_id in weights],
            num_clients=max(num_clients, len(weights)),
        )
        self._backbone = {name: folded.layers.pop(name) for name in before}
        self._layers, self._state = folded.layers, {**folded.state, **controls}
        return weighed

    def _weigh(self, uploads: Sequence[str]) -> Weighed:
        """Bound what each client counts, however many of the uploads are its own."""
        weights = self._weights_of(uploads)
        owners: dict[str, float] = {}
        for name, weight in weights.items():
            owners[self._owner(name)] = owners.get(self._owner(name), 0.0) + weight
        bounded = capped(owners, self.strategy.max_client_weight)
        lowered = {owner: weight for owner, weight in owners.items() if bounded[owner] < weight}
        used = {
            name: weight * (bounded[owner] / lowered[owner]) if (owner := self._owner(name)) in lowered else weight
            for name, weight in weights.items()
        }
        return Weighed(used=used, lowered=lowered)

    def _owner(self, upload: str) -> str:
        """Return whose an upload is: here a client has one in a merge, and it has its name."""
        return upload

    def _begun_with(self, upload: str) -> Mapping[str, Tensor]:
        """Return the layers that an upload's client began with."""
        return self._layers

    def _update_of(self, client_id: str) -> Mapping[str, Tensor]:
        """Return the layers that a strategy folds, read as they are asked for."""
        return TensorFile(self._spooled(client_id))

    def forget_uploads(self, waiting: Collection[str] = ()) -> None:
        """Remove the spooled uploads, merged or not, but for the ones that wait for another merge."""
        self._weights = {upload: weight for upload, weight in self._weights.items() if upload in waiting}
        self._backbone = {}
        if not waiting:
            shutil.rmtree(self._spool_dir, ignore_errors=True)
            return
        kept = {self._spooled(upload) for upload in waiting}
        for path in self._spool_dir.iterdir():
            if path not in kept:
                path.unlink()

    def layers(self) -> Mapping[str, Tensor]:
        """Return everyone's layers, in the model's order; they are never written to again."""
        return self._layers

    def backbone(self) -> Mapping[str, Tensor]:
        """Return what the merge has made of the clients' copies of the backbone, until its uploads are forgotten."""
        return self._backbone

    def controls(self) -> list[Tensor]:
        """Return the control variates that go with the layers, [] if the strategy has none."""
        return self.strategy.controls(self._layers, self._state)

    def state(self) -> Mapping[str, Tensor]:
        """Return what the strategy wants to be given at the next merge; never written to again."""
        return self._state

    def end_with(self, layers: Mapping[str, Tensor]) -> None:
        """Make an earlier merge's layers everyone's; nothing is merged after that."""
        self._layers = {name: layers[name] for name in self._names}

    def keep_best(self, round_number: int) -> None:
        """Keep what `save` has written last beside what it will write, as the best round's; the copy appears whole."""
        saved = TensorFile(self._run_dir / trained_file())
        pieces = {name: checkpoint.piece_of_entry(entry) for name, entry in saved.entries.items()}
        checkpoint.write(self._best(round_number), pieces, mode=0o600)

    def forget_other_bests(self, round_number: int) -> None:
        """Remove what `keep_best` has kept of any other round than this."""
        for path in self._run_dir.glob(_BEST_FILES):
            if path != self._best(round_number):
                path.unlink(missing_ok=True)

    def best(self, round_number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the layers and the backbone that `keep_best` has kept; raise `ModelError` if they cannot be read."""
        kept = TensorFile(self._best(round_number))
        layers = {name: kept[name] for name in self._names}
        return layers, {name: kept[name] for name in kept if name not in layers}

    def _best(self, round_number: int) -> Path:
        return self._run_dir / _BEST_FILES.replace("*", f"{round_number:05d}")

    def save(self, backbone: Mapping[str, Tensor], client_id: str = "") -> None:
        """Write all that is trained, both sides of one moment in one file, which replaces the last one whole.

        With a client's name it is that client's alone.
        """
        checkpoint.save_tensors(self._run_dir / trained_file(client_id), {**self._layers, **backbone})

    def _weights_of(self, clients: Sequence[str]) -> dict[str, float]:
        """Return the weights above 0: rules that know no weights must not count the other clients."""
        return {client_id: self._weights[client_id] for client_id in sorted(clients) if self._weights[client_id] > 0}

    def _is_readable(self, client_id: str) -> bool:
        try:
            return list(checkpoint.entries_of(self._spooled(client_id))) == self._names
        except ModelError:
            return False

    @property
    def _spool_dir(self) -> Path:
        return self._run_dir / "uploads"

    def _spooled(self, client_id: str) -> Path:
        return self._spool_dir / f"{client_id}.safetensors"
