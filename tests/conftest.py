"""What many tests need: tiny random models on disk with a tokenizer, and whole runs in threads of this process."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start: several share the cores

import functools
import random
import string
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from splitfl.commands import fleet

free_port = fleet.free_port
VOCABULARY = 259

# A client's policy for runs whose subject is another.
ALLOWS_ALL: dict[str, Any] = {
    "min_bottom_layers": 0,
    "min_top_layers": 0,
    "allow_embeddings": True,
    "allow_answers": True,
    "max_learning_rate": 1e6,
}

# Every family takes what it knows of these; 4 blocks, 32 wide.
_TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 32,
    "rotary_dim": 4,
    "num_layers": 4,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 2]],
    "n_positions": 64,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "sliding_window": 8,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run of the tests write what it would compare: docs/models.md, or the traces of tests/traces."""
    parser.addoption(
        "--write-models", action="store_true", help="write docs/models.md from what the families' tests find"
    )
    parser.addoption("--rewrite-traces", action="store_true", help="write down what happens in tests/traces now")


def tiny_config(family: str, **overrides: Any) -> Any:
    """Return a small config of a family, dropout 0."""
    known = AutoConfig.for_model(family)
    names = {name for name in _TINY if hasattr(known, name)}
    small = {name: _TINY[name] for name in names}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(family, **{**small, **tokens, **overrides})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes: one token a letter, and three special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: number for number, letter in enumerate(letters, start=3)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def write_model(directory: Path, family: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny random model with a tokenizer and return its directory."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny random model with a tokenizer and return its directory."""
    return lambda family="llama", *, name="model", **more: write_model(tmp_path / name, family, **more)


def write_text(path: Path, *, num_lines: int, seed: int, lengths: tuple[int, int] = (4, 12)) -> Path:
    """Write lines of random letters, a token each; equal bounds give rows of equal length."""
    draw = random.Random(seed)
    lines = ["".join(draw.choices(string.ascii_letters, k=draw.randint(*lengths))) for _ in range(num_lines)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@dataclass
class Finished:
    """The files and errors of a run in threads."""

    run_dir: Path
    folders: dict[str, Path]
    """Each client's own folder."""
    errors: dict[str, Exception]
    """By client id, "server" for the server's."""


def train_together(
    folder: Path,
    server: Mapping[str, Any],
    clients: Mapping[str, Mapping[str, Any]],
    *,
    transport: str = "inproc",
    address: str = "",
    client_address: str = "",
) -> Finished:
    """Run a server and its clients to their end, each in a thread, over a real transport."""
    from client_edge.part.run import take_part
    from server_backbone.host import serve
    from splitfl.config.trees import ClientConfig, ServerConfig

    where = folder / f"run-{len(list(folder.glob('run-*')))}"
    where.mkdir()
    address = (
        address
        or {
            "inproc": f"inproc://{where}",
            "ipc": f"ipc://{where}/socket",
            "tcp": f"tcp://127.0.0.1:{free_port()}",
        }[transport]
    )
    own = {"address": address, "runs_dir": where, "run_id": "run", "cache_dir": folder / "cache"}
    tree = {**server, "server": {**own, **server.get("server", {})}}
    tree["federation"] = {"wait_timeout": 20.0, **server.get("federation", {})}
    config = ServerConfig.from_tree(tree, source="test")
    finished = Finished(run_dir=where / "run", folders={}, errors={})

    def guarded(name: str, work: Callable[[], object]) -> threading.Thread:
        def target() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001  # whatever ends a thread is the test's to see
                finished.errors[name] = error

        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        return thread

    def client(name: str, data: Mapping[str, Any]) -> Callable[[], object]:
        mine = {"client_id": name, "server_address": client_address or address, "connect_timeout": 30.0}
        folders = {"output_dir": where / "clients", "cache_dir": folder / "cache" / name}
        own = {"client": {**mine, **folders, **data.get("client", {})}, "policy": ALLOWS_ALL}
        tree = {**own, "data": {key: value for key, value in data.items() if key != "client"}}
        finished.folders[name] = where / "clients" / "run" / name
        return lambda: take_part(ClientConfig.from_tree(tree, source="test"), accept=True)

    threads = [guarded("server", lambda: serve(config))]
    threads += [guarded(name, client(name, data)) for name, data in clients.items()]
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return finished


@pytest.fixture
def federate(tmp_path: Path) -> Callable[..., Finished]:
    """Run a server and its clients to their end: see `train_together`."""
    return functools.partial(train_together, tmp_path)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
