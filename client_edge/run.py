"""One client's whole part in a run: what `splitfl client` does."""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from client_edge.data import Dataset, TrainBatches, eval_batches, hold_out, read_examples
from client_edge.edge import Edge
from client_edge.link import Link
from client_edge.loop import Step, evaluate, train
from splitfl.config import ClientConfig, RunConfig, default_cache_dir
from splitfl.errors import DataError, ModelError, SplitflError
from splitfl.federation.records import read_file
from splitfl.models.checkpoint import TensorFile
from splitfl.models.cut import Cut
from splitfl.models.source import (
    DESCRIPTION_FILES,
    empty_model,
    read_config,
    weights_of,
)
from splitfl.models.trainable import choose_trainable
from splitfl.session.client import ClientSession
from splitfl.telemetry.memory import peak_rss_bytes
from splitfl.telemetry.metrics import MetricsLog
from splitfl.training.device import open_device
from splitfl.training.terms import terms_of

WEIGHTS_FILE = "client.safetensors"
ADAPTERS_FILE = "adapters.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    """The client's examples."""

    train: Dataset
    held_out: Dataset | None
    also: dict[str, Dataset]


def take_part(config: ClientConfig) -> Path:
    """Join a run, train in it to its end, and return the folder with this client's own metrics."""
    begun_s = time.monotonic()
    _check_files(config)
    if config.client.num_threads:
        torch.set_num_threads(config.client.num_threads)
    device = open_device(config.client.device, "client.device")
    console = Console(stderr=True, soft_wrap=True)
    with _joined(config) as link:
        folder = config.client.output_dir / link.welcome.run_id / config.client.client_id
        _say(console, config, f"joined run {link.welcome.run_id} at {link.address}")
        directory = _fetch_description(link, config, folder)
        cut = _fetch_layers(link, config, directory, device)
        link.agree(ClientSession(terms_of(link.run, cut)))
        text = read_text(config, link.run, directory)
        _say(console, config, _describe(text, link.run))
        edge = Edge(cut, link.run, config.client.client_id, device)
        with MetricsLog(folder / "metrics.jsonl") as metrics:
            train_and_report(config, link, edge, text, metrics, begun_s)
    _say(console, config, f"done; this client's own metrics are in {folder}")
    return folder


def train_and_report(
    config: ClientConfig, link: Link, edge: Edge, text: _Text, metrics: MetricsLog, begun_s: float
) -> None:
    """Evaluate, train, evaluate, and hand over the totals."""
    federation = link.run.federation

    def evaluate_all(phase: str) -> None:
        if text.held_out is None:
            return
        datasets = {"eval_loss": text.held_out}
        if phase == "after":
            datasets |= {f"also:{name}": dataset for name, dataset in text.also.items()}
        measured = {"num_eval_examples": float(len(text.held_out))}
        for name, dataset in datasets.items():
            measured[name] = evaluate(edge, link, eval_batches(dataset, federation.per_device_eval_batch_size))
        round_number = link.session.round_number
        link.report("evaluated", phase=phase, round_number=round_number, metrics=measured)
        metrics.emit("evaluated", phase=phase, round=round_number, **measured)

    def on_step(step: Step) -> None:
        metrics.emit(
            "step",
            step=step.step,
            loss=step.loss,
            num_label_tokens=step.num_label_tokens,
            compute_seconds=edge.compute_seconds,
        )

    def on_merge() -> None:
        if federation.evaluate == "rounds" and link.session.round_number < federation.num_rounds:
            evaluate_all("round")

    batches = TrainBatches(
        text.train,
        seed=link.run.seed,
        client_id=config.client.client_id,
        per_device_train_batch_size=federation.per_device_train_batch_size,
        gradient_accumulation_steps=federation.gradient_accumulation_steps,
    )
    evaluate_all("before")
    train(edge, link, batches, num_examples=len(text.train), on_step=on_step, on_merge=on_merge)
    evaluate_all("after")
    totals = {
        "num_examples": len(text.train),
        "num_truncated": text.train.num_truncated,
        "bytes_sent": link.bytes_sent,
        "bytes_received": link.bytes_received,
        "bytes_of_files": link.bytes_of_files,
        "peak_rss_bytes": peak_rss_bytes(),
        "wall_seconds": time.monotonic() - begun_s,
        "compute_seconds": edge.compute_seconds,
    }
    metrics.emit("done", **totals)
    link.goodbye({name: float(value) for name, value in totals.items()})


def read_text(config: ClientConfig, run: RunConfig, directory: Path) -> _Text:
    """Read this client's examples with the tokenizer that came with the welcome."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"the server's model has no usable tokenizer: {reason}") from None
    section = config.data

    def read(path: Path) -> Dataset:
        return read_examples(
            path,
            section=section,
            tokenizer=tokenizer,
            max_seq_length=run.text.max_seq_length,
            append_eos=run.text.append_eos,
        )

    dataset = read(section.path)
    if section.eval_path is not None:
        return _Text(
            train=dataset,
            held_out=read(section.eval_path),
            also={name: read(path) for name, path in section.also_evaluate.items()},
        )
    if not section.eval_fraction:
        return _Text(train=dataset, held_out=None, also={})
    train_set, held_out = hold_out(dataset, section.eval_fraction, run.seed)
    also = {name: read(path) for name, path in section.also_evaluate.items()}
    return _Text(train=train_set, held_out=held_out, also=also)


@contextmanager
def _joined(config: ClientConfig) -> Iterator[Link]:
    """Join, and say why when we leave before the end."""
    client = config.client
    link = Link(client.server_address, client.client_id, client.connect_timeout)
    leaving = "stopped without a reason"
    try:
        yield link
        leaving = ""
    except KeyboardInterrupt:
        leaving = "stopped by its operator"
        raise
    except DataError:
        leaving = "could not read its data"  # the reason names files, which are nobody else's affair
        raise
    except SplitflError as error:
        leaving = type(error).__name__
        raise
    finally:
        link.close(leaving)


def _fetch_description(link: Link, config: ClientConfig, folder: Path) -> Path:
    """Bring the model's config and the tokenizer into a folder of this run."""
    directory = folder / "model"
    directory.mkdir(parents=True, exist_ok=True)
    for name in DESCRIPTION_FILES:  # our names, whatever else the server may offer
        if name in link.welcome.file_names:
            shutil.copyfile(link.fetch(name, _cache_dir(config)), directory / name)
    return directory


def _fetch_layers(link: Link, config: ClientConfig, directory: Path, device: torch.device) -> Cut:
    """Bring the weights here, and only what this side computes with into memory."""
    run = link.run
    weights_file = link.fetch(WEIGHTS_FILE, _cache_dir(config))
    later: Mapping[str, Tensor] = {}
    if ADAPTERS_FILE in link.welcome.file_names:
        later = TensorFile(link.fetch(ADAPTERS_FILE, _cache_dir(config)))
    cut = Cut.of(
        empty_model(read_config(directory), run.model),
        bottom_layers=run.model.bottom_layers,
        top_layers=run.model.top_layers,
    )
    choose_trainable(cut, run)
    weights = weights_of([weights_file], cut, seed=run.seed, later=later)
    cut.fill("client", weights.read, device)
    return cut


def _check_files(config: ClientConfig) -> None:
    """Find files that are missing or malformed before anybody waits for us."""
    for path in (config.data.path, config.data.eval_path, *config.data.also_evaluate.values()):
        if path is not None:
            read_file(path)


def _cache_dir(config: ClientConfig) -> Path:
    return (config.client.cache_dir or default_cache_dir()) / "received"


def _describe(text: _Text, run: RunConfig) -> str:
    held_out = f"{len(text.held_out)} held out" if text.held_out is not None else "none held out"
    cut_off = (
        f"{text.train.num_truncated} of them longer than max_seq_length = {run.text.max_seq_length} and cut off there"
    )
    dropped = f", {text.train.num_dropped} left out because nothing to learn was left" if text.train.num_dropped else ""
    return f"{len(text.train)} examples to train on ({cut_off}{dropped}), {held_out}"


def _say(console: Console, config: ClientConfig, text: str) -> None:
    console.print(f"{config.client.client_id}: {text}", markup=False, highlight=False)
