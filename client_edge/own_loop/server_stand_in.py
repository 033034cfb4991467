"""What stands for the server's blocks in a model of an own loop, and what a checkpoint holds of them."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from client_edge.generating.generation import GenerationCache
from client_edge.own_loop.proxies import proxy_name
from client_edge.own_loop.remote_backbone import RemoteBackbone
from client_edge.own_loop.remote_blocks import OwnLoopBlocks
from splitfl.models.stand_in import StandIn

# The name in a model's state of the commit that the server's blocks are of.
_COMMIT = "commit"
# The name that TRL gives to a frozen copy of an adapter, which it takes for the reference.
_REFERENCE_ADAPTER = "ref"


class RemoteState(nn.Module):
    """What a checkpoint holds of the server's blocks: the commit that they are of; reading it brings them back."""

    def __init__(self, backbone: RemoteBackbone) -> None:
        super().__init__()
        self._backbone = backbone
        self.register_buffer(_COMMIT, torch.zeros(1, dtype=torch.int64))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Have the server keep what it has, and write down the commit that names it."""
        destination[prefix + _COMMIT] = torch.tensor([self._backbone.keep()])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *_: object, **__: object) -> None:
        """Bring the server back to the commit that is written there; raise `Refused` if it declines."""
        if prefix + _COMMIT in state_dict:
            self._backbone.go_back(int(state_dict[prefix + _COMMIT].item()))


class _RemoteAdapterState(RemoteState, BaseTunerLayer):  # type: ignore[misc]  # peft has no types
    """The same in a model that peft has put adapters into: an adapter's file holds the state of peft's layers only."""

    adapter_layer_names = ()
    other_param_names = ()


class ServerStandIn(StandIn):
    """Stands for the server's blocks, with its trained tensors as proxies, which are nobody's state."""

    def __init__(self, remote: OwnLoopBlocks, number: int, *, gives_tuple: bool = False) -> None:
        super().__init__(remote, number, gives_tuple=gives_tuple)
        self._server = remote
        self._owner: weakref.ref[nn.Module] | None = None
        self.remote_state = RemoteState(remote.backbone)
        for name, proxy in remote.proxies.by_name.items():
            self.register_parameter(proxy_name(name), proxy)

    def watch(self, owner: nn.Module) -> None:
        """Take each call's mask and positions from `owner`, and look in it for adapters."""
        super().watch(owner)
        self._owner = weakref.ref(owner)

    def _run(self, hidden_BSD: Tensor) -> Tensor:
        """Return the server's activations, without its adapters where this side's are turned off."""
        return self._server(
            hidden_BSD,
            self._mask_BS,
            self._position_ids_BS,
            training=self.training,
            adapters_off=_are_off(self._adapted()),
        )

    def _new_cache(self) -> GenerationCache:
        return self._server.backbone.generator.new_cache(adapters_off=_are_off(self._adapted()))

    def _adapted(self) -> list[BaseTunerLayer]:
        owner = None if self._owner is None else self._owner()
        modules = [] if owner is None else owner.modules()
        return [each for each in modules if isinstance(each, BaseTunerLayer) and not isinstance(each, RemoteState)]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save nothing but the state of the remote blocks, which is a child's."""
        if self._adapted() and not isinstance(self.remote_state, _RemoteAdapterState):
            # not earlier: peft takes a model that has one of its layers for one that it has wrapped before
            self.remote_state = _RemoteAdapterState(self._server.backbone)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *_: object, **__: object) -> None:
        pass


def _are_off(adapted: Sequence[BaseTunerLayer]) -> bool:
    """Tell whether adapters sit out, or a copy of them from before the training is in their place."""
    return bool(adapted) and all(
        layer.disable_adapters or layer.active_adapters == [_REFERENCE_ADAPTER] for layer in adapted
    )
