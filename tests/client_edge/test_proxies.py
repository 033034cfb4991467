"""Proxies: one clipping norm over tensors that are elsewhere, bit for bit, and what cannot be done to them."""

import pytest
import torch
from torch import nn

from client_edge.own_loop.proxies import Proxies, proxy_name
from splitfl.errors import ModelError, RemoteProtocolError


def proxies(*dtypes: torch.dtype) -> Proxies:
    return Proxies({f"block.{number}": torch.empty(3, dtype=dtype) for number, dtype in enumerate(dtypes)})


class TestClipping:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("foreach", [True, False])
    def test_equals_that_of_the_whole_model(self, dtype: torch.dtype, foreach: bool) -> None:
        draw = torch.Generator().manual_seed(3)
        scaled = 0
        for size in range(60):
            whole = [nn.Parameter(torch.zeros(7, 5, dtype=dtype)) for _ in range(6)]
            for parameter in whole:
                parameter.grad = (torch.randn(7, 5, generator=draw) * 10.0 ** (size / 6 - 5)).to(dtype)
            remote = proxies(dtype, dtype, dtype)
            remote.show(torch.tensor([float(torch.linalg.vector_norm(p.grad)) for p in whole[1:4]]))
            split = [nn.Parameter(torch.zeros(7, 5, dtype=dtype)) for _ in range(3)]
            for parameter, source in zip(split, (whole[0], whole[4], whole[5]), strict=True):
                parameter.grad = source.grad.clone()
            before = [p.grad.clone() for p in whole[1:4]]

            clip = {"max_norm": 1.0, "foreach": foreach}
            total = torch.nn.utils.clip_grad_norm_([split[0], *remote.by_name.values(), split[1], split[2]], **clip)

            assert torch.equal(total, torch.nn.utils.clip_grad_norm_(whole, **clip))
            coefficient = remote.coefficient()
            assert coefficient is not None
            scaled += coefficient < 1
            for parameter, gradient in zip(whole[1:4], before, strict=True):
                assert torch.equal(gradient.mul_(coefficient), parameter.grad)
        assert 10 < scaled < 60

    def test_a_norm_of_zero_stays_zero(self) -> None:
        remote = proxies(torch.float32)
        remote.show(torch.tensor([0.0]))
        assert float(torch.nn.utils.get_total_norm([p.grad for p in remote.by_name.values()])) == 0.0
        assert remote.coefficient() == 1.0


class TestCoefficient:
    def test_of_tensors_without_a_gradient_is_none_of_their_affair(self) -> None:
        remote = proxies(torch.float32, torch.float32)
        remote.show(torch.tensor([-1.0, 2.0]))
        first, second = remote.by_name.values()
        assert first.grad is None
        second.grad.mul_(0.25)
        assert remote.coefficient() == 0.25

    def test_is_none_when_zeroed_either_way(self) -> None:
        remote = proxies(torch.float32)
        (proxy,) = remote.by_name.values()
        for zeroed in (None, torch.zeros(2)):
            remote.show(torch.tensor([2.0]))
            proxy.grad = zeroed
            assert remote.coefficient() is None

    def test_norms_of_other_tensors_are_refused(self) -> None:
        with pytest.raises(RemoteProtocolError, match="2 norms of 1 tensors"):
            proxies(torch.float32).show(torch.tensor([1.0, 2.0]))

    def test_noise_is_refused(self) -> None:
        remote = proxies(torch.float32)
        remote.show(torch.tensor([2.0]))
        (proxy,) = remote.by_name.values()
        proxy.grad.add_(0.1)
        with pytest.raises(ModelError, match="cannot be clipped by value or have anything added"):
            remote.coefficient()

    def test_some_zeroed_and_some_not_are_refused(self) -> None:
        remote = proxies(torch.float32, torch.float32)
        remote.show(torch.tensor([2.0, 3.0]))
        next(iter(remote.by_name.values())).grad = None
        with pytest.raises(ModelError, match="scaled by different factors"):
            remote.coefficient()


class TestProxy:
    def test_trains_whatever_a_library_sets(self) -> None:
        (proxy,) = proxies(torch.float32).by_name.values()
        proxy.requires_grad = False
        assert proxy.requires_grad_(False).requires_grad
        proxy.grad = torch.ones(2)

    def test_says_what_kind_of_tensor_it_stands_for(self) -> None:
        name = "model.layers.1.self_attn.q_proj.lora_A.default.weight"
        assert proxy_name(name) == "remote_model_layers_1_self_attn_q_proj_lora_A_default_weight"

    @pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
    @pytest.mark.parametrize("foreach", [True, False])
    def test_is_left_alone_by_optimizers_once_cleared(self, kind: type[torch.optim.Optimizer], foreach: bool) -> None:
        remote = proxies(torch.float32)
        remote.show(torch.tensor([2.0]))
        (proxy,) = remote.by_name.values()
        proxy.data.fill_(1.0)
        optimizer = kind([proxy], lr=0.1, weight_decay=0.1, foreach=foreach)
        remote.clear()
        optimizer.step()
        assert torch.equal(proxy, torch.ones(2))
        assert not optimizer.state
