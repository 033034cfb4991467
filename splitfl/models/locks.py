"""One lock for library code that patches torch while it runs: two threads at it would leave torch patched for good."""

import threading

TORCH_IS_PATCHED = threading.Lock()
"""Held while transformers builds a model or peft adds adapters without memory."""
