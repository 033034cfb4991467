"""Conversations as text: the tokenizer's chat template, and which stretches of it are the assistant's to learn."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from splitfl.errors import DataError

Message = Mapping[str, str]

_LEARNED_ROLE = "assistant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A whole conversation as the model would read it."""

    text: str = field(repr=False)
    learned: tuple[tuple[int, int], ...]
    """The assistant's turns and their ends, as stretches of `text`: the first character, and the one after the last."""


def messages_in(value: object, where: str) -> list[Message]:
    """Check a conversation; raise `DataError` unless it is a list of objects with `role` and `content`, both text.

    An empty list is none either.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: messages are no list of at least one object with a role and a content")
    for number, message in enumerate(value, start=1):
        match message:
            case {"role": str(), "content": str()}:
                continue
        raise DataError(f"{where}: message {number} is no object with a role and a content, both strings")
    return value


def render(tokenizer: Any, messages: Sequence[Message], where: str, *, num_given: int = 0) -> Conversation:
    """Put a conversation through the tokenizer's chat template.

    The assistant's turns after the first `num_given` messages are learned. Each is found by rendering the conversation
    up to it, so a template that changes earlier turns later on is refused. Raises `DataError` if there is no turn to
    learn, no template, or one that refuses the conversation.
    """
    text = _rendered(tokenizer, messages, where)
    learned = tuple(_turns(tokenizer, messages, num_given, text, where))
    if not learned:
        raise DataError(f"{where}: no message of the role {_LEARNED_ROLE!r} to learn from")
    return Conversation(text=text, learned=learned)


def _turns(
    tokenizer: Any, messages: Sequence[Message], num_given: int, text: str, where: str
) -> Iterator[tuple[int, int]]:
    for number, message in enumerate(messages):
        if number < num_given or message["role"] != _LEARNED_ROLE:
            continue
        before = _rendered(tokenizer, messages[:number], where, asks=True) if number else ""
        with_it = _rendered(tokenizer, messages[: number + 1], where)
        if not text.startswith(with_it) or not with_it.startswith(before):
            raise DataError(
                f"{where}: the model's chat template writes message {number + 1} differently when others follow, so the"
                " assistant's turns cannot be told apart; give an example a conversation that ends with that turn"
            )
        yield len(before), len(with_it)


def _rendered(tokenizer: Any, messages: Sequence[Message], where: str, *, asks: bool = False) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where}: messages need a chat template and this model's tokenizer has none: write prompt and completion,"
            " or ask the server's operator for a model that was made for chat"
        )
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks))
    except Exception:  # noqa: BLE001  # a template is a peer's program, in jinja's sandbox; its text may quote ours
        raise DataError(
            f"{where}: the model's chat template refuses this conversation: it may want the roles user and assistant in"
            " turns, or know no role system"
        ) from None
