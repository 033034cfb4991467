"""A tokenizer that comes to no end ends the client, and no other does."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tokenizer

from client_edge.text.overseer import Overseer

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MESSAGES = [{"role": "user", "content": "a"}]


def test_it_does_what_the_tokenizer_does() -> None:
    ended: list[str] = []
    tokenizer = tiny_tokenizer()
    with Overseer(tokenizer, patience_s=60.0, end=ended.append) as overseen:
        assert overseen("abc")["input_ids"] == tokenizer("abc")["input_ids"]
        assert overseen.eos_token_id == tokenizer.eos_token_id
        assert overseen.chat_template is None
    assert ended == []
    assert "overseer" not in {thread.name for thread in threading.enumerate()}


class Slow:
    """Takes a second for a text."""

    def __call__(self, text: str, **_: bool) -> dict[str, Any]:
        threading.Event().wait(1.0)
        return {"input_ids": []}


@pytest.mark.parametrize(("text", "num_ended"), [("a", 1), ("a" * 30_000, 0)])
def test_a_long_text_may_take_longer(text: str, num_ended: int) -> None:
    ended: list[str] = []
    with Overseer(Slow(), patience_s=0.1, end=ended.append) as overseen:
        overseen(text)
    assert len(ended) == num_ended


def test_a_template_without_end_ends_the_process_with_a_sentence(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ENDLESS
    tokenizer.save_pretrained(tmp_path)
    program = (
        "import sys; from transformers import AutoTokenizer; from client_edge.text.overseer import Overseer\n"
        "with Overseer(AutoTokenizer.from_pretrained(sys.argv[1]), patience_s=1.0) as overseen:\n"
        f"    overseen.apply_chat_template({MESSAGES!r}, tokenize=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 4, done.stderr
    assert "has worked at one text for more than 1 s" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
