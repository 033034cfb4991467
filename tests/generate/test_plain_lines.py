"""What is generated reaches the terminal as text: the server decides which tokens it is."""

import pytest
from conftest import tiny_tokenizer

from client_edge.generating.speak import plain_lines, printer


@pytest.mark.parametrize("steers", ["\x1b]0;owned\x07", "\x1b[2J", "\r", "\x9b2J", "\u202e", "\u2066", "\x00", "\x7f"])
def test_what_steers_a_terminal_does_not_reach_it(steers: str) -> None:
    shown = plain_lines(f"a{steers}b\n")
    assert not set(shown) & set("\x00\x07\x1b\r\x7f\x9b\u202e\u2066")
    assert shown[0] == "a"
    assert shown[-2:] == "b\n"


@pytest.mark.parametrize(
    "text",
    ["line\n\tline", "d\u00e9j\u00e0\u00a0vu !", "\u0645\u06cc\u200c\u0634\u0648\u062f", "\U0001f469\u200d\u2695"],
)
def test_text_stays_as_it_is(text: str) -> None:
    assert plain_lines(text) == text


def test_so_is_what_is_printed_while_it_is_generated(capsys: pytest.CaptureFixture[str]) -> None:
    printer(tiny_tokenizer()).on_finalized_text("a\x1b[2Jb", stream_end=True)
    assert capsys.readouterr().out == "a?[2Jb\n"
