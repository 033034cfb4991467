"""Logits that are put off: the loss never makes them, and a reader gets the plain model's."""

import copy
from typing import Any

import pytest
import torch
from conftest import VOCABULARY
from tiny_families import small_model
from torch import Tensor
from transformers import PreTrainedModel

from splitfl.errors import ModelError
from splitfl.models.cut import Cut
from splitfl.models.deferred import DeferredLogits, defer_logits

# scales before the head (minicpm3) or after it (cohere, granite), softcapping (gemma2), a copy (opt), a bias (phi)
FAMILIES = ("llama", "gpt2", "opt", "gemma2", "cohere", "granite", "minicpm3", "phi")


def pair(family: str = "llama") -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a model that puts its logits off, and its plain twin."""
    model = small_model(family)
    plain = copy.deepcopy(model)
    head = Cut.of(model, bottom_layers=1, top_layers=1).top().deferrable_head()
    assert head is not None
    defer_logits(model, head)
    return model, plain


def batch() -> dict[str, Tensor]:
    ids_BS = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids_BS, "labels": ids_BS.masked_fill(torch.arange(12) < 4, -100)}


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    @pytest.mark.parametrize("more", [{}, {"num_items_in_batch": torch.tensor(50)}], ids=["mean", "sum"])
    def test_loss_and_gradients(self, family: str, more: dict[str, Any]) -> None:
        model, plain = pair(family)
        losses = [each(**batch(), **more) for each in (model, plain)]
        for each in losses:
            each.loss.backward()
        assert losses[0].loss.item() == pytest.approx(losses[1].loss.item(), rel=1e-6)
        wanted = gradients(plain)
        largest = max(float(gradient.abs().max()) for gradient in wanted.values())
        assert gradients(model).keys() == wanted.keys()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=0.0, atol=1e-6 * largest)
        assert isinstance(losses[0].logits, DeferredLogits)
        assert not losses[0].logits.is_computed

    def test_who_reads_them_gets_the_plain_models(self, family: str) -> None:
        model, plain = pair(family)
        ours, theirs = model(**batch()).logits, plain(**batch()).logits
        assert (ours.shape, ours.dtype, ours.requires_grad) == (theirs.shape, theirs.dtype, True)
        assert torch.equal(ours.clone(), theirs)
        for logits in (ours, theirs):
            logits.square().mean().backward()
        assert all(torch.equal(gradient, gradients(plain)[name]) for name, gradient in gradients(model).items())

    def test_generating(self, family: str) -> None:
        model, plain = pair(family)
        asked = {"inputs": batch()["input_ids"], "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(**asked), plain.generate(**asked))


def test_a_loss_of_the_users_own() -> None:
    model, plain = pair()
    labels_BS = batch()["labels"]
    found = [
        torch.nn.functional.cross_entropy(each(batch()["input_ids"]).logits.flatten(0, 1), labels_BS.flatten())
        for each in (model, plain)
    ]
    assert torch.equal(*found)


def test_under_autocast() -> None:
    model, plain = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = model(**batch()), plain(**batch())
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    assert torch.equal(ours.logits.clone(), theirs.logits)
    ours.loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_without_a_graph_there_is_none_later() -> None:
    model, _ = pair()
    with torch.no_grad():
        logits = model(**batch()).logits
    assert not logits.requires_grad
    assert not logits.sum().requires_grad


def test_the_head_has_learned_in_between() -> None:
    model, _ = pair()
    outputs = model(**batch())
    outputs.loss.backward()
    read = model(**batch()).logits
    before = read.sum().item()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(ModelError, match=r"read outputs\.logits before optimizer\.step"):
        outputs.logits.argmax(-1)
    assert read.sum().item() == before


def test_the_original_stays_plain() -> None:
    model = small_model("llama")
    cut = Cut.of(model, bottom_layers=1, top_layers=1)
    view = cut.top()
    assert view.deferrable_head() is not None
    assert type(model(**batch()).logits) is Tensor
    assert model.lm_head.weight is view.view.lm_head.weight


def test_a_copy_is_a_model_of_its_own() -> None:
    model, _ = pair()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert twin(**batch()).logits.abs().max() == 0
    assert model(**batch()).logits.abs().max() > 0
