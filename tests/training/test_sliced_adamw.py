"""The optimizer that works in slices writes the same bits as torch's own."""

import pytest
import torch
from torch import nn

from splitfl.training import optimizer
from splitfl.training.optimizer import SlicedAdamW


def trained(kind: type[torch.optim.AdamW], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.optim.AdamW]:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape))
    adam = kind([parameter], lr=1e-2, weight_decay=0.1)
    for _ in range(4):
        parameter.grad = torch.randn(shape)
        adam.step()
    return parameter.detach(), adam


@pytest.mark.parametrize("shape", [(), (7,), (61, 33)])
def test_same_bits(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "_SLICE", 97)
    theirs, their_adam = trained(torch.optim.AdamW, shape)
    ours, our_adam = trained(SlicedAdamW, shape)
    assert torch.equal(ours, theirs)
    (their_state,), (our_state,) = their_adam.state.values(), our_adam.state.values()
    assert our_state.keys() == their_state.keys()
    assert all(torch.equal(our_state[key], their_state[key]) for key in their_state)
