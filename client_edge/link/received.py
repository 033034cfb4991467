"""What a client gets when it joins: the model's description and this side's weights, brought into its folders."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from client_edge.consent.policy import check_known
from client_edge.link.files import Files
from client_edge.link.local_copy import digest_of_local_copy, take_from_local_copy
from splitfl.config.own import ClientSection, default_cache_dir
from splitfl.models.checkpoint import TensorFile
from splitfl.models.cut import Cut
from splitfl.models.foreign import check_description, check_finite, check_fits, foreign_cut
from splitfl.models.origin import DESCRIPTION_FILES
from splitfl.models.source import ADAPTERS_FILE, WEIGHTS_FILE, Weights, weights_of


def fetch_description(files: Files, client: ClientSection, folder: Path) -> Path:
    """Bring the model's config and the tokenizer into a folder of this run."""
    directory = folder / "model"
    directory.mkdir(parents=True, exist_ok=True)
    for name in DESCRIPTION_FILES:  # our names, whatever else the server may offer
        if files.has(name):
            shutil.copyfile(files.fetch(name, _cache_dir(client)), directory / name)
        else:
            (directory / name).unlink(missing_ok=True)  # of an earlier start
    check_description(directory)
    return directory


def fetch_layers(
    files: Files,
    client: ClientSection,
    directory: Path,
    device: torch.device,
    *,
    tell: Callable[[str], None] = lambda _: None,
) -> Cut:
    """Bring the weights here, from this machine's own copy if it has one, and only this side's into memory.

    `tell` gets a sentence on what became of the copy.
    """
    cut = foreign_cut(directory, files.connection.run)
    path, own = files.place_of(WEIGHTS_FILE, _cache_dir(client)), client.cache_dir or default_cache_dir()
    if client.model_name_or_path:
        tell(take_from_local_copy(client.model_name_or_path, cut, path, cache_dir=own))
    weights = _weights(files, client, cut)

    def read(names: Sequence[str], values: Tensor) -> None:
        weights.read(names, values)
        check_finite(names[0], values)

    cut.fill("client", read, device)
    return cut


def first_layers(files: Files, client: ClientSection, cut: Cut) -> dict[str, Tensor]:
    """Return what trains here as it is before the first step, by its name in the whole model."""
    weights, known_as = _weights(files, client, cut), cut.tensors_of("client")
    found = {}
    for name, parameter in cut.trainable("client").items():
        found[name] = torch.empty(parameter.shape, dtype=parameter.dtype)
        weights.read(known_as[name][0], found[name])
    return found


def _weights(files: Files, client: ClientSection, cut: Cut) -> Weights:
    """Open the files of the welcome, which are had from the server where they are not here."""
    weights_file = files.fetch(WEIGHTS_FILE, _cache_dir(client))
    later: TensorFile | None = None
    if files.has(ADAPTERS_FILE):
        later = TensorFile(files.fetch(ADAPTERS_FILE, _cache_dir(client)))
    weights = weights_of([weights_file], cut, seed=files.connection.run.seed, later=later)
    check_fits(cut, weights, later.entries if later is not None else {})
    own = client.cache_dir or default_cache_dir()
    check_known(
        files.connection.gate.policy,
        files.digest_of(WEIGHTS_FILE),
        lambda: digest_of_local_copy(client.model_name_or_path, cut, cache_dir=own),
        later,
    )
    return weights


def _cache_dir(client: ClientSection) -> Path:
    return (client.cache_dir or default_cache_dir()) / "received"
