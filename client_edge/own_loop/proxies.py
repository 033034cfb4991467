"""Parameters that stand for the server's on an own-loop client, which clips itself.

`clip_grad_norm_` takes the norm of the per-tensor norms in the order of the parameters, and scales every gradient by
one coefficient. A proxy's gradient is `[norm of the remote gradient, a tiny probe]`: its own norm is the remote one's,
bit for bit (from 1e-19 to 1e19, where the probe's square vanishes). So the total is the whole model's. The probe's
value afterwards tells the coefficient, exactly, since it is a power of two.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from splitfl.errors import ModelError, RemoteProtocolError
from splitfl.training.optimizer import NO_GRADIENT

_PROBE = 2.0**-80


class Proxy(nn.Parameter):
    """Stands for one tensor that trains on the server; whether it trains is the server's setting, not the client's."""

    @property
    def requires_grad(self) -> bool:
        """True, whatever a library that freezes all but its adapters has set."""
        return True

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        pass

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Leave it as it is."""
        return self


class Proxies:
    """The proxies of one model, in the model's order."""

    def __init__(self, trainable: Mapping[str, Tensor]) -> None:
        """Make one for each tensor that trains on the server, of its type: clipping groups gradients by type."""
        self.by_name: dict[str, Proxy] = {
            name: Proxy(torch.zeros(2, dtype=tensor.dtype)) for name, tensor in trainable.items()
        }
        self._shown: list[Tensor | None] = [None] * len(self.by_name)

    @property
    def _all(self) -> Sequence[Proxy]:
        return list(self.by_name.values())

    def show(self, norms_Q: Tensor) -> None:
        """Put the remote gradients' norms where the loop's clipping finds them; -1 is no gradient."""
        if len(norms_Q) != len(self.by_name):
            raise RemoteProtocolError(f"{len(norms_Q)} norms of {len(self.by_name)} tensors that train on the server")
        for number, (proxy, norm) in enumerate(zip(self._all, norms_Q.tolist(), strict=True)):
            has_none = norm == NO_GRADIENT
            self._shown[number] = None if has_none else torch.tensor([norm, _PROBE], dtype=proxy.dtype)
            proxy.grad = None if has_none else torch.tensor([norm, _PROBE], dtype=proxy.dtype, device=proxy.device)

    def clear(self) -> None:
        """Leave no gradient that an optimizer could apply to a proxy."""
        self._shown = [None] * len(self.by_name)
        for proxy in self._all:
            proxy.grad = None

    def coefficient(self) -> float | None:
        """Return what the loop has scaled the remote gradients by, 1.0 if nothing; None when it has zeroed them.

        Raises `ModelError` for whatever cannot be done to the remote gradients: anything but one scaling of them all.
        """
        shown = [(proxy.grad, was) for proxy, was in zip(self._all, self._shown, strict=True) if was is not None]
        found = {_scaled_by(now, was) for now, was in shown}
        if found <= {None, 0.0} and shown:
            return None
        if len(found) > 1 or None in found:
            raise ModelError(
                "the server's gradients were scaled by different factors, tensor by tensor: only what scales all"
                " gradients alike, such as clip_grad_norm_ over model.parameters(), can be done to them"
            )
        return found.pop() if found else 1.0


def _scaled_by(now: Tensor | None, was: Tensor) -> float | None:
    if now is None:
        return None
    probe = now[1].item() / _PROBE
    expected = was[0] * probe
    if not torch.allclose(now[0].cpu(), expected, rtol=8 * torch.finfo(was.dtype).eps, atol=0.0):
        raise ModelError(
            "the server's gradients cannot be clipped by value or have anything added: they are on the server, and only"
            " their norms are here; use clip_grad_norm_"
        )
    return probe


def proxy_name(name: str) -> str:
    """Return the attribute name for the proxy of a tensor; it says what kind it is, as filters by name expect."""
    return "remote_" + name.replace(".", "_")
