"""The unsplit model's side of a comparison: plain transformers on the micro-batches that a client has."""

from collections.abc import Sequence

import torch
from torch import nn

from client_edge.text.batches import Batch


def backward(model: nn.Module, micro_batches: Sequence[Batch]) -> float:
    """Add a step's gradients to the parameters; return its loss, the mean over the label tokens of all micro-batches.

    Rows are one example each, padded on the right. Masks are made here from lengths, by no code of splitfl's.
    """
    tokens, total = sum(batch.num_label_tokens for batch in micro_batches), 0.0
    for batch in micro_batches:
        positions = torch.arange(batch.input_ids_BS.shape[1])
        out = model(
            input_ids=batch.input_ids_BS,
            attention_mask=(positions < torch.tensor(batch.lengths_B).unsqueeze(1)).long(),
            labels=batch.labels_BS,
            num_items_in_batch=tokens,
            use_cache=False,
        )
        out.loss.backward()
        total += out.loss.item()
    return total
