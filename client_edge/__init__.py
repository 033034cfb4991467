"""The client: keeps the bottom, the top, the text and the labels."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client_edge.own_loop.connected import connect, disconnect, own_layers

__all__ = ["connect", "disconnect", "own_layers"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only for a caller of `connect`: `splitfl --help` passes here too."""
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("client_edge.own_loop.connected"), name)
    raise AttributeError(f"module 'client_edge' has no attribute {name!r}")
