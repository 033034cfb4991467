"""The server's blocks inside a client's model: one differentiable function, and the module that calls it.

Shapes: B micro-batch, S sequence, D hidden width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from client_edge.own_loop.own_link import Rows
from client_edge.own_loop.proxies import Proxies
from client_edge.own_loop.remote_backbone import RemoteBackbone
from splitfl.errors import DataError, ModelError
from splitfl.models.layout import Layout
from splitfl.protocol.tensors import DTYPES, norm_of


class _RemoteFunction(torch.autograd.Function):
    """Forward and backward through the server's blocks.

    `anchor` needs a gradient, and gets none: so that backward comes by here although nothing below trains.
    """

    @staticmethod
    def forward(ctx: Any, hidden_BSD: Tensor, anchor: Tensor, remote: "OwnLoopBlocks", rows: Rows) -> Tensor:
        ctx.remote = remote
        got_BSD, ctx.ticket = remote.backbone.forward(remote.outgoing(hidden_BSD, "activations"), rows)
        return got_BSD.to(hidden_BSD.device, hidden_BSD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BSD: Tensor) -> tuple[Tensor | None, ...]:
        back_BSD = ctx.remote.take_back(ctx.ticket, gradient_BSD)
        return back_BSD.to(gradient_BSD.device, gradient_BSD.dtype), None, None, None


class _Forgotten(torch.autograd.Function):
    """Activations of an evaluation, for which the server keeps nothing: a backward says so instead of being wrong."""

    @staticmethod
    def forward(ctx: Any, hidden_BSD: Tensor, anchor: Tensor) -> Tensor:
        return hidden_BSD.view_as(hidden_BSD)

    @staticmethod
    def backward(ctx: Any, gradient_BSD: Tensor) -> tuple[Tensor | None, ...]:
        raise ModelError(
            "backward through a forward in eval mode, for which the server keeps nothing: call model.train() before it"
        )


class OwnLoopBlocks:
    """The server's blocks as the stand-in sees them."""

    def __init__(
        self, backbone: RemoteBackbone, proxies: Proxies, dtype: str, *, check_packing: Callable[[], None]
    ) -> None:
        """`dtype` is the wire name of the activations' type; `check_packing` raises if this side's blocks cannot."""
        self.backbone = backbone
        self.proxies = proxies
        self.new_cache = backbone.generator.new_cache
        self._dtype = DTYPES[dtype]
        self._check_packing = functools.cache(check_packing)
        self._anchor = torch.empty(0, dtype=torch.float32, requires_grad=True)

    def __call__(
        self,
        hidden_BSD: Tensor,
        mask_BS: Tensor | None,
        position_ids_BS: Tensor | None,
        *,
        training: bool,
        adapters_off: bool = False,
    ) -> Tensor:
        """Return the server's activations; without a graph there, and without dropout, where no gradient is to come."""
        self._refuse_float16(hidden_BSD)
        rows = Rows(layout=layout_of(hidden_BSD, mask_BS, position_ids_BS), adapters_off=adapters_off)
        self.backbone.check(hidden_BSD, rows)
        if rows.layout.example_lengths:
            self._check_packing()
        needs_gradient = hidden_BSD.requires_grad or self.backbone.run.backbone_trains
        if training and torch.is_grad_enabled() and needs_gradient:
            self._drop_what_was_zeroed()
            got_BSD: Tensor = _RemoteFunction.apply(hidden_BSD, self._anchor, self, rows)  # type: ignore[no-untyped-call]
            return got_BSD
        got_BSD = self.backbone.evaluate(self.outgoing(hidden_BSD, "activations"), rows)
        got_BSD = got_BSD.to(hidden_BSD.device, hidden_BSD.dtype)
        if not (torch.is_grad_enabled() and needs_gradient):
            return got_BSD
        return _Forgotten.apply(got_BSD, self._anchor)  # type: ignore[no-untyped-call]

    def outgoing(self, tensor_BSD: Tensor, what: str) -> Tensor:
        """Return a tensor as it travels: in the run's type, whatever autocast made of it, and finite.

        It is a copy only where it must be: nobody writes to activations and gradients again.
        """
        sent_BSD = tensor_BSD.detach().to("cpu", self._dtype).contiguous()
        norm = norm_of(sent_BSD)
        if not math.isfinite(norm) or norm > self.backbone.run.link.max_rms * sent_BSD.numel() ** 0.5:
            raise DataError(
                f"{what} with values that are not finite, or larger than link.max_rms"
                f" = {self.backbone.run.link.max_rms:g} allows: lower the learning rate, or look at this batch"
            )
        return sent_BSD

    def take_back(self, ticket: Any, gradient_BSD: Tensor) -> Tensor:
        """Send the gradient of the server's activations, and show the norms that come back to the loop's clipping."""
        sent_BSD = self.outgoing(gradient_BSD, "gradients")
        self._drop_what_was_zeroed()
        if self.backbone.has_gradients and self.proxies.coefficient() != 1.0:
            raise ModelError(
                "gradients were scaled between two backward calls of one step: the server adds them up unscaled, so"
                " clip once, just before optimizer.step()"
            )
        back_BSD = self.backbone.backward(ticket, sent_BSD)
        norms_Q = self.backbone.norms()
        if norms_Q is not None:
            self.proxies.show(norms_Q)
        return back_BSD

    def _drop_what_was_zeroed(self) -> None:
        """Have the server forget gradients that the loop has zeroed without a step."""
        if self.backbone.has_gradients and self.proxies.coefficient() is None:
            self.backbone.give_up_gradients()
            self.proxies.clear()

    def _refuse_float16(self, hidden_BSD: Tensor) -> None:
        device = hidden_BSD.device.type
        if hidden_BSD.dtype == torch.float16 or (
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        ):
            raise ModelError(
                "float16 cannot train around a remote backbone, whose gradients no GradScaler can look at: use bfloat16"
                " or float32"
            )


def layout_of(hidden_BSD: Tensor, mask_BS: Tensor | None, position_ids_BS: Tensor | None) -> Layout:
    """Return how a batch's rows are filled; raise `DataError` for a mask or positions that are no rows.

    Positions may begin anywhere, as long as they rise by one from token to token. Attention only sees distances, and
    learned positions are added on this side. Where they do not, and there is no mask, another example begins, as
    transformers has it of packed rows.
    """
    batch, length, _ = hidden_BSD.shape
    is_token_BS = torch.ones(batch, length, dtype=torch.bool) if mask_BS is None else mask_BS.cpu() != 0
    rises = bool((is_token_BS[:, :-1] <= is_token_BS[:, 1:]).all())
    falls = bool((is_token_BS[:, :-1] >= is_token_BS[:, 1:]).all())
    if not (rises or falls) or not is_token_BS.any(dim=1).all():
        raise DataError(
            "an attention_mask with holes, with rows padded on both sides or on different ones, or with a row without a"
            " token: pad all rows on the right, or all on the left"
        )
    lengths_B = tuple(is_token_BS.sum(dim=1).tolist())
    if position_ids_BS is not None:
        steps_BS = position_ids_BS.cpu().expand(batch, length).diff(dim=1)
        is_border_BS = (steps_BS != 1) & is_token_BS[:, :-1] & is_token_BS[:, 1:]
        if is_border_BS.any() and mask_BS is not None:
            raise DataError(
                "position_ids that begin anew within a row, as packing makes them, with an attention_mask: the examples"
                " of a row would see each other, so give no mask"
            )
        if is_border_BS.any():
            return Layout(lengths_B=lengths_B, example_lengths=_between(is_border_BS))
    return Layout(lengths_B=lengths_B, left_padded=not falls)


def _between(is_border_BS: Tensor) -> tuple[int, ...]:
    """Return the lengths of examples, row after row, from whether another begins after each position but the last."""
    row_ends_B1 = torch.ones(len(is_border_BS), 1, dtype=torch.bool)
    ends = torch.cat([is_border_BS, row_ends_B1], dim=1).flatten().nonzero().flatten() + 1
    return tuple(ends.diff(prepend=torch.zeros(1, dtype=ends.dtype)).tolist())
