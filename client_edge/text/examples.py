"""A client's examples: ids and labels, which stay out of every `repr` and error."""

from dataclasses import dataclass, field

from torch import Tensor

from splitfl.models.loss import IGNORED_LABEL


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One example: int64 vectors of equal length; a label is its own position's id or `IGNORED_LABEL`."""

    input_ids: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataset:
    """The examples of one file, in its order.

    `num_truncated` of `examples` lost tokens at their end, be it only the end-of-sequence token; `num_dropped` more had
    no label left and are not among them.
    """

    examples: tuple[Example, ...] = field(repr=False)
    num_truncated: int = 0
    num_dropped: int = 0

    def __len__(self) -> int:
        return len(self.examples)


def num_label_tokens(labels: Tensor) -> int:
    """Count the labels that a loss is taken on, over vectors or rows: the first of each is never predicted."""
    return int((labels[..., 1:] != IGNORED_LABEL).sum())
