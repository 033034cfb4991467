"""`splitfl generate` and `splitfl chat`, as a person starts them."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tokenizer
from generate.host import Host
from generate.test_near import whole_model
from transformers import PreTrainedModel

from client_edge.speak_command import Chat, Generate
from splitfl.command_line import run_one

TEMPLATE = "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }};{% endfor %}assistant:"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return whole_model("llama")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel) -> Iterator[Callable[[bool], Path]]:
    """Return the settings of a client of a server whose tokenizer has a chat template, or has none."""
    hosts: dict[bool, tuple[Host, Path]] = {}

    def settings(chats: bool) -> Path:
        if chats not in hosts:
            folder = tmp_path_factory.mktemp("served")
            model.save_pretrained(folder / "model")
            tokenizer = tiny_tokenizer()
            tokenizer.chat_template = TEMPLATE if chats else None
            tokenizer.save_pretrained(folder / "model")
            host, path = Host(folder, folder / "model"), folder / "client.toml"
            mine = host.client().client
            path.write_text(
                f'[client]\nclient_id = "writer"\nserver_address = "{host.address}"\n'
                f'output_dir = "{mine.output_dir}"\ncache_dir = "{mine.cache_dir}"\n'
            )
            hosts[chats] = (host, path)
        return hosts[chats][1]

    yield settings
    for host, _ in hosts.values():
        host.stop()


def wanted(model: PreTrainedModel, prompt: str, num: int, **how: Any) -> str:
    """Return what the unsplit model says."""
    tokenizer = tiny_tokenizer()
    given = tokenizer(prompt, return_tensors="pt")
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    said = model.generate(**inputs, max_new_tokens=num, do_sample=False, pad_token_id=2, **how)
    return str(tokenizer.decode(said[0, given["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_prompt(served: Any, model: PreTrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--accept", "--config", str(served(False)), "--max-new-tokens", "8"]
    assert run_one("generate", Generate(), ["--accept", *how, "--prompt", "hello"]) == 0
    assert capsys.readouterr().out == wanted(model, "hello", 8) + "\n"
    assert run_one("generate", Generate(), ["--accept", *how, "--prompt", "hello", "--num-beams", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"prompt": "hello", "text": wanted(model, "hello", 8, num_beams=2)}


def test_a_prompt_from_standard_input(
    served: Any, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert run_one("generate", Generate(), ["--accept", "--config", str(served(False)), "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == wanted(model, "hello", 8) + "\n"


def test_a_chat_keeps_its_turns(
    served: Any, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\nmore\n"))
    assert run_one("chat", Chat(), ["--accept", "--config", str(served(True)), "--max-new-tokens", "4"]) == 0
    first = wanted(model, "user:hi;assistant:", 4)
    second = wanted(model, f"user:hi;assistant:{first};user:more;assistant:", 4)
    assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_a_chat_without_a_template(served: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_one("chat", Chat(), ["--accept", "--config", str(served(False))]) == 4
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--prompt", ""], "an empty prompt"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature must be 0 or more, got -1.0"),
        (["--prompt", "a", "--top-p", "0"], "--top-p must be above 0"),
        (["--prompt", "a", "--num-beams", "0"], "--num-beams must be 1 or more, got 0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens must be 1 or more, got 0"),
    ],
)
def test_what_means_nothing(more: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_one("generate", Generate(), ["--config", "client.toml", *more]) != 0
    assert text in capsys.readouterr().err
