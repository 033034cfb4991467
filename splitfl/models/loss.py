"""The causal LM loss without its logits: a few rows at a time, gradients taken on the way forward.

The library's loss holds the logits of a whole batch, their log-probabilities and their gradients. At a vocabulary of
150,000 that is several times the model's own ends. Here a chunk of rows goes all the way to its gradients before the
next one begins. One buffer serves for logits, probabilities and gradients.

Shapes: B micro-batch, S sequence, D hidden width, V vocabulary, N rows that have a label, R rows of one chunk.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

IGNORED_LABEL = -100
"""The label on which no loss is taken, as in transformers."""

# The logits of a chunk take an eighth of the head's own bytes, but not so few rows that matrix products get slow.
_CHUNKS_PER_HEAD = 8
_FEWEST_ROWS = 32

# Where configs keep what a logit is multiplied or divided by (cohere, falcon_h1; granite), and what it is capped by
# (gemma2). A family that does anything else fails the probe of `head_of`.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_CAP = "final_logit_softcapping"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a causal LM does between its last hidden states and its logits: `cap * tanh(scale * (W h + b) / cap)`."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float = math.inf
    """Softcapping; infinity is none."""

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return logits NV in the hidden states' dtype, in memory of their own."""
        logits_NV = nn.functional.linear(hidden_ND, self.weight_VD, self.bias_V)
        if self.scale != 1.0:
            logits_NV = logits_NV.mul_(self.scale)
        if self.cap != math.inf:
            logits_NV = logits_NV.div_(self.cap).tanh_().mul_(self.cap)
        return logits_NV


def tried_on(model: PreTrainedModel) -> Tensor:
    """Return activations BSD to try a model's head on: small, no two alike, and without a draw."""
    weight, width = model.get_output_embeddings().weight, model.config.get_text_config().hidden_size
    return torch.linspace(-1, 1, 3 * width, device=weight.device).sin().to(weight.dtype).reshape(1, 3, width)


def head_of(model: PreTrainedModel, base: nn.Module) -> Head | None:
    """Return the head if `chunked_loss` means the same by it as the model does around its `base`, None otherwise.

    Decided by trying: the model's logits for a few `inputs_embeds` must be the head's.
    """
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear) or model.loss_function is not ForCausalLMLoss:
        return None
    config = model.config.get_text_config()
    head = Head(
        weight_VD=linear.weight,
        bias_V=linear.bias,
        scale=_product(config, _MULTIPLIERS) / _product(config, _DIVISORS),
        cap=getattr(config, _CAP, None) or math.inf,
    )
    hidden_BSD = tried_on(model)
    with torch.no_grad():
        last_BSD = base(inputs_embeds=hidden_BSD, use_cache=False).last_hidden_state
        theirs_BSV = model(inputs_embeds=hidden_BSD, use_cache=False).logits
        return head if are_same(head.logits(last_BSD), theirs_BSV) else None


def are_same(ours_BSV: Tensor, theirs_BSV: Tensor) -> bool:
    """Tell whether logits differ by rounding only."""
    rounding = torch.finfo(theirs_BSV.dtype).eps * 4 * float(theirs_BSV.abs().max())
    return theirs_BSV.shape == ours_BSV.shape and torch.allclose(ours_BSV, theirs_BSV, rtol=0.0, atol=rounding)


def _product(config: Any, names: tuple[str, ...]) -> float:
    return math.prod(getattr(config, name, None) or 1.0 for name in names)


def chunked_loss(head: Head, hidden_BSD: Tensor, labels_BS: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Return transformers' causal LM loss (`ForCausalLMLoss`) of `head`'s logits, which never exist as a whole.

    Position s predicts label s + 1; -100 is no label, and such rows cost nothing. The loss (float32, scalar) is the sum
    over `num_items`, or the mean over the labels where that is None. Within 1e-6 of the plain one in float32, loss and
    gradients; in bfloat16 the weight's gradient is rounded once per chunk.

    The gradients are computed at once and kept for one backward; a second one through the same graph raises.
    """
    labels_N = labels_BS[:, 1:].reshape(-1)
    rows_N = (labels_N != IGNORED_LABEL).nonzero().squeeze(1)
    labels_N = labels_N[rows_N]
    hidden_ND = hidden_BSD[:, :-1].flatten(0, 1)[rows_N]
    total = _sum(head, hidden_ND, labels_N)
    # a mean over no label is not a number, as torch has it
    return total / (torch.tensor(labels_N.numel()) if num_items is None else num_items)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """How well a batch's labels were predicted; N counts those on which a loss is taken, row after row."""

    loss: Tensor
    """Sum of the losses, float32."""
    losses_N: Tensor
    """Minus the log-likelihood of each label, float32."""
    hits_N: Tensor
    """Whether a label's logit is the largest, bool."""
    rows_N: Tensor
    """Which row of the batch a label is in, int64."""


def chunked_scores(head: Head, hidden_BSD: Tensor, labels_BS: Tensor) -> Scores:
    """Return the scores of `head`'s logits, which never exist as a whole; for no gradient."""
    rows_N, at_N = (labels_BS[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)
    labels_N = labels_BS[rows_N, at_N + 1]
    hidden_ND = hidden_BSD[rows_N, at_N]
    losses, hits = [labels_N.new_empty(0, dtype=torch.float32)], [labels_N.new_empty(0, dtype=torch.bool)]
    for rows in _chunks(hidden_ND):
        logits_RV = head.logits(hidden_ND[rows]).float()
        hits.append(logits_RV.argmax(dim=1) == labels_N[rows])
        losses.append(_losses_and_softmax(logits_RV, labels_N[rows])[0])
    losses_N = torch.cat(losses)
    return Scores(loss=losses_N.sum(), losses_N=losses_N, hits_N=torch.cat(hits), rows_N=rows_N)


def plain_scores(logits_BSV: Tensor, labels_BS: Tensor, loss: Tensor) -> Scores:
    """Return the scores of these logits; `loss` is the library's own sum of losses over them."""
    rows_N, at_N = (labels_BS[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)
    labels_N = labels_BS[rows_N, at_N + 1]
    logits_NV = logits_BSV[rows_N, at_N].float()
    losses_N = nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
    return Scores(loss=loss, losses_N=losses_N, hits_N=logits_NV.argmax(dim=1) == labels_N, rows_N=rows_N)


def _sum(head: Head, hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return _ChunkedSum.apply(hidden_ND, head.weight_VD, head.bias_V, head, labels_N)  # type: ignore[no-untyped-call]
    total = torch.zeros((), device=hidden_ND.device)
    for rows in _chunks(hidden_ND):
        total += _losses_and_softmax(head.logits(hidden_ND[rows]).float(), labels_N[rows])[0].sum()
    return total


def _chunks(hidden_ND: Tensor) -> Iterator[slice]:
    num_rows, width = hidden_ND.shape
    stride = max(_FEWEST_ROWS, width // _CHUNKS_PER_HEAD)
    return (slice(start, start + stride) for start in range(0, num_rows, stride))


def _losses_and_softmax(logits_RV: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each row, and the softmax in the memory of the float32 logits."""
    best_R1 = logits_RV.amax(dim=1, keepdim=True)
    wanted_R1 = logits_RV.gather(1, labels_R.unsqueeze(1))
    sums_R1 = logits_RV.sub_(best_R1).exp_().sum(dim=1, keepdim=True)
    losses_R1 = sums_R1.log().add_(best_R1).sub_(wanted_R1)
    return losses_R1.squeeze(1), logits_RV.div_(sums_R1)


class _ChunkedSum(torch.autograd.Function):
    """The sum of the rows' losses; its gradients are known when the forward ends."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head: Head, labels_N: Tensor
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias_V) if bias_V is not None and wants_bias else None
        total = torch.zeros((), device=hidden_ND.device)
        for rows in _chunks(hidden_ND):
            losses_R, grad_RV = _forward_and_back_to_linear(head, hidden_ND[rows], labels_N[rows])
            total += losses_R.sum()
            if grad_hidden_ND is not None:
                torch.mm(grad_RV, weight_VD, out=grad_hidden_ND[rows])
            if grad_weight_VD is not None:
                grad_weight_VD.addmm_(grad_RV.t(), hidden_ND[rows])
            if grad_bias_V is not None:
                grad_bias_V += grad_RV.sum(dim=0)
            del grad_RV  # or two chunks' would be there at once
        ctx.gradients = [grad_hidden_ND, grad_weight_VD, grad_bias_V]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # handed over, not kept: autograd then makes the weight's gradient the parameter's without a copy
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("a chunked loss has one backward: take the loss again for another one")
        return *(None if each is None else each.mul_(grad) for each in gradients), None, None


def _forward_and_back_to_linear(head: Head, hidden_RD: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows' losses and the gradient of their sum with respect to `W h + b`, in the hidden states' dtype."""
    logits_RV = head.logits(hidden_RD)
    slope_RV = None if head.cap == math.inf else logits_RV.div(head.cap).square_().neg_().add_(1.0)
    losses_R, grad_RV = _losses_and_softmax(logits_RV.float(), labels_R)
    grad_RV[torch.arange(len(labels_R), device=labels_R.device), labels_R] -= 1.0
    grad_RV = grad_RV.to(hidden_RD.dtype)
    if slope_RV is not None:
        grad_RV.mul_(slope_RV)
    return losses_R, grad_RV.mul_(head.scale) if head.scale != 1.0 else grad_RV
