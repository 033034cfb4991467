"""What a server describes as its model is bounded and named before the library builds it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from splitfl.config.trees import RunConfig
from splitfl.errors import ModelError
from splitfl.models.checkpoint import entries_of, save_tensors
from splitfl.models.cut import Cut
from splitfl.models.foreign import check_description, check_finite, check_fits, foreign_cut, foreign_tokenizer
from splitfl.models.source import weights_of

RUN = RunConfig.from_tree({"model": {"model_name_or_path": "tiny"}}, source="test")


def lay_over(path: Path, **values: Any) -> None:
    tree = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(tree | values))


def described(directory: Path) -> Cut:
    check_description(directory)
    return foreign_cut(directory, RUN)


def tokenizer_of(directory: Path) -> PreTrainedTokenizerBase:
    check_description(directory)
    return foreign_tokenizer(directory)


def test_an_honest_model_is_taken_as_it_is(make_model: Callable[..., Path]) -> None:
    directory = make_model()
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    check_description(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert foreign_cut(directory, RUN).anatomy.num_blocks == 4
    assert len(foreign_tokenizer(directory)("abc")["input_ids"]) == 3


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "brings its own code"),
        ({"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}}, "brings its own code"),
        ({"quantization_config": {"quant_method": "custom"}}, "brings its own code"),
        ({"_attn_implementation": "somebody/kernel"}, "names code"),
        ({"attn_implementation": "somebody/kernel:forward"}, "names code"),
        ({"tokenizer_class": "AutoModelForCausalLM"}, "is no tokenizer"),
        ({"tokenizer_class": "os.system"}, "is no tokenizer"),
        ({"num_hidden_layers": 10**9}, "more than any model has"),
        ({"num_hidden_layers": 10**30}, "more than any model has"),
        ({"hidden_size": 10**12}, "more than any model has"),
        ({"layer_types": ["full_attention"] * 50_000}, "entries"),
        ({"a": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}, "levels deep"),
    ],
)
def test_a_config_out_of_bounds_is_refused(make_model: Callable[..., Path], values: dict[str, Any], says: str) -> None:
    directory = make_model()
    lay_over(directory / "config.json", **values)
    with pytest.raises(ModelError, match=says):
        check_description(directory)


@pytest.mark.parametrize("content", ["[" * 100_000, "{" * 9, "[]", "\xff"])
def test_a_config_that_is_none_is_refused(make_model: Callable[..., Path], content: str) -> None:
    directory = make_model()
    (directory / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        check_description(directory)


@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": 0},
        {"hidden_size": -4},
        {"hidden_act": "nonesuch"},
        {"rope_parameters": {"rope_type": "nonesuch"}},
        {"vocab_size": "many"},
        {"model_type": "t5"},
        {"model_type": "nonesuch"},
    ],
)
def test_what_the_library_stumbles_over_is_a_sentence(make_model: Callable[..., Path], values: dict[str, Any]) -> None:
    directory = make_model()
    lay_over(directory / "config.json", **values)
    with pytest.raises(ModelError) as refused:
        described(directory)
    assert str(refused.value).isprintable()


def test_a_model_of_endless_parts_is_not_built(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitfl.models.foreign._MOST_MODULES", 2000)  # the real bound takes ten seconds to reach
    directory = make_model()
    assert described(directory).anatomy.num_blocks == 4
    lay_over(directory / "config.json", num_hidden_layers=16_000)
    with pytest.raises(ModelError, match="more than 2000 parts"):
        described(directory)


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}, "brings its own code"),
        ("tokenizer_config.json", {"tokenizer_class": "RagRetriever"}, "is no tokenizer"),
        ("tokenizer_config.json", {"tokenizer_class": ["x"]}, "is no tokenizer"),
        (
            "tokenizer.json",
            {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "x" * 99}},
            "write",
        ),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a" * 9999}}}, "Regex has 9999"),
        ("tokenizer.json", {"post_processor": {"single": [{"Sequence": {"id": "A"}}] * 9999}}, "single has 9999"),
    ],
)
def test_a_tokenizer_that_names_code_or_fills_memory_is_refused(
    make_model: Callable[..., Path], name: str, values: dict[str, Any], says: str
) -> None:
    directory = make_model()
    lay_over(directory / name, **values)
    with pytest.raises(ModelError, match=says):
        check_description(directory)


def test_doubling_normalizers_are_refused(make_model: Callable[..., Path]) -> None:
    directory = make_model()
    doubles = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    lay_over(directory / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [doubles] * 40})
    with pytest.raises(ModelError, match="may write more than 64 characters"):
        check_description(directory)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "tokenizer_config.json"])
def test_files_of_millions_of_values_are_not_read(make_model: Callable[..., Path], name: str) -> None:
    """Three bytes in the file are more than sixty in memory."""
    directory = make_model()
    (directory / name).write_bytes(b'{"a": [' + b"[]," * 5_000_000 + b"[]]}")
    with pytest.raises(ModelError, match="values, and 4194304 are the most"):
        check_description(directory)


def test_paths_of_the_machine_a_tokenizer_was_made_on_are_left_out(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    directory = make_model()
    lay_over(
        directory / "tokenizer_config.json", vocab_file="/etc/passwd", tokenizer_file=str(tmp_path), init_inputs=[1]
    )
    check_description(directory)
    kept = json.loads((directory / "tokenizer_config.json").read_text())
    assert not {"vocab_file", "tokenizer_file", "init_inputs"} & kept.keys()
    assert len(foreign_tokenizer(directory)("abc")["input_ids"]) == 3


@pytest.mark.parametrize("content", ["{}", '{"model": {}}', '{"model": {"type": "BPE"}, "added_tokens": 3}', "no json"])
def test_a_malformed_tokenizer_is_a_sentence(make_model: Callable[..., Path], content: str) -> None:
    directory = make_model()
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError) as refused:
        tokenizer_of(directory)
    assert str(refused.value).isprintable()


class TestWeights:
    """Files that do not fit are refused before memory is taken for what they should hold."""

    def fits(self, directory: Path, tensors: dict[str, torch.Tensor], adapters: dict[str, torch.Tensor]) -> None:
        cut = foreign_cut(directory, RUN)
        files = directory / "client.safetensors", directory / "adapters.safetensors"
        for path, held in zip(files, (tensors, adapters), strict=True):
            path.unlink(missing_ok=True)
            save_tensors(path, held)
        check_fits(cut, weights_of(files[:1], cut, seed=42), entries_of(files[1]))

    def tensors(self, directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        held = {
            name: torch.zeros(tensor.shape)
            for name, (_, tensor) in foreign_cut(directory, RUN).tensors_of("client").items()
        }
        adapters = {name: tensor for name, tensor in held.items() if "lora_" in name}
        return {name.replace(".base_layer", ""): t for name, t in held.items() if name not in adapters}, adapters

    def test_all_in_their_shapes(self, make_model: Callable[..., Path]) -> None:
        directory = make_model()
        self.fits(directory, *self.tensors(directory))

    @pytest.mark.parametrize("which", [0, 1])
    def test_one_in_another_shape(self, make_model: Callable[..., Path], which: int) -> None:
        directory = make_model()
        held = self.tensors(directory)
        name = next(iter(held[which]))
        held[which][name] = torch.zeros(1)
        with pytest.raises(ModelError, match="where the model has"):
            self.fits(directory, *held)

    @pytest.mark.parametrize("which", [0, 1])
    def test_one_missing(self, make_model: Callable[..., Path], which: int) -> None:
        directory = make_model()
        held = self.tensors(directory)
        del held[which][next(iter(held[which]))]
        with pytest.raises(ModelError, match="have no tensor"):
            self.fits(directory, *held)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_no_numbers(self, value: float) -> None:
        check_finite("w", torch.tensor([1.0, 3e38]))
        with pytest.raises(ModelError, match="not finite"):
            check_finite("w", torch.tensor([1.0, value]))
