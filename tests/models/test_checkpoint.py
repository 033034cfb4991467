"""Reading tensors by name and writing files that are whole or not there; a broken file is one kind of error."""

import hashlib
import json
import random
import stat
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from splitfl.config.sections import ModelSection
from splitfl.errors import ModelError
from splitfl.models.checkpoint import (
    DTYPES,
    Piece,
    TensorFile,
    entries_of,
    piece_of_entry,
    piece_of_tensor,
    read_into,
    save_tensors,
    write,
)
from splitfl.models.cut import Cut
from splitfl.models.origin import Origin
from splitfl.models.source import Shards, empty_model, lacking, read_config, server_weights, weights_in


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "matrix": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "counts": torch.arange(6).reshape(2, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "marks": torch.tensor([True, False]),
    }


def is_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return set(first) == set(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


class TestFiles:
    def test_the_library_reads_what_we_write(self, tmp_path: Path) -> None:
        digest = save_tensors(tmp_path / "x.safetensors", tensors())
        assert is_same(load_file(tmp_path / "x.safetensors"), tensors())
        assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()

    def test_we_read_what_the_library_writes(self, tmp_path: Path) -> None:
        save_file(tensors(), tmp_path / "x.safetensors", metadata={"format": "pt"})
        file = TensorFile(tmp_path / "x.safetensors")
        assert is_same(file, tensors())
        assert len(file) == len(tensors())

    def test_the_order_of_names_stays(self, tmp_path: Path) -> None:
        save_tensors(tmp_path / "x.safetensors", tensors())
        assert list(TensorFile(tmp_path / "x.safetensors")) == list(tensors())

    def test_memory_that_is_not_contiguous_is_written_in_order(self, tmp_path: Path) -> None:
        turned = tensors()["matrix"].T
        save_tensors(tmp_path / "x.safetensors", {"turned": turned})
        assert torch.equal(load_file(tmp_path / "x.safetensors")["turned"], turned)

    def test_a_piece_of_another_file_is_copied_bit_for_bit(self, tmp_path: Path) -> None:
        save_file(tensors(), tmp_path / "x.safetensors")
        pieces = {name: piece_of_entry(entry) for name, entry in entries_of(tmp_path / "x.safetensors").items()}
        write(tmp_path / "y.safetensors", pieces)
        assert is_same(load_file(tmp_path / "y.safetensors"), tensors())

    def test_a_piece_is_made_when_its_turn_comes_in_the_type_asked_for(self, tmp_path: Path) -> None:
        made: list[str] = []

        def make() -> Tensor:
            made.append("made")
            return torch.tensor([1.0, 2.0])

        piece = piece_of_tensor(make, torch.bfloat16, (2,))
        assert made == []
        write(tmp_path / "x.safetensors", {"x": piece})
        assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], torch.tensor([1.0, 2.0]).bfloat16())

    @pytest.mark.parametrize("mode", [0o600, 0o644])
    def test_rights_are_those_asked_for(self, tmp_path: Path, mode: int) -> None:
        save_tensors(tmp_path / "x.safetensors", tensors(), mode=mode)
        assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == mode


class TestAtomic:
    def broken(self) -> Piece:
        def chunks() -> Iterable[bytes]:
            yield b"half"
            raise ModelError("the source broke")

        return Piece(dtype="U8", shape=(8,), num_bytes=8, chunks=chunks)

    def test_an_error_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="the source broke"):
            write(tmp_path / "x.safetensors", {"x": self.broken()})
        assert list(tmp_path.iterdir()) == []

    def test_an_error_leaves_the_last_file(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_tensors(path, tensors())
        with pytest.raises(ModelError):
            write(path, {"x": self.broken()})
        assert [found.name for found in tmp_path.iterdir()] == ["x.safetensors"]
        assert is_same(load_file(path), tensors())

    def test_a_file_is_replaced_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_tensors(path, tensors())
        save_tensors(path, {"other": torch.ones(2)})
        assert list(load_file(path)) == ["other"]
        assert [found.name for found in tmp_path.iterdir()] == ["x.safetensors"]


class TestTypes:
    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
    def test_values_are_converted_as_torch_does(self, stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
        values = tensors()["matrix"].to(stored)
        save_file({"x": values}, tmp_path / "x.safetensors")
        got = torch.empty(3, 5, dtype=wanted)
        read_into(entries_of(tmp_path / "x.safetensors")["x"], got)
        assert torch.equal(got, values.to(wanted))

    def test_many_chunks_are_put_together(self, tmp_path: Path) -> None:
        values = torch.randn(3 << 20).bfloat16()  # more than a chunk of 4 MiB
        save_file({"x": values}, tmp_path / "x.safetensors")
        got = torch.empty(3 << 20)
        read_into(entries_of(tmp_path / "x.safetensors")["x"], got)
        assert torch.equal(got, values.float())

    def test_every_type_survives(self, tmp_path: Path) -> None:
        values = {name: torch.ones(3, dtype=dtype) for name, dtype in DTYPES.items()}
        save_tensors(tmp_path / "x.safetensors", values)
        assert is_same(TensorFile(tmp_path / "x.safetensors"), values)

    def test_another_shape_is_refused(self, tmp_path: Path) -> None:
        save_file({"x": torch.ones(2, 3)}, tmp_path / "x.safetensors")
        with pytest.raises(ModelError, match=r"shape \(2, 3\) where the model has \(3, 2\)"):
            read_into(entries_of(tmp_path / "x.safetensors")["x"], torch.empty(3, 2))


def file_of(header: Any, content: bytes = bytes(8)) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + content


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "cut in the length": bytes(5),
    "no header": struct.pack("<Q", 100),
    "header too large": struct.pack("<Q", 1 << 63) + b"{}",
    "no JSON": file_of(b"{]"),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "no object": file_of([1, 2]),
    "a number of many digits": file_of(b'{"x": ' + b"9" * 5000 + b"}"),
    "nested deeply": file_of(b"[" * 100_000),
    "entry is no object": file_of({"x": 1}),
    "no offsets": file_of({"x": {"dtype": "F32", "shape": [2]}}),
    "unknown type": file_of(one(dtype="F7")),
    "size below zero": file_of(one(shape=(-2,))),
    "size is a float": file_of(one(shape=(2.0,))),
    "size is true": file_of(one(shape=(2, True))),
    "offsets beyond the file": file_of(one(offsets=(8, 16))),
    "offsets below zero": file_of(one(offsets=(-8, 0))),
    "offsets reversed": file_of(one(offsets=(8, 0))),
    "offset is true": file_of(one(dtype="U8", shape=(1,), offsets=(False, True))),
    "shape larger than its bytes": file_of(one(shape=(3,))),
    "huge shape": file_of(one(shape=(2**62, 2**62, 0), offsets=(0, 8))),
}


class TestBroken:
    @pytest.mark.parametrize("case", BROKEN)
    def test_one_kind_of_error(self, case: str, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(BROKEN[case])
        with pytest.raises(ModelError, match=r"x\.safetensors: "):
            entries_of(path)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="cannot be read as safetensors"):
            entries_of(tmp_path / "x.safetensors")

    def test_a_file_that_was_cut_short_after_it_was_opened(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_tensors(path, tensors())
        entry = entries_of(path)["matrix"]
        path.write_bytes(path.read_bytes()[: entry.start + 4])
        for dtype in (torch.float32, torch.float64):
            with pytest.raises(ModelError, match="ends in the middle of a tensor"):
                read_into(entry, torch.empty(3, 5, dtype=dtype))
        with pytest.raises(ModelError, match="ends in the middle of a tensor"):
            list(piece_of_entry(entry).chunks())

    def test_garbled_files_raise_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_tensors(path, tensors())
        whole, draw, refused = path.read_bytes(), random.Random(5), 0
        header_ends = 8 + struct.unpack("<Q", whole[:8])[0]
        for _ in range(400):
            garbled = bytearray(whole)
            for _ in range(draw.randint(1, 3)):
                garbled[draw.randrange(header_ends)] = draw.randrange(256)
            path.write_bytes(garbled[: draw.choice([len(whole), draw.randrange(len(whole))])])
            try:
                for name, values in TensorFile(path).items():
                    assert isinstance(name, str)
                    assert values.numel() < len(whole)
            except ModelError:
                refused += 1
        assert refused > 200


def files_of(directory: Path) -> list[Path]:
    return Shards(Origin(directory=directory)).all_files()


class TestShards:
    @pytest.fixture
    def whole(self, make_model: Callable[..., Path]) -> Path:
        return make_model("llama", tie_word_embeddings=False)

    def read_all(self, directory: Path) -> dict[str, Tensor]:
        cut = Cut.of(empty_model(read_config(directory), ModelSection()), bottom_layers=1, top_layers=1)
        weights = weights_in(Origin(directory=directory), cut, seed=0)
        found = {}
        for side in ("client", "server"):
            for name, (names, empty) in cut.tensors_of(side).items():
                found[name] = torch.empty(empty.shape)
                weights.read(names, found[name])
        return found

    def test_by_name_from_one_file_and_from_shards(self, whole: Path, tmp_path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(whole)
        model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
        assert len(files_of(whole)) == 1
        assert len(files_of(tmp_path / "sharded")) > 2
        wanted = {name: parameter.detach() for name, parameter in model.named_parameters()}
        assert is_same(self.read_all(whole), wanted)
        assert is_same(self.read_all(tmp_path / "sharded"), wanted)

    def test_names_without_the_base_models(self, whole: Path, tmp_path: Path) -> None:
        wanted = self.read_all(whole)
        short = {name.removeprefix("model."): values for name, values in wanted.items()}
        assert set(short) != set(wanted)
        save_file(short, whole / "model.safetensors")
        assert is_same(self.read_all(whole), wanted)

    def test_a_tensor_that_is_missing_is_named(self, whole: Path) -> None:
        values = load_file(whole / "model.safetensors")
        del values["model.layers.1.mlp.up_proj.weight"]
        save_file(values, whole / "model.safetensors")
        with pytest.raises(ModelError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
            self.read_all(whole)

    def test_a_shard_that_is_missing_is_named(self, whole: Path) -> None:
        index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}
        (whole / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=r"lacks model-1\.safetensors; save the model with save_pretrained"):
            files_of(whole)

    @pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": ["y"]}}'])
    def test_an_index_that_is_none(self, whole: Path, index: str) -> None:
        (whole / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ModelError, match="not an index of safetensors files in its folder"):
            files_of(whole)

    def test_an_index_names_files_beside_it_only(self, whole: Path) -> None:
        outside = {"weight_map": {"x": "../secret.safetensors"}}
        (whole / "model.safetensors.index.json").write_text(json.dumps(outside))
        (whole.parent / "secret.safetensors").write_bytes(b"")
        with pytest.raises(ModelError, match="not an index of safetensors files in its folder"):
            files_of(whole)

    def test_a_folder_without_weights(self, whole: Path) -> None:
        (whole / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"lacks model\.safetensors; save the model with save_pretrained"):
            files_of(whole)

    def test_a_shard_without_a_tensor_that_the_index_says_it_has(self, whole: Path) -> None:
        index = {"weight_map": dict.fromkeys(load_file(whole / "model.safetensors"), "model.safetensors")}
        index["weight_map"]["lost"] = "model.safetensors"
        (whole / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=r"has no tensor lost, which model\.safetensors\.index\.json says it has"):
            Shards(Origin(directory=whole))["lost"]

    def test_a_part_opens_no_file_of_the_other_side(self, whole: Path, tmp_path: Path) -> None:
        sharded = tmp_path / "sharded"
        AutoModelForCausalLM.from_pretrained(whole).save_pretrained(sharded, max_shard_size="40KB")
        where = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
        cut = Cut.of(empty_model(read_config(sharded), ModelSection()), bottom_layers=1, top_layers=1)
        files = {side: {where[names[0]] for names, _ in cut.tensors_of(side).values()} for side in ("client", "server")}
        for side, other in (("client", "server"), ("server", "client")):
            part = tmp_path / side
            part.mkdir()
            (part / "model.safetensors.index.json").symlink_to(sharded / "model.safetensors.index.json")
            for file in files[side]:
                (part / file).symlink_to(sharded / file)
            assert files[other] - files[side]
            weights = weights_in(Origin(directory=part), cut, seed=0)
            assert lacking(weights, cut, "client", "server") == []  # the index knows them all
            for names, empty in cut.tensors_of(side).values():
                values = torch.empty(empty.shape)
                weights.read(names, values)
                assert torch.equal(values, load_file(sharded / where[names[0]])[names[0]])
            with pytest.raises(ModelError, match="lacks model-"):
                server_weights(Origin(directory=part), cut, seed=0, cache_dir=tmp_path)
