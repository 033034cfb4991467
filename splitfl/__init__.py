"""splitfl: organisations that may not share their text train a causal LM together.

Clients keep text, labels, embedding and LM head; a server computes the blocks in between. See `splitfl --help`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitfl.models.split import join, split

__version__ = "0.1.0"
__all__ = ["__version__", "join", "split"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something of theirs is asked for: `splitfl --help` must not wait."""
    if name in ("split", "join"):
        from splitfl.models import split as module

        return getattr(module, name)
    raise AttributeError(f"module 'splitfl' has no attribute {name!r}")
