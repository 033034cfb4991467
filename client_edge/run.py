"""One client's whole part in a run: what `splitfl client` does."""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from splitfl.models.source import ADAPTERS_FILE, DESCRIPTION_FILES, WEIGHTS_FILE, empty_cut, weights_of
from splitfl.protocol.messages import Merged, RoundOpened
from splitfl.session.client import ClientSession
from splitfl.telemetry.display import Display
from splitfl.telemetry.memory import peak_rss_bytes
from splitfl.telemetry.metrics import MetricsLog
from splitfl.training.device import open_device
from splitfl.training.terms import terms_of


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
        with MetricsLog(folder / "metrics.jsonl") as metrics, Display(console) as display:
            metrics.listen(display)
            Participation(config, link, edge, text, metrics, begun_s).run()
    _say(console, config, f"done; this client's own metrics are in {folder}")
    return folder


class Participation:
    """Evaluate, train, evaluate, hand over the totals; and tell this client's own log how it goes."""

    def __init__(
        self, config: ClientConfig, link: Link, edge: Edge, text: _Text, metrics: MetricsLog, begun_s: float
    ) -> None:
        self._client_id = config.client.client_id
        self._device = config.client.device
        self._link = link
        self._edge = edge
        self._text = text
        self._metrics = metrics
        self._begun_s = begun_s
        self._federation = link.run.federation
        self._round_number = 0

    def run(self) -> None:
        """Do it all."""
        self._metrics.emit(
            "run_started",
            run_id=self._link.welcome.run_id,
            model=self._link.run.model.model_name_or_path,
            server_mode=self._federation.server_mode,
            num_rounds=self._federation.num_rounds,
            local_steps=self._federation.local_steps,
            fingerprint=self._link.welcome.fingerprint,
            device=self._device,
        )
        self._link.on_waiting = lambda text: self._emit("waiting", text=text)
        batches = TrainBatches(
            self._text.train,
            seed=self._link.run.seed,
            client_id=self._client_id,
            per_device_train_batch_size=self._federation.per_device_train_batch_size,
            gradient_accumulation_steps=self._federation.gradient_accumulation_steps,
        )
        self._evaluate("before")
        train(self._edge, self._link, batches, num_examples=len(self._text.train), observer=self)
        self._evaluate("after")
        self._say_goodbye()

    def round_opened(self, round_: RoundOpened) -> None:
        """Log the round; `trainers` is empty when we sit it out."""
        self._round_number = round_.round_number
        self._emit(
            "round_opened",
            round=round_.round_number,
            trainers=[self._client_id] if round_.num_steps else [],
            first_step=round_.first_step,
            num_steps=round_.num_steps,
        )

    def stepped(self, step: Step) -> None:
        """Log the step."""
        self._emit(
            "step",
            round=self._round_number,
            step=step.step,
            loss=step.loss,
            num_label_tokens=step.num_label_tokens,
            compute_seconds=self._edge.compute.seconds,
            bytes_sent=self._link.bytes_sent,
            bytes_received=self._link.bytes_received,
        )

    def merged(self, merged: Merged, digest: str) -> None:
        """Log the merge, and evaluate where that is done after every round."""
        self._emit("loaded", round=merged.round_number, accepted=merged.accepted, reason=merged.reason, digest=digest)
        if self._federation.evaluate == "rounds" and not merged.is_last:
            self._evaluate("round")

    def _evaluate(self, phase: str) -> None:
        if self._text.held_out is None:
            return
        batch_size = self._federation.per_device_eval_batch_size
        loss = evaluate(self._edge, self._link, eval_batches(self._text.held_out, batch_size))
        also = {
            name: evaluate(self._edge, self._link, eval_batches(dataset, batch_size))
            for name, dataset in (self._text.also.items() if phase == "after" else ())
        }
        num_examples, round_number = len(self._text.held_out), self._link.session.round_number
        measured = {"eval_loss": loss, "num_eval_examples": float(num_examples)}
        measured |= {f"also:{name}": other for name, other in also.items()}
        self._link.report("evaluated", phase=phase, round_number=round_number, metrics=measured)
        self._emit(
            "evaluated",
            phase=phase,
            round=round_number,
            eval_loss=loss,
            num_eval_examples=num_examples,
            also=also,
        )

    def _say_goodbye(self) -> None:
        totals = {
            "num_examples": len(self._text.train),
            "num_truncated": self._text.train.num_truncated,
            "bytes_sent": self._link.bytes_sent,
            "bytes_received": self._link.bytes_received,
            "bytes_of_files": self._link.bytes_of_files,
            "peak_rss_bytes": peak_rss_bytes(),
            "wall_seconds": time.monotonic() - self._begun_s,
            "compute_seconds": self._edge.compute.seconds,
        }
        self._link.goodbye({name: float(value) for name, value in totals.items()})
        self._emit("client_done", **totals)

    def _emit(self, event: str, **fields: Any) -> None:
        self._metrics.emit(event, client_id=self._client_id, **fields)


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
    cut, _ = empty_cut(directory, run)
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
    limit = f"longer than max_seq_length = {run.text.max_seq_length}"
    cut_off = f"{text.train.num_truncated} {limit} and cut off there" if text.train.num_truncated else f"none {limit}"
    dropped = f", {text.train.num_dropped} left out because nothing to learn was left" if text.train.num_dropped else ""
    return f"{len(text.train)} examples to train on ({cut_off}{dropped}), {held_out}"


def _say(console: Console, config: ClientConfig, text: str) -> None:
    console.print(f"{config.client.client_id}: {text}", markup=False, highlight=False)
