"""Where a model's files come from: which of the hub's files are downloaded, and a GGUF file that is converted once."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import pytest
import torch
from conftest import free_port, tiny_tokenizer, write_text
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM

from splitfl.config.trees import RunConfig
from splitfl.errors import ModelError
from splitfl.models.origin import Origin, is_hub_id, locate
from splitfl.models.source import Shards, empty_cut, server_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_ID = "clinic/tiny"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as huggingface_hub asks for: a listing, and files by name."""

    def __init__(self, directory: Path, asked: list[str], *rest: object) -> None:
        self.directory = directory
        self.asked = asked
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:  # the base class calls it so
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        name = self.path.removeprefix(f"/{HUB_ID}/resolve/{COMMIT}/")
        if self.path.startswith(f"/api/models/{HUB_ID}/tree/"):
            body = json.dumps([self._listed(path) for path in sorted(self.directory.iterdir())]).encode()
        elif self.path.startswith(f"/api/models/{HUB_ID}/"):
            body = json.dumps({"id": HUB_ID, "sha": COMMIT}).encode()
        elif (self.directory / name).is_file():
            body = (self.directory / name).read_bytes()
            self.asked += [name] * with_body
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _listed(self, path: Path) -> dict[str, object]:
        return {
            "type": "file",
            "path": path.name,
            "size": path.stat().st_size,
            "oid": sha256(path.read_bytes()).hexdigest(),
        }

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def sharded(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(make_model(tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(tmp_path / "sharded")
    return tmp_path / "sharded"


@pytest.fixture
def hub(sharded: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a model's directory as the hub would; yields the address and the names of files asked for."""
    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, sharded, asked)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def shards_of(directory: Path, side: str) -> set[str]:
    where = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    cut, _ = empty_cut(directory, RunConfig.from_tree({"train": {"backbone": "none"}}, source="test"))
    names = {names[0].replace(".base_layer", "") for names, _ in cut.tensors_of(side).values()}  # type: ignore[arg-type]
    return {where[name] for name in names if ".lora_" not in name}


def role(module: str, config: str, folder: Path, hub: str) -> subprocess.Popen[str]:
    """Start a role with a cache of its own and the hub at this address."""
    folder.mkdir()
    (folder / "config.toml").write_text(config)
    own = {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", module, "--config", str(folder / "config.toml")]
    command += ["--accept"] if module == "client_edge" else []
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=os.environ | own, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


@pytest.mark.slow
def test_a_client_downloads_only_the_shards_of_its_own_layers(
    sharded: Path, hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, _ = hub
    data, port = write_text(tmp_path / "text.txt", num_lines=8, seed=1), free_port()
    server = role(
        "server_backbone",
        f"""
        [server]
        address = "tcp://127.0.0.1:{port}"
        runs_dir = "{tmp_path}/runs"
        run_id = "run"
        cache_dir = "{tmp_path}/server-cache"
        export_model = false
        [model]
        model_name_or_path = "{HUB_ID}"
        [federation]
        num_rounds = 1
        local_steps = 1
        """,
        tmp_path / "server",
        address,
    )
    client = role(
        "client_edge",
        f"""
        [client]
        client_id = "clinic"
        server_address = "tcp://127.0.0.1:{port}"
        model_name_or_path = "{HUB_ID}"
        output_dir = "{tmp_path}/clients"
        cache_dir = "{tmp_path}/client-cache"
        [data]
        path = "{data}"
        """,
        tmp_path / "client",
        address,
    )
    try:
        for process in (client, server):
            _, said = process.communicate(timeout=100)
            assert process.returncode == 0, said
    finally:
        for process in (client, server):
            process.kill()
            process.wait()
    events = [json.loads(line) for line in (tmp_path / "clients/run/clinic/metrics.jsonl").read_text().splitlines()]
    (done,) = [event for event in events if event["event"] == "client_done"]
    part = next((tmp_path / "server-cache" / "parts").iterdir())
    adapters = tmp_path / "runs/run/adapters.safetensors"
    described = sum(path.stat().st_size for path in (tmp_path / "clients/run/clinic/model").iterdir())
    assert done["bytes_of_files"] == described + adapters.stat().st_size  # and not the part's own
    assert part.read_bytes() in [path.read_bytes() for path in (tmp_path / "client-cache" / "received").iterdir()]
    mine = shards_of(sharded, "client")
    assert {path.name for path in (tmp_path / "client/hf").rglob("*.safetensors")} == mine
    assert shards_of(sharded, "server") - mine
    everything = {path.name for path in sharded.glob("*.safetensors")}
    assert {path.name for path in (tmp_path / "server/hf").rglob("*.safetensors")} == everything


# Looks a model up in a process of its own, since huggingface_hub reads its address when it is imported.
LOOK = """
import sys
from pathlib import Path
import torch
from splitfl.config.trees import RunConfig
from splitfl.models.origin import locate
from splitfl.models.source import empty_cut, server_weights
origin = locate("clinic/tiny", Path(sys.argv[1]))
print(sorted(path.name for path in origin.directory.iterdir()))
cut, _ = empty_cut(origin.directory, RunConfig())
weights = server_weights(origin, cut, seed=0, cache_dir=Path(sys.argv[1]))
print(sorted(path.name for path in origin.directory.glob("*.safetensors")))
cut.fill("server", weights.read, torch.device("cpu"))
print(sorted(path.name for path in origin.directory.glob("*.safetensors")))
"""


@pytest.mark.slow
def test_a_backbone_is_filled_from_its_own_shards(sharded: Path, hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = hub
    own = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", LOOK, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    described, before, after = done.stdout.splitlines()
    assert "model.safetensors.index.json" in described
    assert "model-0" not in described
    assert before == "[]"
    mine = shards_of(sharded, "server")
    assert after == str(sorted(mine))
    assert {path.name for path in sharded.glob("*.safetensors")} - mine
    assert len(asked) == len(set(asked))  # nothing twice


class TestNames:
    @pytest.mark.parametrize("name", ["owner/name", "HuggingFaceTB/SmolLM2-135M"])
    def test_of_the_hub(self, name: str) -> None:
        assert is_hub_id(name)

    @pytest.mark.parametrize("name", ["name", "./owner/name", "../name", "~/name", "/name", "a/b/c", "splitfl/models"])
    def test_of_paths(self, name: str) -> None:
        assert not is_hub_id(name)

    def test_neither(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"nowhere: no such directory \(and not a hub id"):
            locate(f"{tmp_path}/nowhere", tmp_path)

    def test_what_the_hub_does_not_give(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="owner/nowhere: no such directory, and not to be had from the hub"):
            locate("owner/nowhere", tmp_path)

    def test_another_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.bin").touch()
        with pytest.raises(ModelError, match=r"model\.bin is a file: .* a directory, a \.gguf file or a hub id"):
            locate(f"{tmp_path}/model.bin", tmp_path)


def write_gguf(path: Path, model: torch.nn.Module) -> None:
    """Write a Llama as llama.cpp's own converter does: float32, queries and keys in its order of rotary halves."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, values in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        turned = next((n for kind, n in heads.items() if kind in name), None)
        array = values
        if turned:
            halves = values.reshape(turned, 2, values.shape[0] // turned // 2, *values.shape[1:])
            array = halves.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), array.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestGguf:
    @pytest.fixture
    def whole(self, make_model: Callable[..., Path]) -> torch.nn.Module:
        directory = make_model(tie_word_embeddings=False, num_hidden_layers=3, vocab_size=260)
        return AutoModelForCausalLM.from_pretrained(directory)  # type: ignore[no-any-return]

    @pytest.mark.slow
    def test_is_converted_once(self, whole: torch.nn.Module, tmp_path: Path) -> None:
        folder = tmp_path / "gguf"
        folder.mkdir()
        write_gguf(folder / "tiny.gguf", whole)
        origin = locate(str(folder / "tiny.gguf"), tmp_path / "cache")
        cut, _ = empty_cut(origin.directory, RunConfig.from_tree({"train": {"backbone": "none"}}, source="test"))
        weights = server_weights(origin, cut, seed=0, cache_dir=tmp_path / "cache")
        for name, parameter in whole.named_parameters():
            values = torch.empty(parameter.shape)
            weights.read([name], values)
            torch.testing.assert_close(values, parameter.detach(), rtol=0, atol=0, msg=name)
        written = (origin.directory / "model.safetensors").stat().st_mtime_ns
        assert locate(str(folder), tmp_path / "cache") == origin
        assert (origin.directory / "model.safetensors").stat().st_mtime_ns == written

    @pytest.mark.slow
    def test_a_file_that_lacks_a_tensor_is_refused(self, whole: torch.nn.Module, tmp_path: Path) -> None:
        whole.model.layers = whole.model.layers[:2]  # the file says three blocks and holds two
        write_gguf(tmp_path / "tiny.gguf", whole)
        with pytest.raises(ModelError, match=r"it has no tensor model\.layers\.2\..* \(9 missing in all\)"):
            locate(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
        assert not list((tmp_path / "cache" / "converted").iterdir())

    def test_several_in_a_directory(self, tmp_path: Path) -> None:
        for name in ("q4.gguf", "q8.gguf"):
            (tmp_path / name).touch()
        with pytest.raises(
            ModelError, match=r"holds 2 GGUF files: let model_name_or_path name one of q4\.gguf, q8\.gguf"
        ):
            locate(str(tmp_path), tmp_path / "cache")

    def test_safetensors_beside_it_win(self, make_model: Callable[..., Path], tmp_path: Path) -> None:
        directory = make_model()
        (directory / "model.gguf").touch()
        assert locate(str(directory), tmp_path / "cache") == Origin(directory=directory)
        assert len(Shards(Origin(directory=directory)).all_files()) == 1
