"""What each kind of run is made of on the server: its gate, its rounds, its sessions, and what is written of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from server_backbone.compute.blocks_worker import Scaling
from server_backbone.compute.gradient_rules import GradientRule, rules_of_own_loops, rules_of_rounds
from server_backbone.deciding.gates import Gate, PatientGate, gate_for
from server_backbone.deciding.rounds import Choose, Endless, Rounds
from server_backbone.deciding.turns import Turns
from server_backbone.merging.buffered import BufferedMerging
from server_backbone.merging.layers import Layers
from server_backbone.merging.merging import Backbones, Merging
from server_backbone.merging.rounds import RoundMerging
from server_backbone.merging.uploads import Uploads
from server_backbone.merging.versions import Versions
from server_backbone.records.entries import Entry, Left, RoundBegan, TurnBegan, TurnEnded
from splitfl.config.kind import BackboneKind, RunKind
from splitfl.config.trees import RunConfig
from splitfl.errors import ModelError
from splitfl.models.cut import Cut
from splitfl.protocol.messages import Commit
from splitfl.session.own_loop import OwnLoopServerSession
from splitfl.session.server_session import ServerSession
from splitfl.session.terms import Terms


class ServerParts(Protocol):
    """What the server asks of a kind of run."""

    begins: type[RoundBegan | TurnBegan]
    """The entry of a round that opens."""
    then_of_lost: str
    """What becomes of a client whose uploaded layers cannot be read after a start."""
    has_merges: bool
    """Whether merges leave what is trained in the run's folder; else saving does."""
    tells_norms: bool
    """Whether a client clips by the norms of the server's gradients, and is told them with each micro-batch."""

    def gate(self, run: RunConfig) -> Gate:
        """Return what decides when a step begins and is applied."""
        ...

    def rounds(self, run: RunConfig, choose: Choose, now_s: float) -> Rounds:
        """Return what decides when rounds open and close; `choose` picks who trains in one that all share."""
        ...

    def merging(self, run: RunConfig, layers: Layers, uploads: Uploads, backbones: Backbones, run_dir: Path) -> Merging:
        """Return what makes uploads everyone's layers."""
        ...

    def session(self, terms: Terms) -> ServerSession:
        """Return a new client's session."""
        ...

    def gone(self, client_id: str) -> Entry:
        """Return what is written of a client that leaves its open round."""
        ...

    def holds_layers(self, num_merged: int) -> bool:
        """Tell whether a client may come back for layers after so many merges."""
        ...

    def keeps_copies(self, run: RunConfig) -> bool:
        """Tell whether clients' copies of the backbone stay for good, since no merge ever ends them."""
        ...

    def scaling(self, run: RunConfig, commit: Commit) -> Scaling | None:
        """Return what a client says of its step's size; None where the run's schedule and clipping say it."""
        ...

    def loss_told(self, commit: Commit) -> float | None:
        """Return the loss of a step as it may be told on; None where a client keeps it to itself."""
        ...

    def gradient_rules(self, run: RunConfig, cut: Cut) -> Sequence[GradientRule]:
        """Return what becomes of a step's gradients, in order."""
        ...

    def checked(self, terms: Terms, check_packing: Callable[[], None]) -> Terms:
        """Return the terms where packed rows have been tried; raise `ModelError` where the run needs them in vain."""
        ...


class _WithRounds:
    """What all runs with rounds and merges have."""

    has_merges = True
    tells_norms = False

    def gate(self, run: RunConfig) -> Gate:
        federation = run.federation
        return gate_for(federation.server_mode, federation.step_timeout, federation.max_missed_steps)

    def session(self, terms: Terms) -> ServerSession:
        return ServerSession(terms)

    def keeps_copies(self, run: RunConfig) -> bool:
        return False

    def scaling(self, run: RunConfig, commit: Commit) -> Scaling | None:
        return None

    def loss_told(self, commit: Commit) -> float | None:
        return commit.loss

    def gradient_rules(self, run: RunConfig, cut: Cut) -> Sequence[GradientRule]:
        return rules_of_rounds(run, cut)

    def checked(self, terms: Terms, check_packing: Callable[[], None]) -> Terms:
        if terms.max_packed_examples:
            check_packing()
        return terms


class WithSharedRounds(_WithRounds):
    """Rounds of all clients."""

    begins: type[RoundBegan | TurnBegan] = RoundBegan
    then_of_lost = "it is asked for them again"

    def rounds(self, run: RunConfig, choose: Choose, now_s: float) -> Rounds:
        return Rounds(run.federation, choose, now_s)

    def merging(self, run: RunConfig, layers: Layers, uploads: Uploads, backbones: Backbones, run_dir: Path) -> Merging:
        return RoundMerging(layers, uploads, backbones, takes_partial=run.federation.partial_work == "accept")

    def gone(self, client_id: str) -> Entry:
        return Left(client_id=client_id)

    def holds_layers(self, num_merged: int) -> bool:
        return num_merged > 0


class WithOwnRounds(_WithRounds):
    """Rounds of each client's own, and merges as uploads come in (FedBuff)."""

    begins: type[RoundBegan | TurnBegan] = TurnBegan
    then_of_lost = "they are in no merge"

    def rounds(self, run: RunConfig, choose: Choose, now_s: float) -> Rounds:
        return Turns(run.federation, run.strategy.buffer_size, now_s)

    def merging(self, run: RunConfig, layers: Layers, uploads: Uploads, backbones: Backbones, run_dir: Path) -> Merging:
        return BufferedMerging(layers, uploads, Versions(run_dir), max_staleness=run.strategy.max_staleness)

    def gone(self, client_id: str) -> Entry:
        return TurnEnded(client_id=client_id)

    def holds_layers(self, num_merged: int) -> bool:
        return True  # a client comes back for the first ones too: it uploads before there is a merge


class WithOwnLoops:
    """Loops of the clients' own: steps without rounds and merges."""

    begins: type[RoundBegan | TurnBegan] = RoundBegan
    then_of_lost = ""
    has_merges = False
    tells_norms = True

    def gate(self, run: RunConfig) -> Gate:
        federation = run.federation
        gate = gate_for(
            federation.server_mode, federation.step_timeout, federation.max_missed_steps, in_turn=PatientGate
        )
        gate.round_opened((), first_step=1)  # and never closed
        return gate

    def rounds(self, run: RunConfig, choose: Choose, now_s: float) -> Rounds:
        return Endless(run.federation, choose, now_s)

    def session(self, terms: Terms) -> ServerSession:
        return OwnLoopServerSession(terms)

    def merging(self, run: RunConfig, layers: Layers, uploads: Uploads, backbones: Backbones, run_dir: Path) -> Merging:
        return RoundMerging(layers, uploads, backbones, takes_partial=False)  # and nothing is ever merged

    def gone(self, client_id: str) -> Entry:
        return Left(client_id=client_id)

    def holds_layers(self, num_merged: int) -> bool:
        return False

    def keeps_copies(self, run: RunConfig) -> bool:
        return run.backbone_kind is BackboneKind.COPIES

    def scaling(self, run: RunConfig, commit: Commit) -> Scaling | None:
        learning_rate = run.optimizer.backbone_lr or commit.learning_rate
        return Scaling(learning_rate=learning_rate, clip_coefficient=commit.clip_coefficient)

    def loss_told(self, commit: Commit) -> float | None:
        return None

    def gradient_rules(self, run: RunConfig, cut: Cut) -> Sequence[GradientRule]:
        return rules_of_own_loops(run)

    def checked(self, terms: Terms, check_packing: Callable[[], None]) -> Terms:
        """Return the terms without packed rows where they fail the trial: the client's loop is told in the welcome."""
        try:
            check_packing()
        except ModelError:
            return replace(terms, max_packed_examples=0)
        return terms


_PARTS: Mapping[RunKind, ServerParts] = {
    RunKind.ROUNDS: WithSharedRounds(),
    RunKind.TURNS: WithOwnRounds(),
    RunKind.OWN_LOOPS: WithOwnLoops(),
}


def server_parts(run: RunConfig) -> ServerParts:
    """Return what a run's kind is made of here; asked once, when the server is put together."""
    return _PARTS[run.kind]
