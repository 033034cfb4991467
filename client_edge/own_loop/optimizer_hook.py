"""The server's step, taken when the client's optimizer steps: torch tells of each optimizer's step before it begins."""

import sys
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from client_edge.own_loop.remote_blocks import OwnLoopBlocks
from splitfl.errors import ModelError

_hooks: list[RemovableHandle] = []
_blocks_of: weakref.WeakKeyDictionary[nn.Module, OwnLoopBlocks] = weakref.WeakKeyDictionary()


def watch_optimizers_of(model: nn.Module, remote: OwnLoopBlocks) -> None:
    """Have every optimizer that holds parameters of `model` step the server's blocks first."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
    _blocks_of[model] = remote


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for model, remote in list(_blocks_of.items()):
        group = _group_with(model, remote, optimizer)
        if group is not None:
            _refuse_closure(args, kwargs)
            _refuse_scaler()
            _step(remote, float(group["lr"]))


def _step(remote: OwnLoopBlocks, learning_rate: float) -> None:
    remote.backbone.check_refusal()
    if not remote.backbone.has_gradients:
        return
    coefficient = remote.proxies.coefficient()
    if coefficient is None:
        remote.backbone.give_up_gradients()
    else:
        remote.backbone.commit(learning_rate, coefficient)
    remote.proxies.clear()


def _group_with(model: nn.Module, remote: OwnLoopBlocks, optimizer: Optimizer) -> dict[str, Any] | None:
    """Return the group whose learning rate the server's blocks follow: the proxies', or else the model's first."""
    proxies = {id(proxy) for proxy in remote.proxies.by_name.values()}
    parameters = {id(parameter) for parameter in model.parameters()}
    for wanted in (proxies, parameters):
        for group in optimizer.param_groups:
            if any(id(parameter) in wanted for parameter in group["params"]):
                return group
    return None


def _refuse_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _optimizer, *rest = args
    if kwargs.get("closure") is not None or any(each is not None for each in rest):
        raise ModelError(
            "an optimizer that is stepped with a closure (LBFGS) takes the loss within its step, when the server has"
            " taken its own already: call loss.backward() and then optimizer.step() without a closure"
        )


def _refuse_scaler() -> None:
    """Refuse a step that a GradScaler takes; it tells nobody but is on the stack."""
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code is torch.amp.GradScaler.step.__code__ and frame.f_locals["self"].is_enabled():
            raise ModelError(
                "a GradScaler would scale the server's gradients, which it cannot look at: train in bfloat16 or float32"
                " without one"
            )
