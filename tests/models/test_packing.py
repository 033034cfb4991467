"""Examples packed into one row: computed as if each were alone, in every segment, or the family is refused."""

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from conftest import VOCABULARY
from tiny_families import small_model
from torch import Tensor
from transformers import PreTrainedModel

from splitfl.errors import ModelError
from splitfl.models.cut import Cut
from splitfl.models.layout import Layout
from splitfl.models.packing import check_packing

# Two rows of 13 positions; the window of sliding layers is 4.
EXAMPLES = (7, 6, 9, 2, 1)
LAYOUT = Layout(lengths_B=(13, 12), example_lengths=EXAMPLES)
LENGTH = 13
FAMILIES = ("llama", "gpt2", "gemma2", "gemma3_text", "mistral", "mixtral", "qwen2", "gpt_neox")
CPU = torch.device("cpu")


def rows() -> tuple[Tensor, Tensor]:
    """Return ids and labels: no label where an example begins, nor on the padding."""
    torch.manual_seed(1)
    ids_BS = torch.randint(3, VOCABULARY, (2, LENGTH))
    labels_BS = ids_BS.masked_fill(LAYOUT.position_ids(LENGTH, CPU) == 0, -100)
    labels_BS[1, 12] = -100
    return ids_BS, labels_BS


def apart(tensor_BS: Tensor) -> list[Tensor]:
    """Return each example as a row of its own."""
    flat = torch.cat([row[:length] for row, length in zip(tensor_BS, LAYOUT.lengths_B, strict=True)])
    return [flat[start:end].unsqueeze(0) for start, end in pairwise((0, *accumulate(EXAMPLES)))]


def split_loss(model: PreTrainedModel, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
    """Return the sum of the losses as client and server compute it."""
    cut = Cut.of(model, bottom_layers=1, top_layers=1)
    where = LAYOUT.mask(LENGTH, CPU), LAYOUT.position_ids(LENGTH, CPU)
    hidden_BSD = cut.backbone()(cut.bottom()(ids_BS, *where), *where)
    return cut.top().loss(hidden_BSD, where[0], labels_BS, 1, where[1])


def learned(model: PreTrainedModel, loss: Tensor) -> list[Tensor]:
    parameters = list(model.parameters())
    return [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)]


def model_of(family: str, attention: str, **overrides: Any) -> PreTrainedModel:
    return small_model(family, attn_implementation=attention, **overrides).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
class TestPacked:
    def test_equals_the_same_examples_apart(self, family: str, attention: str) -> None:
        model = model_of(family, attention)
        ids_BS, labels_BS = rows()
        packed = learned(model, split_loss(model, ids_BS, labels_BS))
        total = sum(
            model(input_ids=ids, labels=labels, num_items_in_batch=1, use_cache=False).loss
            for ids, labels in zip(apart(ids_BS), apart(labels_BS), strict=True)
            if (labels != -100).any()
        )
        for one, other in zip(packed, learned(model, total), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()) + 1e-7)

    def test_equals_the_unsplit_model_on_the_same_rows_bit_for_bit(self, family: str, attention: str) -> None:
        model = model_of(family, attention)
        ids_BS, labels_BS = rows()
        positions_BS = torch.tensor([[*range(7), *range(6)], [*range(9), *range(2), 0, 0]])
        whole = model(
            input_ids=ids_BS, position_ids=positions_BS, labels=labels_BS, num_items_in_batch=1, use_cache=False
        )
        expected = learned(model, whole.loss)
        for one, other in zip(learned(model, split_loss(model, ids_BS, labels_BS)), expected, strict=True):
            assert torch.equal(one, other)

    def test_the_chunked_loss_is_the_plain_one(self, family: str, attention: str) -> None:
        model = model_of(family, attention)
        cut = Cut.of(model, bottom_layers=1, top_layers=1)
        ids_BS, labels_BS = rows()
        positions_BS = LAYOUT.position_ids(LENGTH, CPU)
        hidden_BSD = cut.backbone()(cut.bottom()(ids_BS, None, positions_BS), None, positions_BS)
        plain, chunked = cut.top().eval(), cut.top().eval()
        assert chunked.chunk_the_loss()
        one, other = (
            learned(model, top.loss(hidden_BSD.detach(), None, labels_BS, 1, positions_BS)) for top in (plain, chunked)
        )
        assert float((one[0] - other[0]).abs()) <= 1e-6 * float(one[0])
        for first, second in zip(one[1:], other[1:], strict=True):
            assert float((first - second).norm()) <= 2e-6 * float(first.norm())

    def test_an_example_does_not_change_its_neighbours_loss(self, family: str, attention: str) -> None:
        model = model_of(family, attention)
        ids_BS, labels_BS = rows()
        only_second = torch.full_like(labels_BS, -100)
        only_second[0, 8:] = labels_BS[0, 8:]
        other_first = ids_BS.clone()
        other_first[0, :7] = ids_BS[0, :7].flip(0)
        with torch.no_grad():
            before, after = (split_loss(model, ids, only_second) for ids in (ids_BS, other_first))
        if family == "mixtral":  # whose experts compute other rows together
            assert before.item() == pytest.approx(after.item(), rel=1e-6)
        else:
            assert before == after


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_packs_is_found_to(family: str) -> None:
    cut = Cut.of(model_of(family, "sdpa"), bottom_layers=1, top_layers=1)
    for segment in (cut.bottom(), cut.backbone(), cut.top()):
        check_packing(segment.base, max_seq_length=64)


class _Shifted(torch.nn.Module):
    """A base model that takes positions for its mask and not for what it adds to activations."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.inner, self.config, self.get_input_embeddings = base, base.config, base.get_input_embeddings

    def forward(self, **given: Any) -> Any:
        out = self.inner(**given)
        out.last_hidden_state = out.last_hidden_state + torch.arange(given["inputs_embeds"].shape[1])[:, None]
        return out


def test_other_positions_are_noticed() -> None:
    base = Cut.of(model_of("llama", "sdpa"), bottom_layers=1, top_layers=1).backbone().base
    with pytest.raises(ModelError, match="otherwise than one alone"):
        check_packing(_Shifted(base), max_seq_length=64)


REFUSED = ("afmoe", "biogpt", "bloom", "falcon", "gpt_oss", "mpt", "openai-gpt", "opt", "xglm")


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_does_not_is_refused(family: str) -> None:
    cut = Cut.of(model_of(family, "sdpa"), bottom_layers=1, top_layers=1)
    for segment in (cut.bottom(), cut.backbone(), cut.top()):
        with pytest.raises(ModelError, match=f"^{family} attends across .*: set text.packing to false"):
            check_packing(segment.base, max_seq_length=64)


def test_bfloat16_is_told_apart_too() -> None:
    for family in ("llama", "gpt2", "bloom"):
        cut = Cut.of(model_of(family, "sdpa").to(torch.bfloat16), bottom_layers=1, top_layers=1)
        if family == "bloom":
            with pytest.raises(ModelError, match="attends across"):
                check_packing(cut.backbone().base, max_seq_length=64)
        else:
            check_packing(cut.backbone().base, max_seq_length=64)


def test_chunks_of_attention_would_be_straddled() -> None:
    base = Cut.of(model_of("llama4_text", "sdpa", attention_chunk_size=16), bottom_layers=1, top_layers=1).bottom().base
    with pytest.raises(ModelError, match="chunks of 16 positions"):
        check_packing(base, max_seq_length=17)


def test_trying_leaves_nothing_behind() -> None:
    model = model_of("llama", "sdpa").train()
    state = torch.random.get_rng_state()
    base = Cut.of(model, bottom_layers=1, top_layers=1).backbone().base.train()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        check_packing(base, max_seq_length=64)
    assert all(module.training for module in base.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


class TestLayout:
    def test_positions_begin_anew_with_each_example_and_the_padding(self) -> None:
        layout = Layout(lengths_B=(5, 3), example_lengths=(2, 3, 3))
        assert layout.position_ids(5, CPU).tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]
        assert layout.mask(5, CPU) is None

    def test_one_example_a_row_has_a_mask_and_no_positions(self) -> None:
        layout = Layout(lengths_B=(3, 1))
        assert layout.position_ids(3, CPU) is None
        assert layout.mask(3, CPU).tolist() == [[1, 1, 1], [1, 0, 0]]
        left = Layout(lengths_B=(3, 1), left_padded=True)
        assert left.mask(3, CPU).tolist() == [[1, 1, 1], [0, 0, 1]]
