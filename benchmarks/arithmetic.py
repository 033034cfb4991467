"""Bytes and memory of the arms by formula: for models that this machine cannot train, and to check what was
measured.

Every formula is a function of a model's shape; `tests/benchmarks/test_arithmetic.py` holds each against the real
thing. All sizes are bytes, all values float32 unless a function says otherwise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Learns: TypeAlias = Literal["lora", "full"]
Side: TypeAlias = Literal["client", "whole"]

_F32 = 4
_ADAM = 3
"""A gradient and two moments for each value that trains."""
_PLAIN_LOGITS = 3
"""Copies of a micro-batch's logits that the plain loss holds at its peak: them, their log-softmax, a gradient."""
_HIDDEN_STATES = 4
"""A micro-batch's activations and gradients on the wire, up and down."""
_CLIENT_BLOCKS = 2
"""One at each end."""
_IN_FLIGHT = 2
"""Micro-batches of a split client under way at once (`link.max_in_flight`)."""
_TEXT = 60_000_000
"""SmolLM2's tokenizer (40 MB) and some thousand examples, measured; in the checks only."""
_HEAP_GAPS = 0.6
"""What glibc's heap leaves unused between a graph's tensors, for each byte of them: measured on 30 blocks
(docs/experiments.md); in the checks only."""
_MERGE_COPIES = 2
"""Of what trains on it, a split client holds what it uploads, or what has come back, and that once more on its way."""
_FLOWER_COPIES = 2
"""Of everything that is exchanged, a Flower client holds what it was sent and what it sends while it holds the
model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a Llama, Qwen2 or GPT-2."""

    family: str
    hidden_size: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    num_positions: int
    """Learned position embeddings; 0 where positions are rotary."""
    is_tied: bool

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Read a transformers config."""
        is_gpt2 = config.model_type == "gpt2"
        num_heads = config.num_attention_heads
        return cls(
            family=config.model_type,
            hidden_size=config.hidden_size,
            num_blocks=config.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads if is_gpt2 else config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            intermediate_size=4 * config.hidden_size if is_gpt2 else config.intermediate_size,
            vocab_size=config.vocab_size,
            num_positions=config.max_position_embeddings if is_gpt2 else 0,
            is_tied=config.tie_word_embeddings,
        )


GPT2 = Shape(
    family="gpt2",
    hidden_size=768,
    num_blocks=12,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    intermediate_size=3072,
    vocab_size=50257,
    num_positions=1024,
    is_tied=True,
)
QWEN2_HALF_B = Shape(
    family="qwen2",
    hidden_size=896,
    num_blocks=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=4864,
    vocab_size=151936,
    num_positions=0,
    is_tied=True,
)
LLAMA2_7B = Shape(
    family="llama",
    hidden_size=4096,
    num_blocks=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=11008,
    vocab_size=32000,
    num_positions=0,
    is_tied=False,
)
LARGER = {"GPT-2 124M": GPT2, "Qwen2.5-0.5B": QWEN2_HALF_B, "Llama-2-7B": LLAMA2_7B}

_GATED_TARGETS = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
_GPT2_TARGETS = ("c_attn",)


def block_parameters(shape: Shape) -> int:
    """Count one block's parameters."""
    d, heads, kv_heads = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    if shape.family == "gpt2":
        return 12 * d * d + 13 * d
    biases = heads + 2 * kv_heads if shape.family == "qwen2" else 0
    return 2 * d * heads + 2 * d * kv_heads + biases + 3 * d * shape.intermediate_size + 2 * d


def end_parameters(shape: Shape) -> int:
    """Count what is outside the blocks: embeddings, final norm, and a head that is not tied."""
    d = shape.hidden_size
    tables = shape.vocab_size * (1 if shape.is_tied else 2) + shape.num_positions
    return tables * d + (2 * d if shape.family == "gpt2" else d)


def num_parameters(shape: Shape) -> int:
    """Count all parameters."""
    return shape.num_blocks * block_parameters(shape) + end_parameters(shape)


def client_parameters(shape: Shape, client_blocks: int = _CLIENT_BLOCKS) -> int:
    """Count what a split client holds: the ends and its blocks."""
    return end_parameters(shape) + client_blocks * block_parameters(shape)


def lora_parameters(shape: Shape, *, r: int = 8, num_blocks: int | None = None) -> int:
    """Count the adapters of these blocks, of all if none are named; their targets are the comparison's."""
    d, ff = shape.hidden_size, shape.intermediate_size
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    gated = [(d, heads), (d, kv_heads), (d, ff), (d, ff), (ff, d)]
    sides = [(d, 3 * d)] if shape.family == "gpt2" else gated
    blocks = shape.num_blocks if num_blocks is None else num_blocks
    return blocks * sum(r * (rows + columns) for rows, columns in sides)


def trained_parameters(shape: Shape, learns: Learns, side: Side, *, client_blocks: int = _CLIENT_BLOCKS) -> int:
    """Count what trains in the whole model, or on a split client."""
    if learns == "lora":
        return lora_parameters(shape, num_blocks=client_blocks if side == "client" else None)
    return client_parameters(shape, client_blocks) if side == "client" else num_parameters(shape)


def merge_bytes(shape: Shape, learns: Learns, side: Side, *, value_bytes: int = _F32) -> int:
    """Count what a client sends and receives for one round's merge: all that trains on it, up and down."""
    return 2 * value_bytes * trained_parameters(shape, learns, side)


def step_bytes(shape: Shape, num_positions: float, *, value_bytes: int = _F32, crossings: int = 4) -> float:
    """Count what a split step sends and receives for rows of `num_positions` in all, padding included.

    4 crossings: activations up and down, gradients up and down; 3 where nothing below the first cut trains.
    """
    return crossings * num_positions * shape.hidden_size * value_bytes


def fl_round_bytes(shape: Shape, learns: Learns, *, value_bytes: int = _F32) -> int:
    """Count a federated client's round: what trains comes down and goes up."""
    return merge_bytes(shape, learns, "whole", value_bytes=value_bytes)


def split_round_bytes(
    shape: Shape, learns: Learns, *, num_positions: int, num_steps: int, value_bytes: int = _F32
) -> float:
    """Count a split client's round: its steps, and the merge of its layers."""
    steps = num_steps * step_bytes(shape, num_positions, value_bytes=value_bytes)
    return steps + merge_bytes(shape, learns, "client", value_bytes=value_bytes)


def kept_values(shape: Shape, learns: Learns, *, r: int = 8) -> int:
    """Count the values that autograd keeps of one position in one block, with torch's fused attention."""
    d, ff = shape.hidden_size, shape.intermediate_size
    if shape.family == "gpt2":
        return (23 * d if learns == "lora" else 28 * d) + shape.num_heads + 4
    heads = shape.num_heads * shape.head_dim  # queries, and keys and values once repeated, and what attention gives
    of_width = 4 * d if learns == "lora" else 6 * d
    adapters = len(_GATED_TARGETS) * r if learns == "lora" else 0
    return of_width + 4 * heads + 4 * ff + shape.num_heads + 2 + adapters


def activation_bytes(shape: Shape, learns: Learns, *, num_positions: int, num_blocks: int) -> int:
    """Count what a micro-batch's graph holds in these blocks."""
    return _F32 * num_positions * num_blocks * kept_values(shape, learns)


def split_client_memory(
    shape: Shape, learns: Learns, *, num_positions: int, client_blocks: int = _CLIENT_BLOCKS, value_bytes: int = _F32
) -> int:
    """Count a split client's memory above imports: its layers, their training, and the micro-batches under way.

    `num_positions` is of one micro-batch. The chunked loss's buffer is a chunk of 128 rows of logits.
    """
    weights = value_bytes * client_parameters(shape, client_blocks)
    training = _F32 * _ADAM * trained_parameters(shape, learns, "client", client_blocks=client_blocks)
    kept = activation_bytes(shape, learns, num_positions=num_positions, num_blocks=client_blocks)
    hidden = _HIDDEN_STATES * num_positions * shape.hidden_size * _F32
    chunk = min(num_positions, 128) * shape.vocab_size * _F32
    copies = _MERGE_COPIES * _F32 * trained_parameters(shape, learns, "client", client_blocks=client_blocks)
    # the head's gradient of a second micro-batch is made whole before it is added to the first's
    second_head = shape.vocab_size * shape.hidden_size * _F32 if learns == "full" else 0
    return weights + training + _IN_FLIGHT * (kept + hidden) + chunk + copies + second_head


def whole_client_memory(shape: Shape, learns: Learns, *, num_positions: int, value_bytes: int = _F32) -> int:
    """Count the memory of a client that trains the whole model, above imports, with the plain loss."""
    weights = value_bytes * num_parameters(shape)
    training = _F32 * _ADAM * trained_parameters(shape, learns, "whole")
    kept = activation_bytes(shape, learns, num_positions=num_positions, num_blocks=shape.num_blocks)
    logits = _PLAIN_LOGITS * num_positions * shape.vocab_size * _F32
    # the graph's blocks are freed while the weights' gradients come, so the larger of the two counts with full weights
    return weights + training + kept + logits


def flower_client_memory(shape: Shape, learns: Learns, *, num_positions: int) -> int:
    """Count a Flower client's process: the whole model in training, and what it was sent and sends."""
    exchanged = _F32 * trained_parameters(shape, learns, "whole")
    return whole_client_memory(shape, learns, num_positions=num_positions) + _FLOWER_COPIES * exchanged


_ROUND_STEPS, _BATCH, _LENGTH = 10, 8, 256


def table() -> list[list[str]]:
    """Return bytes and memory of the larger models; `WORDS` says for which rounds."""
    header = ["model", "table", "FL round", "split round", "split / FL", "FL client", "split client", "split / FL"]
    rows = [header]
    positions = _BATCH * _LENGTH
    for name, shape in LARGER.items():
        for learns in ("lora", "full"):
            fl = fl_round_bytes(shape, learns)
            split = split_round_bytes(shape, learns, num_positions=positions, num_steps=_ROUND_STEPS)
            whole = whole_client_memory(shape, learns, num_positions=positions // 2)
            client = split_client_memory(shape, learns, num_positions=positions // 2)
            traffic = [_gigabytes(fl), _gigabytes(split), f"{split / fl:.2f}x"]
            rows.append([name, learns, *traffic, _gigabytes(whole), _gigabytes(client), f"{client / whole:.2f}x"])
    return rows


WORDS = f"""Rounds of {_ROUND_STEPS} steps of {_BATCH} rows of {_LENGTH} tokens in two micro-batches, float32 (halve
the bytes on the wire for bfloat16), AdamW, one block at each end on a split client, adapters of rank 8. Memory is
of the process that trains, above imports, without what a particular federated framework adds and without the gaps
that a heap leaves between tensors (0.6 of the activations where it was measured). The formulas are in
`benchmarks/arithmetic.py`."""


WITHIN = {"bytes": 0.05, "memory": 0.3}
"""How far a measured figure may be from its formula."""


def checks(cells: Sequence[Mapping[str, Any]], shape_values: Mapping[str, Any]) -> list[list[str]]:
    """Hold the formulas against measured cells: rows of quantity, formula, measured, and measured over formula."""
    shape = Shape(**shape_values)
    rows = [["quantity", "formula", "measured", "measured / formula"]]
    for found in cells:
        cell, clients = found["cell"], list(found.get("clients", {}).values())
        if found["study"] == "arms" and cell["arm"] in ("split-shared", "flower"):
            traffic, memory = _predicted(shape, cell, found["notes"])
            name = f"{cell['arm']} ({cell['table']}), seed {cell['seed']}"
            measured = sum(use["bytes_up"] + use["bytes_down"] for use in clients) / len(clients)
            peak = max(use["peak_rss_above_imports"] for use in clients)
            rows.append([f"bytes of a client, {name}", *_compared(traffic, measured)])
            rows.append([f"memory of a client, {name}", *_compared(memory, peak)])
    return rows


def _predicted(shape: Shape, cell: Mapping[str, Any], notes: Mapping[str, Any]) -> tuple[float, float]:
    """Return a client's bytes in the whole run, and the memory of the one with the largest micro-batch."""
    learns, num_rounds, largest = cell["table"], cell["budget"]["num_rounds"], notes["positions_at_most"]
    if cell["arm"] == "flower":
        traffic: float = num_rounds * fl_round_bytes(shape, learns)
        memory = flower_client_memory(shape, learns, num_positions=largest)
        graphs = activation_bytes(shape, learns, num_positions=largest, num_blocks=shape.num_blocks)
    else:
        traffic = step_bytes(shape, notes["positions_per_client"]) + num_rounds * merge_bytes(shape, learns, "client")
        memory = split_client_memory(shape, learns, num_positions=largest)
        graphs = _IN_FLIGHT * activation_bytes(shape, learns, num_positions=largest, num_blocks=_CLIENT_BLOCKS)
    return traffic, _TEXT + memory + _HEAP_GAPS * graphs


def _compared(formula: float, measured: float) -> list[str]:
    return [f"{formula / 1e6:,.1f} MB", f"{measured / 1e6:,.1f} MB", f"{measured / formula:.3f}"]


def _gigabytes(value: float) -> str:
    digits = max(0, 2 - int(math.log10(max(value / 1e9, 1e-3)))) if value < 1e9 else 1
    return f"{value / 1e9:,.{min(digits, 3)}f} GB"
