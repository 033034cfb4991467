"""What a server and one client agreed on, and the checks that follow from it for a tensor's frames."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import TensorFrames, wire_bytes
from splitfl.protocol.roles import Role
from splitfl.session.round_rules import SHARED_ROUNDS, RoundRules

# Examples that the rows of one micro-batch may be packed from: their lengths have to fit into a header.
MAX_PACKED_EXAMPLES = 1 << 14

_AT_A_CUT = (Role.HIDDEN, Role.NEW_POSITIONS, Role.GRADIENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The bounds of one session."""

    hidden_size: int
    dtype: str
    """Wire name of the activations' type."""
    max_seq_length: int
    max_batch_size: int
    max_in_flight: int
    max_packed_examples: int
    """Examples that the rows of one micro-batch may be packed from; 0 where each row is one example."""
    micro_batches: int
    """Micro-batches in a step; 0 with own-loop clients, whose steps have any number."""
    needs_backward: bool
    """Whether the backbone learns or anything below it does, so that gradients are sent."""
    num_trainable: int
    """Client-side tensors that train."""
    layer_shapes: tuple[tuple[int, ...], ...]
    """Shapes of the merged ones, in the model's order."""
    layer_dtypes: tuple[str, ...]
    has_controls: bool
    """Whether a control variate (f32) for each of them comes after them when the server sends them."""
    num_rounds: int
    """Merges of the run; 0 with own-loop clients."""
    local_steps: int
    """Steps of a client in a round."""
    rows_per_step: int = 0
    """Rows of one step, and so its micro-batches at most, of a row each; 0 where no number is agreed on."""
    rounds: RoundRules = SHARED_ROUNDS
    """Where a client's rounds begin and end."""

    @property
    def wire_types(self) -> Mapping[Role, str]:
        """The wire type of each role's tensors; each layer has its own (`layer_dtypes`)."""
        return {
            Role.HIDDEN: self.dtype,
            Role.NEW_POSITIONS: self.dtype,
            Role.GRADIENT: self.dtype,
            Role.NORMS: "f32",
            Role.CONTROL: "f32",
        }

    @property
    def activation_bytes(self) -> int:
        """Bytes of the largest micro-batch's activations, or of their gradients if those are more."""
        shape = (self.max_batch_size, self.max_seq_length, self.hidden_size)
        return max(wire_bytes(self.wire_types[role], shape) for role in _AT_A_CUT)

    @property
    def max_new_positions(self) -> int:
        """Rows times positions that one `Decode` may bring."""
        return self.max_batch_size * self.max_seq_length

    @property
    def layers_bytes(self) -> int:
        """Bytes of all client-side tensors that are merged."""
        return sum(wire_bytes(dtype, shape) for shape, dtype in zip(self.layer_shapes, self.layer_dtypes, strict=True))

    @property
    def merged_bytes(self) -> int:
        """Bytes of what the server sends after a merge: the layers, and the controls where there are any."""
        return sum(self.merged_sizes)

    @property
    def merged_sizes(self) -> list[int]:
        """Bytes of each tensor of what the server sends after a merge."""
        controls = (self.wire_types[Role.CONTROL],) * len(self.layer_shapes) if self.has_controls else ()
        dtypes = self.layer_dtypes + controls
        shapes = self.layer_shapes * (2 if self.has_controls else 1)
        return [wire_bytes(dtype, shape) for shape, dtype in zip(shapes, dtypes, strict=True)]

    def check_activations(self, tensor: TensorFrames, lengths_B: Sequence[int]) -> None:
        """Raise unless the tensor is activations BSD within the bounds, with a length for each row."""
        self._check_hidden(Role.HIDDEN, tensor)
        batch, length, _ = tensor.shape
        if not 1 <= batch <= self.max_batch_size:
            raise RemoteProtocolError(f"a batch of {batch} rows, where one of this run has 1 to {self.max_batch_size}")
        if not 1 <= length <= self.max_seq_length:
            raise RemoteProtocolError(
                f"rows of {length} tokens, where max_seq_length = {self.max_seq_length} and 1 is the least"
            )
        if len(lengths_B) != batch or any(not 1 <= row <= length for row in lengths_B):
            raise RemoteProtocolError(f"lengths_B must give each of {batch} rows a length from 1 to {length}")

    def check_packing(self, example_lengths: Sequence[int], lengths_B: Sequence[int]) -> None:
        """Raise unless rows may be packed, and these lengths of examples, row after row, make up the rows'."""
        if not self.max_packed_examples:
            raise RemoteProtocolError("rows packed from several examples, which this run does not take")
        if len(example_lengths) > self.max_packed_examples:
            raise RemoteProtocolError(
                f"rows packed from {len(example_lengths)} examples, where {self.max_packed_examples} is the most"
            )
        ends = set(accumulate(example_lengths))
        if min(example_lengths) < 1 or not ends.issuperset(accumulate(lengths_B)) or max(ends) != sum(lengths_B):
            raise RemoteProtocolError(
                "example_lengths must give each example at least one token, and a row's must add up to its"
                " length in lengths_B"
            )

    def check_new_positions(self, tensor: TensorFrames, lengths_B: Sequence[int]) -> None:
        """Raise unless the tensor is activations BSD of a generation, no larger than the largest micro-batch's.

        A row may have no token yet: a long prompt comes in several pieces, padded on the left.
        """
        self._check_hidden(Role.NEW_POSITIONS, tensor)
        batch, length, _ = tensor.shape
        if not 1 <= batch * length <= self.max_new_positions:
            raise RemoteProtocolError(
                f"{batch} x {length} new positions, more than the {self.max_new_positions} that a message of this run"
                " may hold"
            )
        if len(lengths_B) != batch or any(not 0 <= row <= length for row in lengths_B):
            raise RemoteProtocolError(f"lengths_B must give each of {batch} rows a length from 0 to {length}")

    def check_like(self, role: Role, tensor: TensorFrames, shape: tuple[int, ...]) -> None:
        """Raise unless the tensor has the shape of the activations it answers."""
        self._check_hidden(role, tensor)
        if tensor.shape != shape:
            raise RemoteProtocolError(f"a tensor of shape {tensor.shape} in answer to one of {shape}")

    def check_merged(self, layers: Sequence[TensorFrames]) -> None:
        """Raise unless these are a client's merged tensors as the server sends them, with a control for each."""
        num_layers = len(self.layer_shapes)
        self.check_layers(layers[:num_layers])
        controls = [(control.shape, control.dtype) for control in layers[num_layers:]]
        if controls != [(shape, self.wire_types[Role.CONTROL]) for shape in self.layer_shapes if self.has_controls]:
            raise RemoteProtocolError(f"{len(controls)} controls after the layers that are not this run's")

    def check_layers(self, layers: Sequence[TensorFrames]) -> None:
        """Raise unless these are all client-side tensors that are merged, in order."""
        shapes = tuple(layer.shape for layer in layers)
        if shapes != self.layer_shapes:
            differing = [pair for pair in zip(shapes, self.layer_shapes, strict=False) if pair[0] != pair[1]]
            detail = (
                f": the first that differs is {differing[0][0]} where {differing[0][1]} belongs" if differing else ""
            )
            raise RemoteProtocolError(
                f"{len(layers)} layers whose shapes differ from this run's {len(self.layer_shapes)} merged"
                f" layers{detail}"
            )
        if tuple(layer.dtype for layer in layers) != self.layer_dtypes:
            raise RemoteProtocolError("layers whose types differ from this run's merged layers")

    def check_round(self, number: int, *, held: int, first_step: int, num_steps: int) -> None:
        """Raise unless a round may come after the merge that a client holds, and has the steps that a round has."""
        if not held < number <= self.num_rounds:
            raise RemoteProtocolError(
                f"round {number} after the merge of round {held}, in a run of {self.num_rounds} rounds"
            )
        if num_steps > self.local_steps:
            raise RemoteProtocolError(f"a round of {num_steps} steps, where local_steps = {self.local_steps}")
        if first_step < 1 or not self.rounds.may_begin(number, first_step, self.local_steps):
            raise RemoteProtocolError(
                f"round {number} begins with step {first_step}, and not with {(number - 1) * self.local_steps + 1}"
            )

    def check_held(self, number: int, *, held: int) -> None:
        """Raise unless a client may hold this merge from now on; that of an earlier round has a number after the
        last."""
        if not held <= number <= self.num_rounds + 1:
            raise RemoteProtocolError(
                f"the layers of round {number} after round {held}'s, in a run of {self.num_rounds} rounds"
            )

    def check_norms(self, norms: TensorFrames) -> None:
        """Raise unless there is one float32 norm for each client-side tensor that trains."""
        if norms.shape != (self.num_trainable,) or norms.dtype != self.wire_types[Role.NORMS]:
            raise RemoteProtocolError(
                f"norms of shape {norms.shape} and type {norms.dtype} for {self.num_trainable} client-side tensors"
            )

    def _check_hidden(self, role: Role, tensor: TensorFrames) -> None:
        wire_type = self.wire_types[role]
        if len(tensor.shape) != 3 or tensor.shape[2] != self.hidden_size or tensor.dtype != wire_type:
            raise RemoteProtocolError(
                f"activations of shape {tensor.shape} and type {tensor.dtype} where this run has"
                f" (batch, length, {self.hidden_size}) and {wire_type}"
            )
