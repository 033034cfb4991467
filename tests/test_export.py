"""The exported directory is an ordinary model: plain transformers gives the logits that the split model gave."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import Finished, train_together, write_model, write_text
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitfl.command_line import run_one
from splitfl.commands.export import Export
from splitfl.config.trees import RunConfig, ServerConfig
from splitfl.models.checkpoint import TensorFile
from splitfl.models.cut import Cut
from splitfl.models.export import export_run
from splitfl.models.source import empty_model, read_config, weights_of
from splitfl.models.trainable import choose_trainable

# Loads and runs the model where splitfl cannot be imported.
PLAIN = """
import sys
for name in ("splitfl", "server_backbone", "client_edge"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = AutoTokenizer.from_pretrained(sys.argv[1])("abc", return_tensors="pt")
sys.stdout.write(str(tuple(model.generate(**tokens, max_new_tokens=3, do_sample=False).shape)))
"""


def split_logits(model: Path, run_dir: Path, ids_BS: torch.Tensor) -> torch.Tensor:
    """Run the three segments with what the run has trained."""
    config = ServerConfig.load(run_dir / "config.toml")
    run: RunConfig = config
    cut = Cut.of(
        empty_model(read_config(model), run.model),
        bottom_layers=run.model.bottom_layers,
        top_layers=run.model.top_layers,
    )
    choose_trainable(cut, run)
    weights = weights_of(
        model.glob("*.safetensors"), cut, seed=run.seed, later=TensorFile(run_dir / "trained.safetensors")
    )
    for side in ("client", "server"):
        cut.fill(side, weights.read, torch.device("cpu"))
    with torch.no_grad():
        return cut.top().eval()(cut.backbone().eval()(cut.bottom().eval()(ids_BS, None), None), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A run that is over, and the model it began with."""

    base: Path
    stored: Path
    """The weights as the run reads them: rewritten for a family that is stored otherwise than it computes."""
    run_dir: Path
    text: Path


# Family, what trains of it, and of how many blocks on the server.
RUNS = [("llama", "lora", 0), ("llama", "lora", 1), ("gpt2", "lora", 1), ("qwen2", "full", 0), ("mixtral", "lora", 1)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Train one of these once, for all tests of this file that look at it."""

    @cache
    def train(family: str, part: str, backbone_layers: int) -> Trained:
        folder = tmp_path_factory.mktemp("planted-folder")
        base = write_model(folder / "planted-path", family)
        parts: dict[str, Any] = {"bottom": part, "top": part, "backbone": part, "embeddings": part == "full"}
        text = write_text(folder / "planted-name.txt", num_lines=20, seed=1)
        finished = train_together(
            folder,
            {
                "model": {"model_name_or_path": str(folder / ".." / folder.name / "planted-path")},
                "lora": {"r": 3},
                "train": {**parts, "backbone_layers": backbone_layers},
                "optimizer": {"learning_rate": 1e-2},
                "federation": {"num_rounds": 2, "local_steps": 3, "server_mode": "sequential"},
                "text": {"max_seq_length": 64},
            },
            {"planted-clinic": {"path": text, "also_evaluate": {"planted-also": text}}},
        )
        assert finished.errors == {}
        rewritten = [*(folder / "cache").glob("rewritten/*")]
        stored = rewritten[0] if family == "mixtral" else base
        return Trained(base=base, stored=stored, run_dir=finished.run_dir, text=text)

    return train


@pytest.mark.parametrize(("family", "part", "layers"), RUNS)
def test_split_logits_are_the_exported_models(
    family: str, part: str, layers: int, trained: Callable[..., Trained]
) -> None:
    run = trained(family, part, layers)
    ids_BS = torch.randint(3, 250, (2, 11))
    ours = split_logits(run.stored, run.run_dir, ids_BS)
    exported = AutoModelForCausalLM.from_pretrained(run.run_dir / "model").eval()
    with torch.no_grad():
        theirs = exported(input_ids=ids_BS, use_cache=False).logits
        base = AutoModelForCausalLM.from_pretrained(run.stored).eval()(input_ids=ids_BS, use_cache=False).logits
    if part == "full":
        assert torch.equal(ours, theirs)
    else:  # adapters are merged into the weights, which rounds once more
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (theirs - base).abs().max() > 1e-3


def test_export_again_gives_the_same_files_and_needs_no_splitfl(
    trained: Callable[..., Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, again = trained(*RUNS[0]).run_dir, tmp_path / "again"
    capsys.readouterr()
    assert run_one("export", Export(), [str(run_dir), str(again), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model_dir": str(again), "format": "merged"}
    first = run_dir / "model"
    assert {path.name for path in first.iterdir()} == {path.name for path in again.iterdir()}
    assert all(path.read_bytes() == (again / path.name).read_bytes() for path in first.iterdir())
    assert run_one("export", Export(), [str(run_dir), str(again)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    plain = subprocess.run([sys.executable, "-c", PLAIN, str(again)], capture_output=True, text=True, check=False)
    assert plain.stdout == "(1, 6)", plain.stderr


ADAPTERS = [run for run in (*RUNS, ("qwen2", "lora", 0)) if run[1] == "lora"]


@pytest.mark.parametrize(("family", "part", "layers"), ADAPTERS)
def test_the_adapter_on_its_base_gives_the_split_logits(
    family: str, part: str, layers: int, trained: Callable[..., Trained], tmp_path: Path
) -> None:
    run, output = trained(family, part, layers), tmp_path / "adapter"
    assert run_one("export", Export(), [str(run.run_dir), str(output), "--format", "adapter"]) == 0
    assert not (output / "config.json").exists()
    told = json.loads((output / "adapter_config.json").read_text())
    assert Path(told["base_model_name_or_path"]).resolve() == run.base
    base = AutoModelForCausalLM.from_pretrained(run.base).eval()
    ids_BS = torch.randint(3, 250, (2, 11))
    with torch.no_grad():
        before = base(input_ids=ids_BS, use_cache=False).logits
        theirs = PeftModel.from_pretrained(base, output).eval()(input_ids=ids_BS, use_cache=False).logits
    assert torch.equal(theirs, split_logits(run.stored, run.run_dir, ids_BS))
    assert (theirs - before).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(output)("abc")["input_ids"]


def test_an_adapter_finds_its_base_from_any_folder(
    make_model: Callable[..., Path],
    federate: Callable[..., Finished],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model()
    monkeypatch.setenv("HOME", str(model.parent))
    finished = federate(
        {"model": {"model_name_or_path": f"~/{model.name}"}, "federation": {"num_rounds": 1, "local_steps": 1}},
        {"clinic": {"path": write_text(tmp_path / "text.txt", num_lines=8, seed=1)}},
    )
    assert finished.errors == {}
    export_run(finished.run_dir, tmp_path / "adapter", "adapter")
    monkeypatch.setenv("HOME", "/nowhere")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(model)
    export_run(finished.run_dir, tmp_path / "again", "adapter")  # the run's own config names it by its whole path too


def test_an_adapter_directory_holds_adapters_only(
    make_model: Callable[..., Path],
    federate: Callable[..., Finished],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    finished = federate(
        {
            "model": {"model_name_or_path": str(make_model())},
            "train": {"norm_head": True},
            "federation": {"num_rounds": 1, "local_steps": 1},
        },
        {"clinic": {"path": write_text(tmp_path / "text.txt", num_lines=8, seed=1)}},
    )
    assert finished.errors == {}
    capsys.readouterr()
    assert run_one("export", Export(), [str(finished.run_dir), str(tmp_path / "out"), "--format", "adapter"]) == 2
    said = capsys.readouterr().err
    assert "2 tensors that are no adapters (model.norm.weight is the first)" in said
    assert "export with --format merged" in said
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


@pytest.mark.parametrize("format_", ["merged", "adapter"])
def test_the_card_says_how_it_was_trained_and_nothing_of_the_text(
    format_: Literal["merged", "adapter"], trained: Callable[..., Trained], tmp_path: Path
) -> None:
    run = trained(*RUNS[0])
    folder = export_run(run.run_dir, tmp_path / "out", format_)
    card = ModelCard.load(folder / "README.md")
    told = card.data.to_dict()
    assert told["library_name"] == {"merged": "transformers", "adapter": "peft"}[format_]
    assert told["license"] == "unknown"
    assert "base_model" not in told  # a folder here; on the hub it would be the id
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", card.text, flags=re.MULTILINE))
    report = json.loads((run.run_dir / "report.json").read_text())
    assert rows["base model"] == "planted-path"
    assert rows["rounds merged"] == "2 of 2"
    assert rows["commits"] == str(report["steps"]) == "6"
    assert rows["clients"] == "1"
    assert rows["server mode"] == "sequential"
    assert rows["lora.r"] == "3"
    assert rows["mean held-out loss after"] == f"{report['eval_loss_after']:.4f} nats a token"
    assert f"torch {torch.__version__}," in rows["versions"]
    assert report["versions"]["torch"] == torch.__version__
    lines = run.text.read_text().splitlines()
    for planted in ("planted-folder", "planted-name", "planted-clinic", "planted-also", str(run.base.parent), *lines):
        assert planted not in card.content
