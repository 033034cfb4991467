"""One side's share of an optimizer step that equals the whole model's.

Clipping needs the global norm over both sides. torch takes the norm of the per-tensor norms, in the model's order, and
combining two finished norms is not bit-equal to that. So the per-tensor norms travel, and the server orders them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from transformers import get_scheduler

from splitfl.config.identity import OptimizerSection
from splitfl.durability.crash import crash_point

NO_GRADIENT = -1.0
_SLICE = 1 << 20  # elements
_MOMENT = "|"  # between a weight's name and its moment's


class SlicedAdamW(torch.optim.AdamW):
    """torch's AdamW, bit for bit, a slice of each tensor at a time.

    The original makes two temporaries of a tensor's size. For an embedding they would be half of a client's memory.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nobody here has a closure
        """Apply the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group)
                    crash_point("optimizer-tensor")

    def _step_one(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])
        for weights, gradients, means, squares in zip(*(t.view(-1).split(_SLICE) for t in tensors), strict=True):
            adamw(
                [weights],
                [gradients],
                [means],
                [squares],
                [],
                [state["step"].clone()],  # every call counts a step
                foreach=False,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        state["step"] += 1


class PartOptimizer:
    """The optimizer of the parameters that train on one side."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], section: OptimizerSection, num_training_steps: int
    ) -> None:
        """Take parameters by their names in the whole model, in its order, and the steps the schedule runs over."""
        self._named = dict(parameters)
        self._parameters = list(parameters.values())
        self._section = section
        self._optimizer = self._build()
        # get_scheduler is used for its curve alone: which step it is comes with each commit
        reference = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
        schedule = get_scheduler(
            section.lr_scheduler_type,
            reference,
            num_warmup_steps=section.warmup_steps,
            num_training_steps=num_training_steps,
        )
        self._curve = schedule.lr_lambdas[0] if hasattr(schedule, "lr_lambdas") else lambda _: 1.0
        # after its last step a cosine would rise again
        self._last = num_training_steps if section.ends_at_zero and num_training_steps else None

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1, as transformers' Trainer would use it."""
        at = step - 1 if self._last is None else min(step - 1, self._last)
        return self._section.learning_rate * float(self._curve(at))

    def norms(self) -> Tensor:
        """Return the norm of each gradient (float32, P), -1 where a parameter has none."""
        return norms_of([parameter.grad for parameter in self._parameters])

    def step(self, step: int, clip_coefficient: float, learning_rate: float | None = None) -> None:
        """Scale the gradients, apply them with this learning rate or else the schedule's, and forget them."""
        if not self._parameters:
            return
        if clip_coefficient != 1.0:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(clip_coefficient)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(step) if learning_rate is None else learning_rate
        self._optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return the weights and the optimizer's moments, by the weights' names; the tensors are the live ones."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            tensors[name] = parameter.detach()
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{name}{_MOMENT}{key}"] = value
        return tensors

    def moments(self) -> dict[str, Tensor]:
        """Return of `state` the moments alone."""
        return {name: value for name, value in self.state().items() if is_moment(name)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to what `state` returned, forgetting gradients; every weight must be there."""
        self.discard()
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(tensors[name])
        self.load_moments(tensors)

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with the moments among these tensors of a `state`, and no others."""
        self.reset_state()
        for name, value in tensors.items():
            owner, is_moment, key = name.rpartition(_MOMENT)
            if is_moment:
                parameter = self._named[owner]
                # AdamW counts its steps on the CPU, whatever device the weights are on
                device = "cpu" if key == "step" else parameter.device
                self._optimizer.state[parameter][key] = value.to(device, copy=True)

    def reset_state(self) -> None:
        """Forget the moments, as at the first step."""
        self._optimizer = self._build()

    def _build(self) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in self._parameters if p.ndim >= 2], "weight_decay": self._section.weight_decay},
            {"params": [p for p in self._parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        if not self._parameters:
            groups = [{"params": [nn.Parameter(torch.zeros(()))], "weight_decay": 0.0}]  # torch refuses an empty list
        if self._section.optim == "sgd":
            return torch.optim.SGD(groups, lr=self._section.learning_rate)
        betas = (self._section.adam_beta1, self._section.adam_beta2)
        return SlicedAdamW(groups, lr=self._section.learning_rate, betas=betas, eps=self._section.adam_epsilon)


def is_moment(name: str) -> bool:
    """Tell an optimizer's moment from a weight, by its name in a state."""
    return _MOMENT in name


def norms_of(gradients: Sequence[Tensor | None]) -> Tensor:
    """Return the norm of each gradient (float32), -1 where there is none."""
    return torch.tensor(
        [NO_GRADIENT if g is None else float(torch.linalg.vector_norm(g, 2.0, dtype=sum_dtype(g))) for g in gradients],
        dtype=torch.float32,
    )


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type in which such tensors are added up and measured: float32 for types with fewer bits."""
    return torch.promote_types(tensor.dtype, torch.float32)


def clip_coefficient(norms_in_model_order: Sequence[float], max_grad_norm: float) -> float:
    """Return what `torch.nn.utils.clip_grad_norm_` would multiply all gradients by; 1.0 when `max_grad_norm` is 0."""
    norms = [norm for norm in norms_in_model_order if norm != NO_GRADIENT]
    if max_grad_norm <= 0 or not norms:
        return 1.0
    total = torch.linalg.vector_norm(torch.tensor(norms, dtype=torch.float32), 2.0)
    return float((max_grad_norm / (total + 1e-6)).clamp(max=1.0))
