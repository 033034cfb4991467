"""What a run will cost, by formula: bytes on the wire, steps, and memory for weights and their training.

Nothing here is a guess: what no formula gives (seconds, and what autograd keeps of a micro-batch) is not in it.
"""

from dataclasses import dataclass

from splitfl.config import OptimizerSection, RunConfig
from splitfl.models.cut import Cut, Side
from splitfl.session.terms import Terms
from splitfl.telemetry.findings import Finding
from splitfl.telemetry.units import format_bytes

# Tensors like its gradient that an optimizer keeps for each one that trains.
_MOMENTS = {"adamw_torch": 2, "sgd": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Most bytes of tensors between one client and the server: micro-batches full of rows of `max_seq_length`.

    Headers, norms and heartbeats come on top, some hundred bytes each.
    """

    micro_batch_up: int
    micro_batch_down: int
    eval_batch: int
    """Both ways; an evaluation has no gradients."""
    step: int
    merge: int
    """The layers of one client, up and down."""
    round: int

    @classmethod
    def of(cls, run: RunConfig, terms: Terms) -> "Traffic":
        """Count activations up and down, and gradients where something learns from them: 4, 3 or 2 crossings."""
        federation = run.federation
        row = terms.max_seq_length * terms.hidden_size * terms.element_bytes
        micro_batch = federation.per_device_train_batch_size * row
        up = micro_batch * (1 + terms.needs_backward)
        down = micro_batch * (1 + (terms.needs_backward and run.bottom_trains))
        step = federation.gradient_accumulation_steps * (up + down)
        merge = 2 * terms.layers_bytes
        return cls(
            micro_batch_up=up,
            micro_batch_down=down,
            eval_batch=2 * federation.per_device_eval_batch_size * row,
            step=step,
            merge=merge,
            round=federation.local_steps * step + merge,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One side's share of the model, in elements and bytes."""

    parameters: int
    trainable: int
    weight_bytes: int
    training_bytes: int
    """Gradients and optimizer state of what trains."""

    @classmethod
    def of(cls, cut: Cut, side: Side, optimizer: OptimizerSection) -> "Part":
        """Count an empty or filled model's tensors."""
        held = [tensor for _, tensor in cut.tensors_of(side).values()]
        trainable = list(cut.trainable(side).values())
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in trainable)
        return cls(
            parameters=sum(tensor.numel() for tensor in held),
            trainable=sum(parameter.numel() for parameter in trainable),
            weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in held),
            training_bytes=gradients * (1 + _MOMENTS[optimizer.optim]),
        )


def steps_of(run: RunConfig) -> Finding:
    """Say how many steps the run has."""
    federation = run.federation
    rows = federation.per_device_train_batch_size * federation.gradient_accumulation_steps
    what = "rows of packed examples" if run.text.packing else "examples"
    return Finding(
        topic="steps",
        sentences=(
            f"{federation.num_rounds} rounds of {federation.local_steps} steps of each client: {run.total_steps} steps,"
            f" each from {rows} {what} in {federation.gradient_accumulation_steps} micro-batches.",
        ),
        numbers={
            "rounds": federation.num_rounds,
            "steps": run.total_steps,
            "rows_per_step" if run.text.packing else "examples_per_step": rows,
        },
    )


def wire_of(run: RunConfig, terms: Terms) -> Finding:
    """Say what one client and the server send each other."""
    traffic = Traffic.of(run, terms)
    step_up = traffic.micro_batch_up * terms.micro_batches
    step_down = traffic.micro_batch_down * terms.micro_batches
    return Finding(
        topic="wire",
        sentences=(
            f"At most {format_bytes(step_up)} up and {format_bytes(step_down)} down in a client's step, with rows of"
            f" max_seq_length = {terms.max_seq_length} tokens; shorter rows take less.",
            f"At most {format_bytes(traffic.round)} in a client's round, {format_bytes(traffic.merge)} of it for the"
            f" merge; {format_bytes(traffic.eval_batch)} for a batch of an evaluation.",
        ),
        numbers={
            "bytes_up_per_step": step_up,
            "bytes_down_per_step": step_down,
            "bytes_per_merge": traffic.merge,
            "bytes_per_round": traffic.round,
            "bytes_per_eval_batch": traffic.eval_batch,
        },
    )


def memory_of(part: Part, whose: str, *, topic: str) -> Finding:
    """Say what one side's share of the model takes."""
    return Finding(
        topic=topic,
        sentences=(
            f"{whose} {part.parameters:,} parameters, of which {part.trainable:,} train:"
            f" {format_bytes(part.weight_bytes)} of weights, {format_bytes(part.training_bytes)} of gradients and"
            " optimizer state. What a micro-batch's activations take comes on top; no formula gives it.",
        ),
        numbers={
            "parameters": part.parameters,
            "trainable": part.trainable,
            "weight_bytes": part.weight_bytes,
            "training_bytes": part.training_bytes,
        },
    )


def sight_of(run: RunConfig) -> Finding:
    """Say what the server will see of a client's text."""
    learns = run.backbone_trains or run.bottom_trains
    seen = ["activations of every position, of held-out text too"]
    seen += ["gradients"] * learns
    seen += ["lengths of rows and of each example in them" if run.text.packing else "lengths of rows"]
    seen += ["counts of examples and tokens", "losses", "the layers of every merge"]
    sentences = [
        f"The server sees {'; '.join(seen)}. Token ids, labels and text are not sent.",
        "From activations text can often be worked out, the more the fewer blocks are below the first cut"
        f" (model.bottom_layers = {run.model.bottom_layers}): docs/privacy.md has what attacks recovered.",
    ]
    if run.model.bottom_layers == 0:
        sentences.append("With no block below the first cut, every token can be looked up from its activation.")
    if run.model.top_layers == 0 and learns:
        sentences.append("With no block above the last cut, the labels can be computed from the gradients.")
    if run.train.embeddings:
        sentences.append("The embeddings train: rows that a merge changes tell which tokens were used.")
    return Finding(topic="sight", sentences=tuple(sentences))
