"""A client that has the model takes its layers from there if they are the server's bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from client_edge.link.local_copy import take_from_local_copy
from splitfl.config.trees import RunConfig
from splitfl.errors import ModelError
from splitfl.models.checkpoint import TensorFile
from splitfl.models.origin import Origin
from splitfl.models.source import empty_cut, weights_in, write_part


def wanted(model: Path, tmp_path: Path) -> tuple[Any, Path]:
    """Return a cut, and the path under which the server's part of the client would be kept."""
    cut, _ = empty_cut(model, RunConfig())
    digest = write_part(
        tmp_path / "server.safetensors", cut, "client", weights_in(Origin(directory=model), cut, seed=0)
    )
    (tmp_path / "received").mkdir(exist_ok=True)
    return cut, tmp_path / "received" / digest


class TestTaking:
    def test_from_shards_of_the_clients_part_alone(self, make_model: Callable[..., Path], tmp_path: Path) -> None:
        model = make_model(tie_word_embeddings=False)
        cut, path = wanted(model, tmp_path)
        copy = tmp_path / "copy"
        AutoModelForCausalLM.from_pretrained(model).save_pretrained(copy, max_shard_size="40KB")
        where = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
        mine = {where[name] for name in TensorFile(tmp_path / "server.safetensors")}
        for shard in set(where.values()) - mine:
            (copy / shard).unlink()
        assert "bit for bit" in take_from_local_copy(str(copy), cut, path, cache_dir=tmp_path)
        assert path.read_bytes() == (tmp_path / "server.safetensors").read_bytes()
        assert (
            take_from_local_copy("no/matter", cut, path, cache_dir=tmp_path)
            == "the layers are here from an earlier run"
        )

    def test_one_other_value_is_another_model(self, make_model: Callable[..., Path], tmp_path: Path) -> None:
        model, other = make_model(), make_model(name="other")
        cut, path = wanted(model, tmp_path)
        tensors = load_file(other / "model.safetensors")
        tensors["model.layers.3.input_layernorm.weight"][7] += 1e-6
        save_file(tensors, other / "model.safetensors")
        said = take_from_local_copy(str(other), cut, path, cache_dir=tmp_path)
        assert said == f"{other} is not, bit for bit, what the server trains: the server sends the layers"
        assert list(path.parent.iterdir()) == []

    def test_a_tensor_that_is_stored_otherwise(self, make_model: Callable[..., Path], tmp_path: Path) -> None:
        model, other = make_model(), make_model(name="other")
        cut, path = wanted(model, tmp_path)
        tensors = load_file(other / "model.safetensors")
        tensors["w"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
        save_file(tensors, other / "model.safetensors")
        said = take_from_local_copy(str(other), cut, path, cache_dir=tmp_path)
        assert said.endswith(
            "model.layers.0.mlp.up_proj.weight otherwise than it is computed: the server sends the layers"
        )

    def test_no_such_copy(self, make_model: Callable[..., Path], tmp_path: Path) -> None:
        cut, path = wanted(make_model(), tmp_path)
        with pytest.raises(ModelError, match="nowhere: no such directory"):
            take_from_local_copy(str(tmp_path / "nowhere"), cut, path, cache_dir=tmp_path)
