"""The model of the traces' servers: two blocks, as small as they come."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def trace_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("traces") / "model"
    AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=3)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
