"""Micro-batches: examples padded or packed into rows, dealt so that a step's number alone says what it holds.

Tensor names end in their shape: B rows of a micro-batch, S positions of its longest row.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from client_edge.text.dealing import epoch_order, grouped_order, pack, pieces_of
from client_edge.text.examples import Dataset, Example, num_label_tokens
from splitfl.config.own import ClientSection
from splitfl.config.trees import RunConfig
from splitfl.errors import DataError
from splitfl.models.layout import Layout
from splitfl.models.loss import IGNORED_LABEL
from splitfl.session.terms import MAX_PACKED_EXAMPLES


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """A micro-batch, int64, padded on the right to its longest row; `lengths_B` tells the padding, no id does."""

    input_ids_BS: Tensor = field(repr=False)
    labels_BS: Tensor = field(repr=False)
    lengths_B: tuple[int, ...]
    num_label_tokens: int
    """Labels that a loss is taken on; an example's first token is never predicted and does not count."""
    example_lengths: tuple[int, ...] = ()
    """Lengths of the examples that the rows are packed from, row after row; () where each row is one example."""

    @property
    def layout(self) -> Layout:
        """How the rows are filled."""
        return Layout(lengths_B=self.lengths_B, example_lengths=self.example_lengths)

    @property
    def num_tokens(self) -> int:
        """Positions that are not padding."""
        return sum(self.lengths_B)

    @property
    def num_positions(self) -> int:
        """Tokens and padding: what is computed, and sent."""
        return self.input_ids_BS.numel()


def collate(examples: Sequence[Example]) -> Batch:
    """Pad at least one example to the longest; padding has id 0, which every vocabulary has, and no label."""
    labels_BS = pad_sequence([example.labels for example in examples], batch_first=True, padding_value=IGNORED_LABEL)
    return Batch(
        input_ids_BS=pad_sequence([example.input_ids for example in examples], batch_first=True, padding_value=0),
        labels_BS=labels_BS,
        lengths_B=tuple(len(example.input_ids) for example in examples),
        num_label_tokens=num_label_tokens(labels_BS),
    )


def collate_packed(rows: Sequence[Sequence[Example]]) -> Batch:
    """Put the examples of each row one after the other, without a label where one begins, and pad the rows."""
    batch = collate([_joined(row) for row in rows])
    return replace(batch, example_lengths=tuple(len(each.input_ids) for row in rows for each in row))


def _joined(row: Sequence[Example]) -> Example:
    labels = torch.cat([example.labels for example in row])
    starts = [0, *accumulate(len(example.labels) for example in row)][:-1]
    labels[starts] = IGNORED_LABEL  # or the last token of one example would be asked to predict the next one's first
    return Example(input_ids=torch.cat([example.input_ids for example in row]), labels=labels)


@dataclass(frozen=True, slots=True, eq=False)
class TrainBatches:
    """An endless stream of shuffled epochs, cut into steps: what a step holds hangs on its number alone.

    An epoch has each row once, and so each example. A batch may run over the border of two epochs, so none is short,
    and fewer rows than a batch repeat in it. Raises `DataError` if there are no examples.
    """

    dataset: Dataset
    _: KW_ONLY
    seed: int
    client_id: str
    per_device_train_batch_size: int
    """Rows in a micro-batch: an example each, or several."""
    gradient_accumulation_steps: int
    packed_length: int = 0
    """Tokens up to which examples are packed into one row; 0 where each row is one example."""
    groups_by_length: bool = False
    """Whether rows of about the same length share a micro-batch."""
    max_rows: int = 0
    """Rows that a micro-batch is cut into pieces of, each a micro-batch of its own; 0 leaves them whole."""
    rows: tuple[tuple[Example, ...], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.dataset.examples:
            raise DataError(f"client {self.client_id} has no examples to train on; see data.path")
        object.__setattr__(self, "rows", tuple(self._pack() if self.packed_length else self._one_each()))

    @classmethod
    def of(cls, dataset: Dataset, run: RunConfig, client: ClientSection) -> "TrainBatches":
        """Deal one client's examples as a run's settings say, in pieces where its own say so."""
        return cls(
            dataset,
            seed=run.seed,
            client_id=client.client_id,
            max_rows=client.micro_batch_rows,
            per_device_train_batch_size=run.federation.per_device_train_batch_size,
            gradient_accumulation_steps=run.federation.gradient_accumulation_steps,
            packed_length=run.text.max_seq_length if run.text.packing else 0,
            groups_by_length=run.text.train_sampling_strategy == "group_by_length",
        )

    def at(self, step: int) -> tuple[Batch, ...]:
        """Return the micro-batches of a step, counted from 1; raise `ValueError` below that."""
        if step < 1:
            raise ValueError(f"steps count from 1, got {step}")
        size = self.per_device_train_batch_size
        groups = pieces_of(self._rows_of(step), size)
        pieces = (piece for group in groups for piece in pieces_of(group, self.max_rows or size))
        return tuple(self._collated(piece) for piece in pieces)

    def _rows_of(self, step: int) -> list[tuple[Example, ...]]:
        num_rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        order = functools.cache(self._order)
        places = (divmod(at, len(self.rows)) for at in range((step - 1) * num_rows, step * num_rows))
        return [self.rows[order(epoch)[place]] for epoch, place in places]

    def _collated(self, rows: Sequence[tuple[Example, ...]]) -> Batch:
        return collate_packed(rows) if self.packed_length else collate([example for (example,) in rows])

    def _order(self, epoch: int) -> tuple[int, ...]:
        seeded = (self.seed, self.client_id, epoch)
        if not self.groups_by_length:
            return epoch_order(len(self.rows), *seeded)
        lengths = tuple(sum(len(example.input_ids) for example in row) for row in self.rows)
        size = self.per_device_train_batch_size
        return grouped_order(lengths, size, -epoch * len(lengths) % size, *seeded)

    def _one_each(self) -> Iterator[tuple[Example]]:
        return ((example,) for example in self.dataset.examples)

    def _pack(self) -> Iterator[tuple[Example, ...]]:
        examples = self.dataset.examples
        packed = pack(
            [len(example.input_ids) for example in examples],
            capacity=self.packed_length,
            max_examples=max(1, MAX_PACKED_EXAMPLES // self.per_device_train_batch_size),
        )
        return (tuple(examples[number] for number in row) for row in packed)


def padding_share(batches: TrainBatches, num_steps: int) -> float | None:
    """Return which part of the positions of the first steps is padding, None for no steps."""
    num_tokens = num_positions = 0
    for step in range(1, num_steps + 1):
        for batch in batches.at(step):
            num_tokens += batch.num_tokens
            num_positions += batch.num_positions
    return 1 - num_tokens / num_positions if num_positions else None


def eval_batches(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """Yield every example once, the short ones first, so that little is padding; the last batch may be smaller."""
    by_length = sorted(dataset.examples, key=lambda example: len(example.input_ids))
    for start in range(0, len(by_length), batch_size):
        yield collate(by_length[start : start + batch_size])
