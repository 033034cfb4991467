"""What a run will cost, by formula: bytes on the wire, steps, and memory for weights and their training.

Nothing here is a guess: what no formula gives (seconds, and what autograd keeps of a micro-batch) is not in it.
"""

from dataclasses import dataclass

from splitfl.config.identity import OptimizerSection
from splitfl.config.trees import RunConfig
from splitfl.models.cut import Cut, Side
from splitfl.protocol.messages import wire_bytes
from splitfl.protocol.roles import Role
from splitfl.session.terms import Terms
from splitfl.telemetry.findings import Finding
from splitfl.telemetry.measures import MEASURES
from splitfl.telemetry.units import counted, format_bytes
from splitfl.training.kinds import shared_parts

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
    """The layers of one client up, and everyone's down, with their controls if there are any."""
    round: int

    @classmethod
    def of(cls, run: RunConfig, terms: Terms) -> "Traffic":
        """Count activations up and down, and gradients where something learns from them: 4, 3 or 2 crossings."""
        federation = run.federation
        shape = (terms.max_seq_length, terms.hidden_size)
        row, gradient_row = (wire_bytes(terms.wire_types[role], shape) for role in (Role.HIDDEN, Role.GRADIENT))
        rows = federation.per_device_train_batch_size
        up = rows * (row + gradient_row * terms.needs_backward)
        down = rows * (row + gradient_row * (terms.needs_backward and run.bottom_trains))
        step = federation.gradient_accumulation_steps * (up + down)
        merge = terms.layers_bytes + terms.merged_bytes
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
    trainable_bytes: int
    training_bytes: int
    """Gradients and optimizer state of what trains."""

    @property
    def copy_bytes(self) -> int:
        """What a client's own copy of what trains takes: weights, gradients and optimizer state."""
        return self.trainable_bytes + self.training_bytes

    @classmethod
    def of(cls, cut: Cut, side: Side, optimizer: OptimizerSection) -> "Part":
        """Count an empty or filled model's tensors."""
        held = [tensor for _, tensor in cut.tensors_of(side).values()]
        trainable = list(cut.trainable(side).values())
        trainable_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trainable)
        return cls(
            parameters=sum(tensor.numel() for tensor in held),
            trainable=sum(parameter.numel() for parameter in trainable),
            weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in held),
            trainable_bytes=trainable_bytes,
            training_bytes=trainable_bytes * (1 + _MOMENTS[optimizer.optim]),
        )


def steps_of(run: RunConfig) -> Finding:
    """Say how many steps the run has."""
    federation = run.federation
    rows = federation.per_device_train_batch_size * federation.gradient_accumulation_steps
    what = (
        counted(rows, "row of packed examples", "rows of packed examples")
        if run.text.packing
        else counted(rows, "example")
    )
    return Finding(
        topic="steps",
        sentences=(
            f"{shared_parts(run).length_of(run)}, each from {what} in"
            f" {counted(federation.gradient_accumulation_steps, 'micro-batch', 'micro-batches')}.",
        ),
        numbers={
            "rounds": federation.num_rounds,
            "steps": run.total_steps,
            "rows_per_step" if run.text.packing else "examples_per_step": rows,
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationWork:
    """What one evaluation of one client takes."""

    examples: int
    """Held-out examples that are run forward with their labels."""
    classified: int = 0
    labels: int = 0
    answered: int = 0
    """Prompts that are answered by generating."""


def evaluations_of(run: RunConfig, work: EvaluationWork | None = None) -> Finding:
    """Say what is measured and how often; and, where a client's text is known, what that takes."""
    federation, asked = run.federation, run.evaluation
    has_no_text = work is not None and not work.examples
    if said := shared_parts(run).unevaluated or ("no text is held out" if has_no_text else ""):
        return Finding(topic="evaluation", sentences=(f"Nothing is evaluated: {said}.",), numbers={"evaluations": 0})
    # before and after; between them every round's, the last one's only where it is compared
    between = federation.num_rounds - 1 + federation.compares_rounds if federation.evaluate == "rounds" else 0
    times = 2 + between
    names = ["eval_loss", "perplexity", "token_accuracy", *asked.measures]
    when = "before, after every round, and after" if between else "before and after"
    sentences = [
        f"Each client with held-out text is evaluated {when} the run, {times} times:"
        f" {', '.join(MEASURES[name].title for name in names)}."
    ]
    numbers: dict[str, object] = {"evaluations": times, "measures": names}
    if work is not None:
        said, more = _work_of(run, work)
        sentences.append(said)
        numbers |= more
    elif asked.generates:
        limit = f"at most {counted(asked.num_examples, 'prompt')}" if asked.num_examples else "every held-out prompt"
        sentences.append(
            f"Each time {limit} are answered with up to {counted(asked.max_new_tokens, 'token')}, a round trip for"
            " each token of a"
            f" batch of up to {counted(federation.per_device_eval_batch_size, 'prompt')}."
        )
    if federation.compares_rounds:
        sentences.append(_comparison(run))
    return Finding(topic="evaluation", sentences=tuple(sentences), numbers=numbers)


def _work_of(run: RunConfig, work: EvaluationWork) -> tuple[str, dict[str, object]]:
    rows = run.federation.per_device_eval_batch_size
    candidates = work.classified * work.labels
    forward = -(-work.examples // rows) + -(-candidates // rows)
    answers = -(-work.answered // rows)
    tokens = work.answered * run.evaluation.max_new_tokens
    said = f"Each takes {counted(forward, 'forward pass', 'forward passes')} of up to {counted(rows, 'row')}"
    if candidates:
        said += f", among them {counted(work.classified, 'prompt')} with each of {work.labels} label words"
    if work.answered:
        said += (
            f", and at most {counted(tokens, 'generated token')}: {counted(work.answered, 'prompt')} in about"
            f" {counted(answers, 'batch', 'batches')}, up to"
            f" {counted(answers * run.evaluation.max_new_tokens, 'round trip')}"
        )
    return f"{said}.", {"forward_passes": forward, "generated_tokens": tokens, "classified": work.classified}


def _comparison(run: RunConfig) -> str:
    federation = run.federation
    said = f"Rounds are compared by the {MEASURES[federation.metric_for_best_model].title} over all clients' text"
    if federation.early_stopping_patience:
        said += f"; the run ends after {federation.early_stopping_patience} in a row without improvement"
    if federation.load_best_model_at_end:
        said += "; clients, backbone and exported model end with the best round's"
    return f"{said}."


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


# The attacks' results (docs/privacy.md). Every page about what a server can read shows this text, and no kinder one.
READABLE = (
    "A server that wants to can read the text and its labels from these, at every cut (docs/privacy.md). Measured on"
    " SmolLM2-135M on 2026-11-30: 100 % of the tokens, with 1, 2, 4 and 8 blocks below the first cut."
)


def sight_of(run: RunConfig) -> Finding:
    """Say what the server will see of a client's text."""
    learns = run.backbone_trains or run.bottom_trains
    seen = ["activations of every position, of held-out text too"]
    seen += ["gradients"] * learns
    seen += ["lengths of rows and of each example in them" if run.text.packing else "lengths of rows"]
    seen += ["counts of examples and tokens", "losses and other measures"]
    seen += ["the layers of every merge"]
    if run.evaluation.generates:
        seen += ["activations and lengths of the answers to held-out prompts"]
    sentences = [f"The server sees {'; '.join(seen)}. Token ids, labels and text are not sent.", READABLE]
    if run.train.embeddings:
        sentences.append("The embeddings train: rows that a merge changes tell which tokens were used.")
    return Finding(topic="sight", sentences=tuple(sentences))
