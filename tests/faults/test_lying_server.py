"""Lies of a server that a client must not believe: each against the real client, in one thing at a time.

docs/reliability.md has the table. Nothing may be written outside the client's folders, nothing sent beyond what was
accepted, and what is said about it is a sentence.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import free_port, tiny_config, tiny_tokenizer, write_text
from faults.lying_server import Lie, LyingServer
from forked import Forked
from packed import packed
from safetensors.torch import save
from served import ServedRun
from transformers import AutoModelForCausalLM

from splitfl.config.trees import RunConfig, ServerConfig
from splitfl.protocol.messages import (
    BackwardDone,
    Chunk,
    Committed,
    ForwardDone,
    Goodbye,
    Merged,
    Message,
    Pong,
    Refusal,
    Resumed,
    RoundOpened,
    RoundsEnded,
    StepRefused,
    TensorFrames,
    Welcome,
)

pytestmark = pytest.mark.slow

PROTOCOL, MODEL, POLICY, REFUSED = 5, 4, 11, 8
# What a client says before it has accepted anything, and while it only fetches.
JOINING, FETCHING = {"Hello"}, {"Hello", "Attach", "Ping", "Leave", "Fetch"}
TRAINING = FETCHING | {"Resume", "Ready", "Report", "Forward", "Backward", "Commit", "Upload", "Goodbye"}
HOSTILE = "\x1b]0;owned\x07\x1b[2J" * 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One lie, how the client ends, and what it may have said by then."""

    lie: Lie
    code: int
    says: str
    heard: set[str]


def on(kind: type[Message], **changed: Any) -> Lie:
    """Change fields of every message of a kind."""
    return lambda message: replace(message, **changed) if isinstance(message, kind) else message


def welcome(change: Callable[[Welcome], Welcome]) -> Lie:
    return lambda message: change(message) if isinstance(message, Welcome) else message


def settings(section: str, **values: Any) -> Lie:
    """Announce other settings, read and fingerprinted as true ones are."""

    def change(message: Welcome) -> Welcome:
        tree = json.loads(message.settings)
        tree[section] |= values
        run = RunConfig.from_tree(tree, source="a lie")
        return replace(message, settings=run.to_json(), fingerprint=run.fingerprint())

    return welcome(change)


def announced(name: str, *, size: int | None = None, digest: str | None = None) -> Lie:
    def change(message: Welcome) -> Welcome:
        at = message.file_names.index(name)
        sizes, digests = list(message.file_sizes), list(message.file_hashes)
        sizes[at] = sizes[at] if size is None else size
        digests[at] = digests[at] if digest is None else digest
        return replace(message, file_sizes=tuple(sizes), file_hashes=tuple(digests))

    return welcome(change)


def instead(name: str, content: bytes) -> Lie:
    """Offer another file under this name, announced as it is."""
    offered = announced(name, size=len(content), digest=hashlib.sha256(content).hexdigest())

    def lie(message: Message) -> Message:
        if isinstance(message, Chunk) and message.name == name:
            return replace(message, content=raw(content[message.offset :]))
        return offered(message)  # type: ignore[return-value]

    return lie


def raw(content: bytes) -> TensorFrames:
    return TensorFrames(dtype="u8", shape=(len(content),), buffers=(content,))


def chunk(change: Callable[[bytes], bytes]) -> Lie:
    def lie(message: Message) -> Message:
        if not isinstance(message, Chunk):
            return message
        return replace(message, content=raw(change(b"".join(map(bytes, message.content.buffers)))))

    return lie


def filled(value: float) -> Callable[[TensorFrames], TensorFrames]:
    return lambda frames: packed(torch.full(frames.shape, value), 1 << 18)


def activations(change: Callable[[TensorFrames], TensorFrames]) -> Lie:
    return lambda m: replace(m, hidden_BSD=change(m.hidden_BSD)) if isinstance(m, ForwardDone) else m


def layers(change: Callable[[TensorFrames], TensorFrames]) -> Lie:
    return lambda m: replace(m, layers=tuple(map(change, m.layers))) if isinstance(m, Merged) else m


def gradients(change: Callable[[TensorFrames], TensorFrames]) -> Lie:
    def lie(message: Message) -> Message:
        if not isinstance(message, BackwardDone) or message.gradient_BSD is None:
            return message
        return replace(message, gradient_BSD=change(message.gradient_BSD))

    return lie


def in_bf16(frames: TensorFrames) -> TensorFrames:
    return packed(torch.zeros(frames.shape, dtype=torch.bfloat16), 1 << 18)


def of_another_shape(_: TensorFrames) -> TensorFrames:
    return packed(torch.zeros(1, 1, 1), 1 << 18)


def twice(kind: type[Message]) -> Lie:
    return lambda message: (message, message) if isinstance(message, kind) else message


def followed_by(kind: type[Message], more: Message) -> Lie:
    return lambda message: (message, more) if isinstance(message, kind) else message


def instead_of(kind: type[Message], other: Message) -> Lie:
    return lambda message: other if isinstance(message, kind) else message


def of_another_client(message: Message) -> Message:
    return replace(message, request_id=message.request_id + 1) if isinstance(message, ForwardDone) else message


def once_joined(lie: Lie) -> Lie:
    """End the session once, in the middle of a step, and tell the lie when the client has come back."""
    has_ended: list[bool] = []

    def told(message: Message) -> Message:
        if isinstance(message, ForwardDone) and not has_ended:
            has_ended.append(True)
            return Refusal(code="NO_SESSION", reason="gone")
        return lie(message) if has_ended else message  # type: ignore[return-value]

    return told


def refused_far_ahead(message: Message) -> Message:
    if not isinstance(message, Committed):
        return message
    return StepRefused(step=message.step, next_step=1 << 60, reason="because")


def back_for_ever() -> Lie:
    """Answer every Resume so, also one that the honest server refuses because it has answered one already."""
    said: list[Message] = []

    def lie(message: Message) -> Message:
        if isinstance(message, Resumed):
            said.append(replace(message, verdict="rewind", step=0))
        return said[-1] if said and isinstance(message, Resumed | Refusal) else message

    return lie


CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 259,
}


def config(**changed: Any) -> Lie:
    return instead("config.json", json.dumps(CONFIG | changed).encode())


CASES = {
    "run id: a path upwards": Case(
        lie=on(Welcome, run_id="../../outside"), code=PROTOCOL, says="run_id", heard=JOINING
    ),
    "run id: an absolute path": Case(
        lie=on(Welcome, run_id="/srv/outside"), code=PROTOCOL, says="run_id", heard=JOINING
    ),
    "hash: an absolute path": Case(
        lie=announced("config.json", digest="/srv/outside"), code=PROTOCOL, says="hash of config.json", heard=JOINING
    ),
    "file: another name": Case(
        lie=on(
            Welcome,
            file_names=("config.json", "client.safetensors", "modeling.py"),
            file_sizes=(1, 1, 1),
            file_hashes=("0" * 64,) * 3,
        ),
        code=PROTOCOL,
        says="modeling.py",
        heard=JOINING,
    ),
    "size: a config of a terabyte": Case(
        lie=announced("config.json", size=1 << 40), code=PROTOCOL, says="the most that a client takes", heard=JOINING
    ),
    "size: weights of a petabyte": Case(
        lie=announced("client.safetensors", size=1 << 50), code=POLICY, says="max_file_bytes", heard=JOINING
    ),
    "chunk: longer than announced": Case(
        lie=chunk(lambda content: content + b"x" * 1000), code=PROTOCOL, says="a piece of", heard=FETCHING
    ),
    "chunk: other bytes": Case(
        lie=chunk(lambda content: bytes(len(content))), code=PROTOCOL, says="another hash", heard=FETCHING
    ),
    "chunk: empty, for ever": Case(lie=chunk(lambda _: b""), code=PROTOCOL, says="piece", heard=FETCHING),
    "chunk: of another file": Case(lie=on(Chunk, name=HOSTILE[:200]), code=PROTOCOL, says="piece", heard=FETCHING),
    "class: code of its own": Case(
        lie=config(auto_map={"AutoModel": "evil.Model"}), code=MODEL, says="its own code", heard=FETCHING
    ),
    "class: a kernel of the hub": Case(
        lie=config(_attn_implementation="somebody/kernel"), code=MODEL, says="names code", heard=FETCHING
    ),
    "class: no tokenizer": Case(
        lie=config(tokenizer_class="AutoModelForCausalLM"), code=MODEL, says="no tokenizer", heard=FETCHING
    ),
    "size: a billion blocks": Case(lie=config(num_hidden_layers=10**9), code=MODEL, says="more than", heard=FETCHING),
    "size: a matrix of terabytes": Case(
        lie=config(intermediate_size=1 << 30), code=MODEL, says="has shape", heard=FETCHING
    ),
    "weights: other tensors": Case(
        lie=instead("client.safetensors", save({"x": torch.zeros(3)})), code=MODEL, says="no tensor", heard=FETCHING
    ),
    "weights: no safetensors": Case(
        lie=instead("client.safetensors", b"\xff" * 100), code=MODEL, says="safetensors", heard=FETCHING
    ),
    "settings: no block below the cut": Case(
        lie=settings("model", bottom_layers=0), code=POLICY, says="min_bottom_layers", heard=JOINING
    ),
    "settings: no block above the cut": Case(
        lie=settings("model", top_layers=0), code=POLICY, says="min_top_layers", heard=JOINING
    ),
    "settings: embeddings train": Case(
        lie=settings("train", embeddings=True), code=POLICY, says="allow_embeddings", heard=JOINING
    ),
    "settings: answers through the server": Case(
        lie=settings("evaluation", measures=["rouge_l"]), code=POLICY, says="allow_answers", heard=JOINING
    ),
    "settings: a billion rounds": Case(
        lie=settings("federation", num_rounds=10**9), code=POLICY, says="max_rounds", heard=JOINING
    ),
    "settings: an hour of silence": Case(
        lie=settings("link", heartbeat_timeout=3600.0), code=POLICY, says="max_silence", heard=JOINING
    ),
    "settings: thirty years of silence": Case(
        lie=settings("link", heartbeat_timeout=1e9), code=PROTOCOL, says="heartbeat_timeout", heard=JOINING
    ),
    "settings: a learning rate of 1e9": Case(
        lie=settings("optimizer", learning_rate=1e9), code=POLICY, says="max_learning_rate", heard=JOINING
    ),
    "settings: another fingerprint": Case(
        lie=on(Welcome, fingerprint="0" * 64), code=PROTOCOL, says="fingerprint", heard=JOINING
    ),
    "text: a refusal that steers the terminal": Case(
        lie=lambda m: Refusal(code=HOSTILE, reason=HOSTILE) if isinstance(m, Welcome) else m,
        code=REFUSED,
        says="refused",
        heard=JOINING,
    ),
    "round: 2^60 steps": Case(
        lie=on(RoundOpened, num_steps=1 << 60), code=PROTOCOL, says="local_steps", heard=TRAINING
    ),
    "round: another first step": Case(
        lie=on(RoundOpened, first_step=1 << 60), code=PROTOCOL, says="begins with step", heard=TRAINING
    ),
    "round: the millionth": Case(lie=on(RoundOpened, round_number=10**6), code=PROTOCOL, says="round", heard=TRAINING),
    "resumed: back, and back again": Case(lie=back_for_ever(), code=PROTOCOL, says="go back again", heard=TRAINING),
    "resumed: back to the future": Case(
        lie=on(Resumed, verdict="rewind", step=99), code=PROTOCOL, says="going back to step 99", heard=TRAINING
    ),
    "activations: NaN": Case(lie=activations(filled(math.nan)), code=PROTOCOL, says="not finite", heard=TRAINING),
    "activations: 1e30": Case(lie=activations(filled(1e30)), code=PROTOCOL, says="max_rms", heard=TRAINING),
    "activations: another shape": Case(
        lie=activations(lambda _: packed(torch.zeros(1, 1, 1), 1 << 18)), code=PROTOCOL, says="shape", heard=TRAINING
    ),
    "clip coefficient: 1e9": Case(
        lie=on(Committed, clip_coefficient=1e9), code=PROTOCOL, says="clip coefficient", heard=TRAINING
    ),
    "clip coefficient: negative": Case(
        lie=on(Committed, clip_coefficient=-1.0), code=PROTOCOL, says="clip coefficient", heard=TRAINING
    ),
    "clip coefficient: NaN": Case(
        lie=on(Committed, clip_coefficient=math.nan), code=PROTOCOL, says="clip coefficient", heard=TRAINING
    ),
    "step: refused up to 2^60": Case(lie=refused_far_ahead, code=PROTOCOL, says="refused", heard=TRAINING),
    "merge: NaN": Case(lie=layers(filled(math.nan)), code=PROTOCOL, says="not finite", heard=TRAINING),
    "merge: 1e30": Case(lie=layers(filled(1e30)), code=PROTOCOL, says="max_rms", heard=TRAINING),
    "merge: another shape": Case(
        lie=layers(lambda _: packed(torch.zeros(1), 1 << 18)), code=PROTOCOL, says="layers", heard=TRAINING
    ),
    "merge: of another round": Case(lie=on(Merged, round_number=10**6), code=PROTOCOL, says="round", heard=TRAINING),
    "gradients: NaN": Case(lie=gradients(filled(math.nan)), code=PROTOCOL, says="not finite", heard=TRAINING),
    "gradients: 1e30": Case(lie=gradients(filled(1e30)), code=PROTOCOL, says="max_rms", heard=TRAINING),
    "gradients: another shape": Case(lie=gradients(of_another_shape), code=PROTOCOL, says="shape", heard=TRAINING),
    "gradients: another type": Case(lie=gradients(in_bf16), code=PROTOCOL, says="bf16", heard=TRAINING),
    "gradients: none": Case(
        lie=lambda m: replace(m, gradient_BSD=None) if isinstance(m, BackwardDone) else m,
        code=PROTOCOL,
        says="needs its gradient",
        heard=TRAINING,
    ),
    "activations: another type": Case(lie=activations(in_bf16), code=PROTOCOL, says="bf16", heard=TRAINING),
    "answer: to another client": Case(lie=of_another_client, code=PROTOCOL, says="was not asked for", heard=TRAINING),
    "answer: activations twice": Case(lie=twice(ForwardDone), code=PROTOCOL, says="was not asked for", heard=TRAINING),
    "answer: a gradient twice": Case(lie=twice(BackwardDone), code=PROTOCOL, says="was not asked for", heard=TRAINING),
    "answer: a merge twice": Case(lie=twice(Merged), code=PROTOCOL, says="not open here", heard=TRAINING),
    "answer: a round twice": Case(lie=twice(RoundOpened), code=PROTOCOL, says="was not asked for", heard=TRAINING),
    "answer: a piece twice": Case(lie=twice(Chunk), code=PROTOCOL, says="a piece of", heard=FETCHING),
    "answer: a second welcome": Case(lie=twice(Welcome), code=PROTOCOL, says="Welcome while waiting", heard=FETCHING),
    "answer: a client's words": Case(
        lie=followed_by(RoundOpened, Goodbye(metrics={})), code=PROTOCOL, says="not a server's", heard=TRAINING
    ),
    "answer: the end of rounds, in one": Case(
        lie=followed_by(RoundOpened, RoundsEnded(round_number=1, best_round=0, reason=HOSTILE, layers=())),
        code=PROTOCOL,
        says="was not asked for",
        heard=TRAINING,
    ),
    "resumed: layers of another model": Case(
        lie=on(Resumed, layers=(packed(torch.zeros(3), 1 << 18),)), code=PROTOCOL, says="layers", heard=TRAINING
    ),
    "resumed: a merge of no round": Case(
        lie=on(Resumed, awaits_merge=True), code=PROTOCOL, says="no round that it could be of", heard=TRAINING
    ),
    "resumed: step 2^62": Case(
        lie=on(Resumed, verdict="anew", step=1 << 62, commit_number=1 << 62),
        code=POLICY,
        says="max_bytes_sent is reached",
        heard=TRAINING,
    ),
    "round: layers of another model": Case(
        lie=on(RoundOpened, layers=(packed(torch.zeros(3), 1 << 18),)), code=PROTOCOL, says="layers", heard=TRAINING
    ),
    "commit: number 2^62": Case(
        lie=on(Committed, commit_number=1 << 62, durable_step=1 << 62),
        code=POLICY,
        says="max_bytes_sent is reached",
        heard=TRAINING,
    ),
    "settings: steps of 2^40 rows": Case(
        lie=settings("federation", per_device_train_batch_size=1 << 40),
        code=POLICY,
        says="max_step_rows",
        heard=JOINING,
    ),
    "settings: steps of 2^40 micro-batches": Case(
        lie=settings("federation", gradient_accumulation_steps=1 << 40),
        code=POLICY,
        says="max_step_rows",
        heard=JOINING,
    ),
    "settings: names that steer the terminal": Case(
        lie=settings("lora", target_modules=[HOSTILE[:100]]), code=PROTOCOL, says="no plain text", heard=JOINING
    ),
    "code: one that is none": Case(
        lie=instead_of(ForwardDone, Refusal(code=HOSTILE, reason=HOSTILE)), code=REFUSED, says="owned", heard=TRAINING
    ),
    "control: another's merge": Case(
        lie=instead_of(
            Pong,
            Merged(round_number=1, accepted=True, reason="", is_last=False, counted=True, layers=()),
        ),
        code=PROTOCOL,
        says="Merged",
        heard=TRAINING,
    ),
    "text: waiting for what steers the terminal": Case(
        lie=on(Pong, waiting_for=HOSTILE), code=POLICY, says="max_bytes_sent is reached", heard=TRAINING
    ),
    "no lie": Case(lie=lambda message: message, code=POLICY, says="max_bytes_sent is reached", heard=TRAINING),
    # the last, since the honest server waits for who was lost
    "settings, later: no block below the cut": Case(
        lie=once_joined(settings("model", bottom_layers=0)), code=POLICY, says="min_bottom_layers", heard=TRAINING
    ),
}

_numbers = itertools.count()


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedRun]:
    """One honest server for all lies: it has more rounds than they can end."""
    folder = tmp_path_factory.mktemp("honest")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    tree = {
        "server": {
            "address": f"tcp://127.0.0.1:{free_port()}",
            "runs_dir": folder,
            "run_id": "run",
            "cache_dir": folder,
            "export_model": False,
        },
        "model": {"model_name_or_path": str(folder / "model")},
        "federation": {"num_rounds": 900, "local_steps": 2, "wait_timeout": 600.0, "step_timeout": 5.0},
        "storage": {"fsync": "never"},
    }
    served = ServedRun(ServerConfig.from_tree(tree, source="test"), as_json=True)
    served.start()
    yield served
    served.stop()


@pytest.mark.parametrize("name", CASES)
def test_a_lie_ends_the_client_with_a_sentence_and_reaches_nothing(
    honest: ServedRun, tmp_path: Path, name: str
) -> None:
    case, client_id = CASES[name], f"clinic-{next(_numbers)}"
    with LyingServer(int(honest.config.server.address.rsplit(":", 1)[1]), case.lie) as liar:
        text = write_text(tmp_path / "text.txt", num_lines=20, seed=0)
        (tmp_path / "client.toml").write_text(
            f"[client]\nclient_id = '{client_id}'\nserver_address = 'tcp://127.0.0.1:{liar.port}'\n"
            "num_threads = 1\n"
            f"output_dir = '{tmp_path}/a/b/clients'\ncache_dir = '{tmp_path}/a/b/cache'\nreconnect_timeout = 10\n"
            f"[data]\npath = '{text}'\neval_fraction = 0.0\n[policy]\nmax_bytes_sent = 300000\n"
        )
        process = Forked(
            "client_edge", "--config", str(tmp_path / "client.toml"), said=tmp_path / "said", env=dict(os.environ)
        )
        try:
            code = process.wait(timeout=50)
        finally:
            process.kill()
    said = process.said()
    assert code == case.code, said
    assert case.says in said.strip().splitlines()[-1]
    assert "Traceback" not in said
    assert all(character.isprintable() or character in "\n" for character in said)
    assert set(liar.heard) <= case.heard
    written = {path.name for path in tmp_path.iterdir()} | {path.name for path in (tmp_path / "a").rglob("outside*")}
    assert written <= {"text.txt", "client.toml", "said", "said.out", "a"}
    assert {path.name for path in (tmp_path / "a").glob("*")} <= {"b"}
    assert {path.name for path in (tmp_path / "a" / "b").glob("*")} <= {"clients", "cache"}
    assert not Path("/srv/outside").exists()
