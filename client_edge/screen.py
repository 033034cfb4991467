"""Where a client's sentences go: standard error."""

from rich.console import Console


def screen() -> Console:
    """Return it: on a terminal lines end between words, elsewhere a sentence is a line."""
    console = Console(stderr=True, emoji=False)  # a key may have :x: in it
    console.soft_wrap = not console.is_terminal
    return console
