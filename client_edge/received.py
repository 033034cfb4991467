"""What a client gets when it joins: the model's description and this side's weights, brought into its folders."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from client_edge.link import Link
from splitfl.config import ClientSection, default_cache_dir
from splitfl.models.checkpoint import TensorFile
from splitfl.models.cut import Cut
from splitfl.models.source import ADAPTERS_FILE, DESCRIPTION_FILES, WEIGHTS_FILE, empty_cut, weights_of


def fetch_description(link: Link, client: ClientSection, folder: Path) -> Path:
    """Bring the model's config and the tokenizer into a folder of this run."""
    directory = folder / "model"
    directory.mkdir(parents=True, exist_ok=True)
    for name in DESCRIPTION_FILES:  # our names, whatever else the server may offer
        if name in link.welcome.file_names:
            shutil.copyfile(link.fetch(name, _cache_dir(client)), directory / name)
    return directory


def fetch_layers(link: Link, client: ClientSection, directory: Path, device: torch.device) -> Cut:
    """Bring the weights here, and only what this side computes with into memory."""
    run = link.run
    weights_file = link.fetch(WEIGHTS_FILE, _cache_dir(client))
    later: Mapping[str, Tensor] = {}
    if ADAPTERS_FILE in link.welcome.file_names:
        later = TensorFile(link.fetch(ADAPTERS_FILE, _cache_dir(client)))
    cut, _ = empty_cut(directory, run)
    weights = weights_of([weights_file], cut, seed=run.seed, later=later)
    cut.fill("client", weights.read, device)
    return cut


def _cache_dir(client: ClientSection) -> Path:
    return (client.cache_dir or default_cache_dir()) / "received"
