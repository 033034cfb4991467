"""The chunked loss means what the library's means: loss and gradients, whatever the head does to its logits."""

from typing import Any

import pytest
import torch
from conftest import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from splitfl.models.cut import Cut, Top
from splitfl.models.loss import Head, chunked_loss

# what each family does between its last hidden states and its logits
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 0.05},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "phi": {},
}


def model_of(family: str, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **FAMILIES.get(family, {}), **overrides)).train()
    for name, parameter in model.named_parameters():
        if name.endswith("lm_head.bias"):
            torch.nn.init.normal_(parameter.data)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Return hidden states and labels: more rows than a chunk has, some without a label."""
    torch.manual_seed(1)
    hidden_BSD = torch.randn(4, 40, 32)
    labels_BS = torch.randint(0, 259, (4, 40))
    labels_BS[0, :13] = -100
    labels_BS[2, 20:] = -100
    return hidden_BSD, labels_BS


def loss_and_gradients(model: PreTrainedModel, *, chunked: bool, num_items: int | None) -> dict[str, Tensor]:
    top: Top = Cut.of(model, bottom_layers=1, top_layers=1).top()
    if chunked:
        assert top.chunk_the_loss()
    hidden_BSD, labels_BS = batch()
    hidden_BSD.requires_grad_()
    model.zero_grad()
    loss = top.loss(hidden_BSD, None, labels_BS, num_items)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in top.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "hidden": hidden_BSD.grad, **gradients}  # type: ignore[dict-item]


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


class TestEqualsPlain:
    @pytest.mark.parametrize("num_items", [None, 57])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_loss_and_gradients(self, family: str, num_items: int | None) -> None:
        model = model_of(family)
        plain = loss_and_gradients(model, chunked=False, num_items=num_items)
        chunked = loss_and_gradients(model, chunked=True, num_items=num_items)
        assert chunked.keys() == plain.keys()
        assert {name: distance(chunked[name], plain[name]) for name in plain} == pytest.approx(
            dict.fromkeys(plain, 0.0), abs=1e-6
        )

    def test_in_bfloat16_to_its_rounding(self) -> None:
        model = model_of("llama").bfloat16()
        top = Cut.of(model, bottom_layers=1, top_layers=1).top()
        hidden_BSD, labels_BS = batch()
        plain = top.loss(hidden_BSD.bfloat16(), None, labels_BS, None)
        assert top.chunk_the_loss()
        chunked = top.loss(hidden_BSD.bfloat16(), None, labels_BS, None)
        assert chunked.dtype == torch.float32
        assert chunked.item() == pytest.approx(plain.item(), rel=1e-6)

    def test_in_evaluation(self) -> None:
        top = Cut.of(model_of("gemma2"), bottom_layers=1, top_layers=1).top()
        hidden_BSD, labels_BS = batch()
        with torch.inference_mode():
            plain = top.loss(hidden_BSD, None, labels_BS, 1)
            assert top.chunk_the_loss()
            assert float(top.loss(hidden_BSD, None, labels_BS, 1)) == pytest.approx(float(plain), rel=1e-6)


class TestEnds:
    def test_no_label_at_all_is_zero_of_some_items_and_no_mean(self) -> None:
        head = Head(weight_VD=torch.ones(5, 3, requires_grad=True))
        hidden_BSD, labels_BS = torch.ones(1, 4, 3), torch.full((1, 4), -100)
        assert chunked_loss(head, hidden_BSD, labels_BS, 7).item() == 0.0
        assert torch.isnan(chunked_loss(head, hidden_BSD, labels_BS, None))

    def test_a_frozen_head_gets_no_gradient(self) -> None:
        head = Head(weight_VD=torch.ones(5, 3))
        hidden_BSD = torch.ones(1, 4, 3, requires_grad=True)
        chunked_loss(head, hidden_BSD, torch.tensor([[1, 2, 3, 4]]), None).backward()
        assert head.weight_VD.grad is None
        assert hidden_BSD.grad is not None

    def test_a_second_backward_says_why_not(self) -> None:
        head = Head(weight_VD=torch.ones(5, 3, requires_grad=True))
        loss = chunked_loss(head, torch.ones(1, 4, 3), torch.tensor([[1, 2, 3, 4]]), None)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="one backward"):
            loss.backward()

    def test_a_head_that_does_something_else_is_not_taken_for_one(self) -> None:
        model = model_of("llama")
        model.lm_head.register_forward_hook(lambda _module, _given, logits_BSV: logits_BSV * 1.01)
        assert not Cut.of(model, bottom_layers=1, top_layers=1).top().chunk_the_loss()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunked", [True, False])
def test_scores_are_those_of_the_whole_logits(family: str, chunked: bool) -> None:
    top = Cut.of(model_of(family).eval(), bottom_layers=1, top_layers=1).top()
    hidden_BSD, labels_BS = batch()
    with torch.no_grad():
        logits_BSV = top(hidden_BSD, None).float()
        wanted = top.loss(hidden_BSD, None, labels_BS, 1)
        if chunked:
            assert top.chunk_the_loss()
        found = top.scores(hidden_BSD, None, labels_BS)
        again = top.loss(hidden_BSD, None, labels_BS, 1)
    is_label_BT = labels_BS[:, 1:] != -100
    log_BTV = logits_BSV[:, :-1].log_softmax(dim=-1)
    labels_BT = labels_BS[:, 1:].clamp(min=0)
    losses_BT = -log_BTV.gather(2, labels_BT.unsqueeze(2)).squeeze(2)
    assert torch.equal(found.hits_N, (logits_BSV[:, :-1].argmax(dim=-1) == labels_BS[:, 1:])[is_label_BT])
    assert torch.equal(found.rows_N, is_label_BT.nonzero()[:, 0])
    assert torch.allclose(found.losses_N, losses_BT[is_label_BT], rtol=1e-5, atol=1e-6)
    assert distance(found.loss, wanted) < 1e-6
    assert distance(found.loss, again) < 1e-6
    assert torch.equal(found.loss, again) or chunked


@pytest.mark.parametrize("chunked", [True, False])
def test_a_batch_without_a_label_scores_nothing(chunked: bool) -> None:
    top = Cut.of(model_of("llama").eval(), bottom_layers=1, top_layers=1).top()
    if chunked:
        assert top.chunk_the_loss()
    hidden_BSD, labels_BS = batch()
    with torch.no_grad():
        found = top.scores(hidden_BSD, None, torch.full_like(labels_BS, -100))
    assert (float(found.loss), len(found.losses_N), len(found.hits_N)) == (0.0, 0, 0)
