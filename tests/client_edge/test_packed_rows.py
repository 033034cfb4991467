"""Rows that several examples share, and micro-batches of about equal length: each example once an epoch."""

import random
from collections import Counter
from typing import Any

import pytest
import torch

from client_edge.text.batches import Batch, TrainBatches, collate, collate_packed
from client_edge.text.dealing import pack
from client_edge.text.examples import Dataset, Example
from splitfl.models.loss import IGNORED_LABEL


def numbered(lengths: list[int]) -> Dataset:
    """Make examples whose every id is the example's own number, counted from 1: padding is 0."""
    ids = [torch.full((length,), number, dtype=torch.int64) for number, length in enumerate(lengths, start=1)]
    return Dataset(examples=tuple(Example(input_ids=row, labels=row.clone()) for row in ids))


def unlike_lengths(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [min(64, 2 + int(draw.expovariate(1 / 12))) for _ in range(count)]


def batches_of(lengths: list[int], **changed: Any) -> TrainBatches:
    usual: dict[str, Any] = {
        "seed": 1,
        "client_id": "a",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    return TrainBatches(numbered(lengths), **{**usual, **changed})


def examples_in(batch: Batch) -> list[int]:
    """Return the numbers of a micro-batch's examples, row after row."""
    lengths = iter(batch.example_lengths or batch.lengths_B)
    found = []
    for row, filled in zip(batch.input_ids_BS.tolist(), batch.lengths_B, strict=True):
        at = 0
        while at < filled:
            found.append(row[at])
            at += next(lengths)
        assert set(row[filled:]) <= {0}
    return found


def epochs_in(batches: TrainBatches, num_epochs: int) -> list[list[int]]:
    """Return the examples of each epoch, whatever batches its borders fall into."""
    size = batches.per_device_train_batch_size * batches.gradient_accumulation_steps
    steps = -(-num_epochs * len(batches.rows) // size)
    rows = [
        [number for number in dict.fromkeys(row) if number]
        for step in range(1, steps + 1)
        for batch in batches.at(step)
        for row in batch.input_ids_BS.tolist()
    ]
    count = len(batches.rows)
    cut = [rows[start : start + count] for start in range(0, num_epochs * count, count)]
    return [[number for row in epoch for number in row] for epoch in cut]


def padding_in(batches: TrainBatches, steps: int) -> float:
    drawn = [batch for step in range(1, steps + 1) for batch in batches.at(step)]
    return 1 - sum(batch.num_tokens for batch in drawn) / sum(batch.num_positions for batch in drawn)


class TestPack:
    def test_each_example_is_in_one_row_that_holds_it(self) -> None:
        lengths = unlike_lengths(500)
        rows = pack(lengths, capacity=64, max_examples=1000)
        assert sorted(number for row in rows for number in row) == list(range(500))
        assert max(sum(lengths[number] for number in row) for row in rows) <= 64
        assert rows == sorted(rows)

    def test_takes_few_rows(self) -> None:
        lengths = unlike_lengths(500)
        assert len(pack(lengths, capacity=64, max_examples=1000)) <= -(-sum(lengths) // 64) + 1

    def test_the_tightest_row_is_taken(self) -> None:
        # 7 leaves 3 and 6 leaves 4: the 3 goes where it fits exactly, the 4 too
        assert pack([7, 6, 4, 3], capacity=10, max_examples=9) == [(0, 3), (1, 2)]

    def test_a_row_holds_no_more_examples_than_a_message_may_name(self) -> None:
        assert pack([1] * 10, capacity=64, max_examples=4) == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]

    def test_is_quick_with_many(self) -> None:
        assert len(pack(unlike_lengths(50_000), capacity=2048, max_examples=1000)) > 100

    def test_a_lone_example(self) -> None:
        assert pack([5], capacity=5, max_examples=1) == [(0,)]


class TestCollate:
    def test_no_example_predicts_the_next_ones_first_token(self) -> None:
        one, two, three = numbered([2, 3, 2]).examples
        batch = collate_packed([(one, two), (three,)])
        assert batch.input_ids_BS.tolist() == [[1, 1, 2, 2, 2], [3, 3, 0, 0, 0]]
        no = IGNORED_LABEL
        assert batch.labels_BS.tolist() == [[no, 1, no, 2, 2], [no, 3, no, no, no]]
        assert (batch.lengths_B, batch.example_lengths) == ((5, 2), (2, 3, 2))
        assert (batch.num_tokens, batch.num_positions) == (7, 10)

    def test_has_as_many_label_tokens_as_the_examples_apart(self) -> None:
        examples = numbered(unlike_lengths(20)).examples
        packed = collate_packed([examples[:12], examples[12:]])
        assert packed.num_label_tokens == sum(collate([each]).num_label_tokens for each in examples)

    def test_leaves_the_examples_as_they_are(self) -> None:
        examples = numbered([3, 3]).examples
        collate_packed([examples])
        assert all((each.labels == each.input_ids).all() for each in examples)


@pytest.mark.parametrize(
    "changed",
    [{"packed_length": 64}, {"groups_by_length": True}, {"packed_length": 64, "groups_by_length": True}],
    ids=["packed", "grouped", "both"],
)
class TestEpochs:
    def test_each_has_each_example_once_and_its_own_order(self, changed: dict[str, Any]) -> None:
        epochs = epochs_in(batches_of(unlike_lengths(203), **changed), 3)
        assert [Counter(epoch) for epoch in epochs] == [Counter(range(1, 204))] * 3
        assert epochs[0] != epochs[1] != epochs[2]

    def test_a_step_hangs_on_its_number_alone(self, changed: dict[str, Any]) -> None:
        whole = batches_of(unlike_lengths(50), **changed)
        drawn = [[batch.input_ids_BS.tolist() for batch in whole.at(step)] for step in range(1, 12)]
        torch.manual_seed(7)
        anew = batches_of(unlike_lengths(50), **changed)
        assert [batch.input_ids_BS.tolist() for batch in anew.at(9)] == drawn[8]

    def test_seed_and_client_change_the_order(self, changed: dict[str, Any]) -> None:
        drawn = {
            tuple(examples_in(batches_of(unlike_lengths(50), seed=seed, client_id=client, **changed).at(1)[0]))
            for seed in (1, 2)
            for client in ("a", "b")
        }
        assert len(drawn) == 4

    def test_less_is_padding(self, changed: dict[str, Any]) -> None:
        lengths = unlike_lengths(203)
        assert padding_in(batches_of(lengths, **changed), 25) < padding_in(batches_of(lengths), 25) / 3

    def test_a_dataset_smaller_than_a_batch_repeats(self, changed: dict[str, Any]) -> None:
        batches = batches_of([40, 40], **changed)
        assert Counter(number for batch in batches.at(1) for number in examples_in(batch)) == {1: 4, 2: 4}

    def test_all_micro_batches_are_full(self, changed: dict[str, Any]) -> None:
        batches = batches_of(unlike_lengths(37), **changed)
        assert {len(batch.lengths_B) for step in range(1, 12) for batch in batches.at(step)} == {4}


def test_a_micro_batch_of_about_one_length_is_cut_on_the_grid_in_every_epoch() -> None:
    """103 rows in micro-batches of 4: every epoch begins elsewhere in a micro-batch."""
    lengths = [2] * 53 + [40] * 50
    batches = batches_of(lengths, groups_by_length=True, gradient_accumulation_steps=1)
    mixed = sum(len(set(batch.lengths_B)) > 1 for step in range(1, 4 * 103 // 4 + 1) for batch in batches.at(step))
    # each of 4 epochs has 6 stretches or so with one border each, and two ends
    assert mixed <= 4 * 8


def test_the_order_is_the_same_in_every_version() -> None:
    # A run resumed after an upgrade goes on in the same order only if these stay.
    packed = batches_of([9, 5, 3, 8, 2, 6, 4], packed_length=10, per_device_train_batch_size=2)
    assert [examples_in(batch) for batch in packed.at(1)] == [[4, 6, 7], [1, 2, 3, 5]]
    grouped = batches_of([9, 5, 3, 8, 2, 6, 4], groups_by_length=True, per_device_train_batch_size=2)
    assert [examples_in(batch) for batch in grouped.at(1)] == [[1, 6], [7, 5]]
