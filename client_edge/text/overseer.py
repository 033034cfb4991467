"""Ends a client whose server's tokenizer or chat template never comes to an end with one of its texts.

Both are a peer's programs: a template may have loops within loops, a pattern may try every way there is. Neither can be
interrupted, so the process is ended, from another thread.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

_LOOK_EVERY_S = 0.25
# Any tokenizer in use does 100,000 characters a second and more.
_PATIENCE_S = 60.0
_CHARACTERS_PER_S = 10_000
_EXIT_CODE = 4


class Overseer:
    """A tokenizer that is looked after while it is at work; use it in a `with`, from one thread."""

    def __init__(
        self, tokenizer: Any, *, patience_s: float = _PATIENCE_S, end: Callable[[str], None] | None = None
    ) -> None:
        """`end` is told why the process is to end; it says so and does it if it is not given."""
        self._tokenizer = tokenizer
        self._patience_s = patience_s
        self._end = end or _end_at_once
        self._until_s: float | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._oversee, name="overseer", daemon=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **options: bool) -> Any:
        """Return what the tokenizer does."""
        return self._within(len(text), lambda: self._tokenizer(text, **options))

    def apply_chat_template(self, messages: list[Any], **options: Any) -> Any:
        """Return what the tokenizer does."""
        num_characters = sum(len(text) for message in messages for text in message.values())
        return self._within(num_characters, lambda: self._tokenizer.apply_chat_template(messages, **options))

    def _within(self, num_characters: int, work: Callable[[], Any]) -> Any:
        self._until_s = time.monotonic() + self._patience_s + num_characters / _CHARACTERS_PER_S
        try:
            return work()
        finally:
            self._until_s = None

    def _oversee(self) -> None:
        while not self._stopping.wait(_LOOK_EVERY_S):
            until_s = self._until_s
            if until_s is not None and time.monotonic() > until_s:
                self._end(
                    f"the server's tokenizer or chat template has worked at one text for more than"
                    f" {self._patience_s:g} s: it is not used, and this client ends; tell the server's operator"
                )
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()


def _end_at_once(reason: str) -> None:
    with suppress(OSError):
        os.write(2, f"splitfl client: {reason}\n".encode())
    os._exit(_EXIT_CODE)
