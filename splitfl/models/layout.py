"""How the rows of a micro-batch are filled with examples, and the mask and the positions that tell a model so.

Shapes: B rows, S positions of the longest one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfl.models.cut import mask_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Rows of one example each, padded on one side, or rows that several examples are packed into.

    The library transformers keeps the examples of a packed row apart where it gets no mask, and positions that begin
    anew with each example (`masking_utils.find_packed_sequence_indices`). The padding of such a row is one more
    example, which nothing is learned from.
    """

    lengths_B: tuple[int, ...]
    left_padded: bool = False
    example_lengths: tuple[int, ...] = ()
    """Lengths of the examples that the rows are packed from, row after row; () where each row is one example."""

    def mask(self, length: int, device: torch.device) -> Tensor | None:
        """Return the int64 mask BS, 1 where a row has a token; None where no row is padded, or rows are packed."""
        if self.example_lengths:
            return None
        return mask_of(self.lengths_B, length, "left" if self.left_padded else "right", device)

    def position_ids(self, length: int, device: torch.device) -> Tensor | None:
        """Return int64 positions BS that begin anew with each example; None where each row is one example."""
        if not self.example_lengths:
            return None
        lengths = torch.tensor(list(self._examples_and_padding(length)))
        starts = lengths.cumsum(0) - lengths
        positions = torch.arange(len(self.lengths_B) * length) - starts.repeat_interleave(lengths)
        return positions.reshape(-1, length).to(device)

    def _examples_and_padding(self, length: int) -> Iterator[int]:
        """Yield how long the examples are, row after row, and what pads each row."""
        lengths = iter(self.example_lengths)
        for filled in self.lengths_B:
            at = 0
            while at < filled:
                at += (example := next(lengths))
                yield example
            if filled < length:
                yield length - filled
