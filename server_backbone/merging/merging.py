"""What the engine asks of merges, and the parts that a merge of every kind is made of.

Uploads are folded in the order of their names, one tensor at a time, so the order in which they arrived never matters.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from server_backbone.compute.blocks_worker import COMMON, BlocksWorker
from server_backbone.compute.copies import weights_in
from server_backbone.deciding.rounds import Merge
from server_backbone.merging.layers import Joined, Layers
from server_backbone.merging.uploads import Uploads, Weighed
from server_backbone.records.entries import Entry, MergeMade
from server_backbone.records.state import RunState
from splitfl.protocol.messages import Upload


@dataclass(frozen=True, slots=True, kw_only=True)
class Spooled:
    """A client's layers, taken or dropped."""

    name: str
    entry: Entry | None
    """What is to be written of it."""
    objection: str = ""
    """Why they are in no merge, "" if they are in the next."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Made:
    """A merge, before it is written down."""

    entry: MergeMade
    lowered: Mapping[str, float]
    """What those would have weighed who were held to `strategy.max_client_weight`, by client."""
    backbone: Mapping[str, Tensor]
    """What it has made of the clients' copies of the backbone; {} where there are none, or the old ones stay."""


class Merging(Protocol):
    """How uploads become everyone's layers. Nothing here is written to the log: what is to be, is given back."""

    layers: Layers

    def restore(
        self, layers: Mapping[str, Tensor] | None, strategy_state: Mapping[str, Tensor], state: RunState
    ) -> list[str]:
        """Go on with what the last merge has left and the uploads on disk; name the uploads that are lost."""
        ...

    def spool(self, client_id: str, upload: Upload, state: RunState) -> Spooled:
        """Keep a client's layers for a merge, or drop them by rule; raise `RemoteProtocolError` for poison."""
        ...

    def retire(self, merge: Merge, state: RunState) -> None:
        """Put aside the layers that a merge is about to replace, if somebody trains from them."""
        ...

    def merge(self, merge: Merge, state: RunState) -> Made:
        """Fold the uploads of a merge into everyone's layers, or say why the old ones stay."""
        ...

    def forget(self, merge: Merge, state: RunState) -> None:
        """Remove what nobody needs after a merge; `state` is that after it."""
        ...


class Backbones(Protocol):
    """Clients' copies of what trains of the backbone, all of the same names; none where the clients share one."""

    def before_merge(self) -> Mapping[str, Tensor]:
        """Return what they began with, the live tensors."""
        ...

    def to_merge(self, client_id: str) -> Mapping[str, Tensor]:
        """Return what one client's steps have made of that, the live tensors."""
        ...


class Shared:
    """One backbone for all: there is nothing of it to merge."""

    def before_merge(self) -> Mapping[str, Tensor]:
        """Return nothing."""
        return {}

    def to_merge(self, client_id: str) -> Mapping[str, Tensor]:
        """Return nothing."""
        return {}


class OwnCopies:
    """A copy of the backbone for each client."""

    def __init__(self, worker: BlocksWorker) -> None:
        self._worker = worker

    def before_merge(self) -> Mapping[str, Tensor]:
        """Return what all have in common."""
        return weights_in(self._worker.state(COMMON))

    def to_merge(self, client_id: str) -> Mapping[str, Tensor]:
        """Return one client's copy."""
        return weights_in(self._worker.state(client_id))


_NOTHING: tuple[Weighed, Mapping[str, Tensor]] = Weighed(used={}, lowered={}), {}


def fold(
    uploads: Uploads,
    names: Collection[str],
    layers: Layers,
    backbones: Backbones,
    *,
    update_of: Callable[[str], Mapping[str, Tensor]] | None = None,
    rates: Mapping[str, float] | None = None,
    num_clients: int = 0,
) -> tuple[Weighed, Mapping[str, Tensor]]:
    """Fold these uploads into everyone's layers; return what each counted, and what comes of the backbone's copies.

    `update_of` gives the layers that an upload counts as, if not its own. Who is not in `rates` has taken no step.
    """
    weighed = uploads.weighed(names, layers.strategy.max_client_weight)
    update_of, rates = update_of or uploads.layers_of, rates or {}
    backbone = layers.fold(
        [(Joined(update_of(name), backbones.to_merge(name)), weight) for name, weight in weighed.used.items()],
        backbones.before_merge(),
        rates=[rates.get(name, 0.0) for name in weighed.used],
        num_clients=num_clients,
    )
    return weighed, backbone


def made_of(
    merge: Merge,
    state: RunState,
    uploads: Uploads,
    layers: Layers,
    backbones: Backbones,
    *,
    update_of: Callable[[str], Mapping[str, Tensor]] | None = None,
    rates: Mapping[str, float] | None = None,
) -> Made:
    """Fold the uploads of a merge, or say why the old layers stay; arguments as for `fold`."""
    weights = uploads.weights_of(merge.uploaded)
    reason = merge.reason or layers.strategy.objection(list(weights.values()))
    weighed, backbone = _NOTHING
    if not reason:
        num_clients = state.num_clients
        weighed, backbone = fold(
            uploads, merge.uploaded, layers, backbones, update_of=update_of, rates=rates, num_clients=num_clients
        )
    entry = MergeMade(
        round=merge.round_number,
        accepted=not reason,
        reason=reason,
        weights=weighed.used,
        moved=state.moved_by(weighed.used),
    )
    return Made(entry=entry, lowered=weighed.lowered, backbone=backbone)
