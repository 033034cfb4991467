"""A model's content in one hash: the same wherever it lies and however it is cut into files, another for any value."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitfl.config.sections import ModelSection
from splitfl.errors import ModelError
from splitfl.models import content
from splitfl.models.content import content_sha256, locate_same
from splitfl.models.origin import Origin


@pytest.fixture
def model(make_model: Callable[..., Path]) -> Path:
    return make_model()


def hash_of(directory: Path, cache: Path) -> str:
    return content_sha256(Origin(directory=directory), cache)


@pytest.mark.parametrize("is_cached", [False, True])
def test_one_bit_of_one_tensor_makes_another(
    model: Path, tmp_path: Path, is_cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_cached:
        monkeypatch.setattr(content, "_SETTLED_NS", -1)
    before = hash_of(model, tmp_path)
    assert hash_of(model, tmp_path) == before
    assert bool(list((tmp_path / "hashes").glob("*.json"))) == is_cached
    path = model / "model.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-3] ^= 1
    path.write_bytes(changed)
    assert hash_of(model, tmp_path) != before
    changed[-3] ^= 1
    path.write_bytes(changed)
    assert hash_of(model, tmp_path) == before


def test_a_file_changed_within_the_clocks_tick_is_read_again(model: Path, tmp_path: Path) -> None:
    """Size and times may be the same as before, so what is fresh is not remembered."""
    hash_of(model, tmp_path)
    assert not (tmp_path / "hashes").exists()


def test_what_the_cache_holds_is_not_believed_if_it_is_torn(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "_SETTLED_NS", -1)
    before = hash_of(model, tmp_path)
    (known,) = (tmp_path / "hashes").glob("*.json")
    for torn in ("", "[[1]]", '{"a": 1}', known.read_text()[:-9]):
        known.write_text(torn)
        assert hash_of(model, tmp_path) == before


def test_a_cache_that_cannot_be_written_is_only_slower(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "_SETTLED_NS", -1)
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert hash_of(model, tmp_path / "cache") == hash_of(model, tmp_path / "other")


def test_the_same_model_in_shards_elsewhere_is_the_same(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    elsewhere = tmp_path / "elsewhere" / "another-name"
    shutil.copytree(model, elsewhere)
    (elsewhere / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"b.safetensors": names[:3], "a.safetensors": names[3:]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, elsewhere / file, metadata={"format": "pt", "by": "test"})
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (elsewhere / "model.safetensors.index.json").write_text(json.dumps(index))
    assert hash_of(elsewhere, tmp_path) == hash_of(model, tmp_path)


def test_type_and_shape_count_and_not_only_bytes(model: Path, tmp_path: Path) -> None:
    before = hash_of(model, tmp_path)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].view(-1)}, model / "model.safetensors")
    flat = hash_of(model, tmp_path)
    save_file({**tensors, name: tensors[name].view(torch.int32)}, model / "model.safetensors")
    assert len({before, flat, hash_of(model, tmp_path)}) == 3


@pytest.mark.parametrize(
    ("file", "key", "counts"),
    [
        ("config.json", "rms_norm_eps", True),
        ("config.json", "transformers_version", False),
        ("config.json", "_name_or_path", False),
        ("config.json", "dtype", False),
        ("tokenizer_config.json", "unk_token", True),
        ("tokenizer_config.json", "name_or_path", False),
        ("tokenizer.json", "model", True),
        ("generation_config.json", "temperature", False),
    ],
)
def test_what_is_said_of_it_counts_where_weights_or_tokens_hang_on_it(
    model: Path, tmp_path: Path, file: str, key: str, counts: bool
) -> None:
    before = hash_of(model, tmp_path)
    path = model / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, key: 0.123}, indent=3))
    assert (hash_of(model, tmp_path) != before) == counts


def test_a_chat_template_counts(model: Path, tmp_path: Path) -> None:
    before = hash_of(model, tmp_path)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert hash_of(model, tmp_path) != before


def test_names_with_line_breaks_cannot_stand_for_two_tensors(tmp_path: Path) -> None:
    hashes = set()
    for number, names in enumerate((["a", "b"], ['a","F32","[1]","0"],["b', "c"])):
        directory = tmp_path / str(number)
        directory.mkdir()
        header = {
            name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * at, 4 * at + 4]} for at, name in enumerate(names)
        }
        encoded = json.dumps(header).encode()
        (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(8))
        hashes.add(hash_of(directory, tmp_path))
    assert len(hashes) == 2


def test_a_run_knows_its_model_again(model: Path, tmp_path: Path) -> None:
    found = hash_of(model, tmp_path)
    section = ModelSection(model_name_or_path=str(model), checkpoint_sha256=found)
    assert locate_same(section, tmp_path).directory == model
    (model / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ModelError, match="holds another model than the run was begun with"):
        locate_same(section, tmp_path)
