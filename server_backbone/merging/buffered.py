"""Merges of uploads that began with different layers (FedBuff): earlier ones are kept while clients train from them."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from server_backbone.deciding.rounds import Merge
from server_backbone.deciding.uploads import name_in_buffer
from server_backbone.merging.layers import Layers
from server_backbone.merging.merging import Made, Shared, Spooled, made_of
from server_backbone.merging.uploads import Seen, Uploads
from server_backbone.merging.versions import Versions
from server_backbone.records.entries import Buffered, TurnEnded
from server_backbone.records.state import RunState
from splitfl.errors import ModelError
from splitfl.federation.strategies.fed_buff import Rebased
from splitfl.protocol.messages import Upload
from splitfl.telemetry.units import counted


class BufferedMerging:
    """The `Merging` of rounds of each client's own. The backbone is one for all of them."""

    def __init__(self, layers: Layers, uploads: Uploads, versions: Versions, *, max_staleness: int) -> None:
        """An upload that began more than `max_staleness` merges ago is dropped; 0 means that none is."""
        self.layers = layers
        self._uploads = uploads
        self._versions = versions
        self._max_staleness = max_staleness

    def restore(
        self, layers: Mapping[str, Tensor] | None, strategy_state: Mapping[str, Tensor], state: RunState
    ) -> list[str]:
        """Go on with what the last merge has left and the uploads on disk; name the uploads that are lost.

        One is lost too if the layers that it began with are.
        """
        self.layers.restore(layers, strategy_state)
        self._uploads.restore(state.uploaded)
        for name in list(self._uploads.names()):
            if not self._has(state.buffer[name].begun, state):
                self._uploads.drop(name)
        return sorted(state.uploaded.keys() - self._uploads.names())

    def spool(self, client_id: str, upload: Upload, state: RunState) -> Spooled:
        """Keep layers with what they began with, or drop them by rule; either way the client's turn is over."""
        turn = state.turns.get(client_id)
        if turn is None:  # they came while the last merge was made
            return Spooled(name="", entry=None, objection="the run's last merge came first")
        begun, name = turn.number - 1, name_in_buffer(client_id, turn.first_step)
        if objection := self._objection_to(begun, state):
            return Spooled(name=name, entry=TurnEnded(client_id=client_id), objection=objection)
        seen = Seen.of(client_id, turn, state, takes_partial=False)
        taken = self._uploads.spool(name, upload, self._layers_of(begun, state), seen)
        entry = Buffered(client_id=client_id, name=name, begun=begun, weight=taken.weight, moved=taken.moved)
        return Spooled(name=name, entry=entry)

    def retire(self, merge: Merge, state: RunState) -> None:
        """Put everyone's layers aside if somebody trains from them, and forget those that nobody does."""
        newest, most = state.num_merged, self._max_staleness
        begun = set() if merge.closes else {turn.number - 1 for turn in state.turns.values()}
        too_old = newest + 1 - most if most else 0  # all that began before this is going to be dropped
        waiting = {upload.begun for upload in state.buffer.values()}
        needed = waiting | {number for number in begun if number >= too_old}
        if newest in needed and newest > 0:
            self._versions.put_aside(newest, self.layers.held)
        self._versions.keep_only(needed)

    def merge(self, merge: Merge, state: RunState) -> Made:
        """Fold uploads as if they had begun with the newest layers, or say why the old ones stay."""
        made = made_of(
            merge, state, self._uploads, self.layers, Shared(), update_of=lambda name: self._rebased(name, state)
        )
        return replace(made, entry=replace(made.entry, taken=list(merge.uploaded), closes=merge.closes))

    def forget(self, merge: Merge, state: RunState) -> None:
        """Remove the uploads that wait for no other merge, and after the last merge all earlier layers."""
        self._uploads.forget(state.buffer)
        if merge.closes:
            self._versions.keep_only(())

    def _objection_to(self, begun: int, state: RunState) -> str:
        staleness, most = state.num_merged - begun, self._max_staleness
        if most and staleness > most:
            return f"begun {counted(staleness, 'merge')} ago, strategy.max_staleness = {most}"
        if self._has(begun, state):
            return ""
        return f"the layers of merge {begun}, which it began with, cannot be read any more"

    def _rebased(self, name: str, state: RunState) -> Mapping[str, Tensor]:
        begun = state.buffer[name].begun
        return Rebased(
            self._uploads.layers_of(name), self._layers_of(begun, state), self.layers.held, state.num_merged - begun
        )

    def _has(self, number: int, state: RunState) -> bool:
        """Tell whether the layers of a merge are still there."""
        try:
            return list(self._layers_of(number, state)) == list(self.layers.first)
        except ModelError:
            return False

    def _layers_of(self, number: int, state: RunState) -> Mapping[str, Tensor]:
        if number == state.num_merged:
            return self.layers.held
        return self.layers.first if number == 0 else self._versions.layers_of(number)
