"""What each kind of run is made of, as far as both roles know it: its terms, and its words in a forecast."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from torch import nn

from splitfl.config.kind import RunKind
from splitfl.config.trees import RunConfig
from splitfl.models.cut import Cut
from splitfl.protocol.tensors import wire_dtype
from splitfl.session.round_rules import OWN_ROUNDS
from splitfl.session.terms import MAX_PACKED_EXAMPLES, Terms
from splitfl.telemetry.units import counted


class SharedParts(Protocol):
    """What both roles ask of a kind of run."""

    unevaluated: str
    """Why nothing is evaluated, "" where held-out text is."""
    steps_unsaid: str
    """What is not known of the number of a client's steps, "" where it is."""

    def terms_of(self, run: RunConfig, cut: Cut) -> Terms:
        """Return the terms of every session; both sides compute them from the same settings and config."""
        ...

    def merged_layers(self, run: RunConfig, cut: Cut) -> dict[str, nn.Parameter]:
        """Return what trains on the client and is everyone's, in the whole model's order."""
        ...

    def sends_gradients(self, run: RunConfig) -> bool:
        """Tell whether the server sends the gradients of its blocks' input back."""
        ...

    def length_of(self, run: RunConfig) -> str:
        """Say how many steps the run has."""
        ...


class WithSharedRounds:
    """Rounds of all clients, the usual kind."""

    unevaluated = ""
    steps_unsaid = ""

    def terms_of(self, run: RunConfig, cut: Cut) -> Terms:
        return _terms_of_steps(run, cut, merged_layers_of(run, cut))

    def merged_layers(self, run: RunConfig, cut: Cut) -> dict[str, nn.Parameter]:
        return merged_layers_of(run, cut)

    def sends_gradients(self, run: RunConfig) -> bool:
        return run.bottom_trains

    def length_of(self, run: RunConfig) -> str:
        federation = run.federation
        rounds, steps = counted(federation.num_rounds, "round"), counted(federation.local_steps, "step")
        return f"{rounds} of {steps} of each client: {counted(run.total_steps, 'step')}"


class WithOwnRounds:
    """Rounds of each client's own (FedBuff)."""

    unevaluated = ""
    steps_unsaid = ", and how many steps this client comes to depends on its speed"

    def terms_of(self, run: RunConfig, cut: Cut) -> Terms:
        return replace(_terms_of_steps(run, cut, merged_layers_of(run, cut)), rounds=OWN_ROUNDS)

    def merged_layers(self, run: RunConfig, cut: Cut) -> dict[str, nn.Parameter]:
        return merged_layers_of(run, cut)

    def sends_gradients(self, run: RunConfig) -> bool:
        return run.bottom_trains

    def length_of(self, run: RunConfig) -> str:
        federation, size = run.federation, run.strategy.buffer_size
        return (
            f"{counted(federation.num_rounds, 'merge')} of {counted(size, 'upload')} of"
            f" {counted(federation.local_steps, 'step')}, from any clients:"
            f" {counted(run.total_steps * size, 'step')} of all clients together"
        )


class WithOwnLoops:
    """Own-loop clients: their training is their affair, and not known here."""

    unevaluated = "own-loop clients evaluate as their loops are written"
    steps_unsaid = ""

    def terms_of(self, run: RunConfig, cut: Cut) -> Terms:
        return replace(
            _terms_of_steps(run, cut, {}),
            max_packed_examples=MAX_PACKED_EXAMPLES,
            micro_batches=0,
            rows_per_step=0,
            needs_backward=True,
            num_trainable=0,
        )

    def merged_layers(self, run: RunConfig, cut: Cut) -> dict[str, nn.Parameter]:
        return {}

    def sends_gradients(self, run: RunConfig) -> bool:
        return True

    def length_of(self, run: RunConfig) -> str:
        return WithSharedRounds().length_of(run)


_PARTS: Mapping[RunKind, SharedParts] = {
    RunKind.ROUNDS: WithSharedRounds(),
    RunKind.TURNS: WithOwnRounds(),
    RunKind.OWN_LOOPS: WithOwnLoops(),
}


def shared_parts(run: RunConfig) -> SharedParts:
    """Return what both roles know of a run's kind."""
    return _PARTS[run.kind]


def _terms_of_steps(run: RunConfig, cut: Cut, merged: Mapping[str, nn.Parameter]) -> Terms:
    layers, federation = list(merged.values()), run.federation
    return Terms(
        hidden_size=cut.whole.config.get_text_config().hidden_size,
        dtype=wire_dtype(cut.whole.dtype),
        max_seq_length=run.text.max_seq_length,
        max_batch_size=max(federation.per_device_train_batch_size, federation.per_device_eval_batch_size),
        max_in_flight=run.link.max_in_flight,
        max_packed_examples=MAX_PACKED_EXAMPLES if run.text.packing else 0,
        micro_batches=federation.gradient_accumulation_steps,
        rows_per_step=federation.gradient_accumulation_steps * federation.per_device_train_batch_size,
        needs_backward=run.backbone_trains or run.bottom_trains,
        num_trainable=len(cut.trainable("client")),
        layer_shapes=tuple(tuple(layer.shape) for layer in layers),
        layer_dtypes=tuple(wire_dtype(layer.dtype) for layer in layers),
        has_controls=run.has_controls,
        num_rounds=federation.num_rounds,
        local_steps=federation.local_steps,
    )


def merged_layers_of(run: RunConfig, cut: Cut) -> dict[str, nn.Parameter]:
    """Return what trains on the client and `merge.parts` names."""
    in_bottom = set(cut.bottom().parameters())
    return {
        name: parameter
        for name, parameter in cut.trainable("client").items()
        if ("bottom" if parameter in in_bottom else "top") in run.merge.parts
    }
