"""Merges that end a round: all its clients have begun with the layers that are everyone's, and each has one upload."""

from collections.abc import Mapping

from torch import Tensor

from server_backbone.deciding.rounds import Merge
from server_backbone.merging.layers import Layers
from server_backbone.merging.merging import Backbones, Made, Spooled, made_of
from server_backbone.merging.uploads import Seen, Uploads
from server_backbone.records.entries import Uploaded
from server_backbone.records.state import RunState
from splitfl.protocol.messages import Upload


class RoundMerging:
    """The `Merging` of rounds that all clients share."""

    def __init__(self, layers: Layers, uploads: Uploads, backbones: Backbones, *, takes_partial: bool) -> None:
        """`takes_partial` says that fewer steps than a round has count by their share (`partial_work`)."""
        self.layers = layers
        self._uploads = uploads
        self._backbones = backbones
        self._takes_partial = takes_partial

    def restore(
        self, layers: Mapping[str, Tensor] | None, strategy_state: Mapping[str, Tensor], state: RunState
    ) -> list[str]:
        """Go on with what the last merge has left and the uploads on disk; name the clients whose upload is lost."""
        self.layers.restore(layers, strategy_state)
        self._uploads.restore(state.uploaded)
        return sorted(state.uploaded.keys() - self._uploads.names())

    def spool(self, client_id: str, upload: Upload, state: RunState) -> Spooled:
        """Keep a client's layers for the merge that ends its round."""
        seen = Seen.of(client_id, state.round, state, takes_partial=self._takes_partial)
        taken = self._uploads.spool(client_id, upload, self.layers.held, seen)
        return Spooled(name=client_id, entry=Uploaded(client_id=client_id, weight=taken.weight, moved=taken.moved))

    def retire(self, merge: Merge, state: RunState) -> None:
        """Do nothing: nobody trains from the layers of an ended round."""

    def merge(self, merge: Merge, state: RunState) -> Made:
        """Fold the uploads of a round into everyone's layers, or say why the old ones stay."""
        rates = state.round.rates if state.round is not None else {}
        return made_of(merge, state, self._uploads, self.layers, self._backbones, rates=rates)

    def forget(self, merge: Merge, state: RunState) -> None:
        """Remove all uploads, merged or not."""
        self._uploads.forget()
