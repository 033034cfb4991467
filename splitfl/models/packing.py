"""Whether a family keeps examples apart that are packed into one row, decided by trying the blocks at hand.

Shapes: S positions, D width of what the blocks are fed with.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from splitfl.errors import ModelError
from splitfl.models.layout import Layout

# Lengths of the two examples that are tried, and of the padding after them.
_TRIED = (4, 3)
_PADDING = 2


def check_packing(base: nn.Module, *, max_seq_length: int) -> None:
    """Raise `ModelError` unless a base model computes examples packed into a row as if each were alone in one.

    No gradient may come from one example to another, which is exact in every dtype. An example after another must come
    out as it does alone, to half the digits of its dtype; otherwise its positions would be others.
    """
    config: Any = base.config
    kind = config.model_type
    chunk = getattr(config.get_text_config(), "attention_chunk_size", None)
    if chunk and chunk < max_seq_length:
        raise ModelError(
            f"{kind} attends within chunks of {chunk} positions, which examples packed into rows of"
            f" text.max_seq_length = {max_seq_length} would straddle: set text.packing to false, or max_seq_length to"
            f" {chunk}"
        )
    try:
        with _as_if_alone(base):
            comes_across, difference = _try(base)
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
        # the library's own code, given positions that begin anew within a row
        raise ModelError(f"{kind} cannot be trained on packed rows ({error}): set text.packing to false") from error
    if comes_across:
        raise ModelError(f"{kind} attends across the examples that share a row: set text.packing to false")
    if not difference <= torch.finfo(next(base.parameters()).dtype).eps ** 0.5:
        raise ModelError(
            f"{kind} computes an example that shares a row otherwise than one alone (by {difference:.1e} of its"
            " activations): set text.packing to false"
        )


@contextmanager
def _as_if_alone(base: nn.Module) -> Iterator[None]:
    """Leave out dropout and whatever a loop has around its forward, which this may be in the middle of."""
    modes = [(module, module.training) for module in base.modules()]
    device = next(base.parameters()).device.type
    base.eval()
    try:
        with torch.inference_mode(False), torch.autocast(device, enabled=False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _try(base: nn.Module) -> tuple[bool, float]:
    """Return whether the second example's result depends on the first, and how far it is from the one it has alone."""
    first, second = _TRIED
    layout = Layout(lengths_B=(first + second,), example_lengths=_TRIED)
    given_1SD = _sample(base, first + second + _PADDING)
    with torch.enable_grad():
        packed_SD = _run(base, given_1SD.requires_grad_(), layout)[first : first + second]
        (gradient_1SD,) = torch.autograd.grad((packed_SD * _waves(packed_SD)).sum(), given_1SD)
    elsewhere_SD = torch.cat([gradient_1SD[0, :first], gradient_1SD[0, first + second :]])
    with torch.no_grad():
        alone_SD = _run(base, given_1SD[:, first : first + second], Layout(lengths_B=(second,)))
    distances_S = (packed_SD.detach() - alone_SD).float().norm(dim=1) / alone_SD.float().norm(dim=1)
    return bool(elsewhere_SD.any()), float(distances_S.max())


def _run(base: nn.Module, given_1SD: Tensor, layout: Layout) -> Tensor:
    length, device = given_1SD.shape[1], given_1SD.device
    position_ids = layout.position_ids(length, device)
    if position_ids is None:
        position_ids = torch.arange(length, device=device).unsqueeze(0)
    hidden_1SD = base(
        inputs_embeds=given_1SD, attention_mask=None, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    return hidden_1SD[0]


def _sample(base: nn.Module, length: int) -> Tensor:
    """Return what the base is fed with: embeddings if it has them, else activations; no two positions alike."""
    embedding: Any = base.get_input_embeddings()  # type: ignore[operator]
    weight = next(base.parameters())
    if isinstance(embedding, nn.Embedding):
        ids_1S = torch.linspace(0, embedding.num_embeddings - 1, length, device=embedding.weight.device).long()[None]
        with torch.no_grad():
            return embedding(ids_1S).detach()
    config: Any = base.config
    return _waves(torch.empty(1, length, config.get_text_config().hidden_size, device=weight.device)).to(weight.dtype)


def _waves(like: Tensor) -> Tensor:
    """Return values between -1 and 1 without a pattern along any dimension."""
    return torch.arange(1, like.numel() + 1, device=like.device, dtype=torch.float32).sin().reshape(like.shape)
