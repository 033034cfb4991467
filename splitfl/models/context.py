"""How much text a model's context has room for."""

from typing import Any


def context_of(config: Any) -> int | None:
    """Return the positions that a transformers config has, None where it knows no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def room_after(config: Any, num_given: int, wanted: int) -> int:
    """Return how many of the wanted tokens, at least 1, may follow those given; the last needs no room of its own."""
    context = context_of(config)
    return min(wanted, max(1, context - num_given + 1)) if context else wanted
