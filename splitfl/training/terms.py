"""What a run's settings and its cut mean for a session: the bounds that both sides check messages against."""

from torch import nn

from splitfl.config.trees import RunConfig
from splitfl.models.cut import Cut
from splitfl.protocol.tensors import wire_dtype
from splitfl.session.terms import MAX_PACKED_EXAMPLES, Terms


def terms_of(run: RunConfig, cut: Cut) -> Terms:
    """Return the terms of every session of a run; both sides compute them from the same settings and config."""
    layers = list(merged_layers(run, cut).values())
    federation = run.federation
    return Terms(
        hidden_size=cut.whole.config.get_text_config().hidden_size,
        dtype=wire_dtype(cut.whole.dtype),
        max_seq_length=run.text.max_seq_length,
        max_batch_size=max(federation.per_device_train_batch_size, federation.per_device_eval_batch_size),
        max_in_flight=run.link.max_in_flight,
        max_packed_examples=MAX_PACKED_EXAMPLES if run.text.packing or run.has_own_loops else 0,
        micro_batches=0 if run.has_own_loops else federation.gradient_accumulation_steps,
        rows_per_step=0
        if run.has_own_loops
        else federation.gradient_accumulation_steps * federation.per_device_train_batch_size,
        needs_backward=run.has_own_loops or run.backbone_trains or run.bottom_trains,
        num_trainable=0 if run.has_own_loops else len(cut.trainable("client")),
        layer_shapes=tuple(tuple(layer.shape) for layer in layers),
        layer_dtypes=tuple(wire_dtype(layer.dtype) for layer in layers),
        has_controls=run.has_controls,
        is_buffered=run.is_buffered,
        num_rounds=federation.num_rounds,
        local_steps=federation.local_steps,
    )


def merged_layers(run: RunConfig, cut: Cut) -> dict[str, nn.Parameter]:
    """Return what trains on the client and is everyone's by `merge.parts`, in the whole model's order.

    Nothing in loops of the clients' own: what trains there is their affair, and not known here.
    """
    if run.has_own_loops:
        return {}
    in_bottom = set(cut.bottom().parameters())
    return {
        name: parameter
        for name, parameter in cut.trainable("client").items()
        if ("bottom" if parameter in in_bottom else "top") in run.merge.parts
    }
