"""How examples are dealt: held out, put into batches, in an order that a resumed run repeats."""

from collections import Counter

import pytest
import torch

from client_edge.text.batches import Batch, TrainBatches, collate, eval_batches
from client_edge.text.dealing import hold_out
from client_edge.text.examples import Dataset, Example
from splitfl.errors import ConfigError, DataError


def numbered(lengths: list[int]) -> Dataset:
    """Make examples whose every id is the example's own number."""
    ids = [torch.full((length,), number, dtype=torch.int64) for number, length in enumerate(lengths)]
    return Dataset(examples=tuple(Example(input_ids=row, labels=row.clone()) for row in ids))


def numbers_in(batch: Batch) -> list[int]:
    return batch.input_ids_BS[:, 0].tolist()


@pytest.mark.parametrize(
    ("size", "fraction", "held_out"),
    [(10, 0.2, 2), (10, 0.001, 1), (2, 0.99, 1), (3, 0.9, 2), (10, 0.0, 0), (1, 0.0, 0)],
)
def test_holding_out_splits_without_loss(size: int, fraction: float, held_out: int) -> None:
    dataset = Dataset(examples=numbered([2] * size).examples, num_truncated=3, num_dropped=4)
    train, evaluation = hold_out(dataset, fraction, seed=1)
    assert (len(train), len(evaluation)) == (size - held_out, held_out)
    both = [int(example.input_ids[0]) for part in (train, evaluation) for example in part.examples]
    assert sorted(both) == list(range(size))
    assert (train.num_truncated, train.num_dropped, evaluation.num_truncated, evaluation.num_dropped) == (3, 4, 0, 0)


def test_holding_out_is_drawn_by_the_seed_alone() -> None:
    dataset = numbered([2] * 40)

    def drawn(seed: int) -> list[int]:
        return [int(example.input_ids[0]) for example in hold_out(dataset, 0.25, seed)[1].examples]

    first = drawn(1)
    torch.manual_seed(99)
    assert drawn(1) == first
    assert drawn(2) != first
    assert first not in (list(range(10)), list(range(30, 40)))


@pytest.mark.parametrize(("size", "fraction"), [(1, 0.1), (0, 0.0), (0, 0.5)])
def test_holding_out_must_leave_something(size: int, fraction: float) -> None:
    with pytest.raises(DataError, match="leaves nothing to train on"):
        hold_out(numbered([2] * size), fraction, seed=1)


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_fraction_is_below_one(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.eval_fraction must be"):
        hold_out(numbered([2] * 5), fraction, seed=1)


def test_a_batch_is_padded_on_the_right() -> None:
    rows = [
        Example(input_ids=torch.tensor([5, 6, 7]), labels=torch.tensor([-100, 6, 7])),
        Example(input_ids=torch.tensor([8, 9]), labels=torch.tensor([8, 9])),
    ]
    batch = collate(rows)
    assert batch.input_ids_BS.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.labels_BS.tolist() == [[-100, 6, 7], [8, 9, -100]]
    assert batch.lengths_B == (3, 2)
    assert batch.num_label_tokens == 3  # the 8 at position 0 is never predicted


def stream(
    size: int, steps: range, *, seed: int = 1, client_id: str = "a", micro: int = 3, accumulate: int = 2
) -> list[int]:
    batches = TrainBatches(
        numbered([2] * size),
        seed=seed,
        client_id=client_id,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate,
    )
    drawn = [batches.at(step) for step in steps]
    assert all(len(step) == accumulate for step in drawn)
    assert all(len(batch.lengths_B) == micro for step in drawn for batch in step)
    return [number for step in drawn for batch in step for number in numbers_in(batch)]


def test_every_epoch_has_each_example_once_and_its_own_order() -> None:
    drawn = stream(10, range(1, 6))  # 30 examples: three epochs, whose borders fall inside batches
    epochs = [drawn[start : start + 10] for start in (0, 10, 20)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_step_depends_on_its_number_alone() -> None:
    whole = stream(10, range(1, 6))
    torch.manual_seed(7)
    assert stream(10, range(4, 6)) == whole[18:]


def test_micro_batches_cut_the_same_stream() -> None:
    assert stream(10, range(1, 4), micro=6, accumulate=1) == stream(10, range(1, 4), micro=1, accumulate=6)


def test_seed_and_client_change_the_order() -> None:
    orders = {
        tuple(stream(10, range(1, 3), seed=seed, client_id=client)) for seed in (1, 2) for client in ("a", "b", "1")
    }
    assert len(orders) == 6


def test_the_order_is_the_same_in_every_version() -> None:
    # A run resumed after an upgrade goes on in the same order only if these stay.
    assert stream(5, range(1, 2), seed=42, client_id="clinic-a") == [2, 0, 3, 1, 4, 3]


def test_a_dataset_smaller_than_a_batch_repeats() -> None:
    assert Counter(stream(2, range(1, 3))) == {0: 6, 1: 6}


def test_steps_count_from_one_and_something_must_be_there() -> None:
    with pytest.raises(ValueError, match="count from 1, got 0"):
        stream(3, range(1))
    with pytest.raises(DataError, match=r"client a has no examples"):
        stream(0, range(1, 2))


def test_evaluation_takes_each_example_once_short_ones_first() -> None:
    dataset = numbered([9, 2, 5, 2, 7])
    batches = list(eval_batches(dataset, 2))
    assert [numbers_in(batch) for batch in batches] == [[1, 3], [2, 4], [0]]
    assert [batch.lengths_B for batch in batches] == [(2, 2), (5, 7), (9,)]
    assert list(eval_batches(Dataset(examples=()), 2)) == []
