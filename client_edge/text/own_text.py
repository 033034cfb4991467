"""All of one client's own text: what it trains on, what is held out, and what is asked about that."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from client_edge.text.dealing import hold_out
from client_edge.text.encoding import Tokenizer
from client_edge.text.exam import Exam
from client_edge.text.examples import Dataset
from client_edge.text.overseer import Overseer
from client_edge.text.reading import check_examples, read_examples
from splitfl.config.own import DataSection
from splitfl.config.trees import ClientConfig, RunConfig
from splitfl.models.foreign import foreign_tokenizer
from splitfl.models.source import read_config
from splitfl.telemetry.units import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """The client's examples."""

    train: Dataset
    held_out: Dataset | None
    also: dict[str, Dataset]
    exam: Exam
    """What is asked of the model about the held-out text."""
    tokenizer: Tokenizer


def check_files(config: ClientConfig) -> None:
    """Find files that are missing, malformed or of another form before anybody waits for us."""
    data = config.data
    check_examples(data.path, data, held_out=0.0 if data.eval_path is not None else data.eval_fraction)
    for path in (data.eval_path, *data.also_evaluate.values()):
        if path is not None:
            check_examples(path, data)


def read_text(config: ClientConfig, run: RunConfig, directory: Path) -> Text:
    """Read this client's examples with the tokenizer that came with the welcome."""
    tokenizer = foreign_tokenizer(directory)
    vocab_size = read_config(directory).get_text_config().vocab_size

    def read(path: Path) -> Dataset:
        with Overseer(tokenizer) as overseen:
            return read_examples(
                path,
                section=config.data,
                tokenizer=overseen,
                max_seq_length=run.text.max_seq_length,
                append_eos=run.text.append_eos,
                vocab_size=vocab_size,
            )

    train, held_out = _split(config.data, read, run.seed)
    if held_out is None:
        return Text(train=train, held_out=None, also={}, exam=Exam(), tokenizer=tokenizer)
    also = {name: read(path) for name, path in config.data.also_evaluate.items()}
    exam = Exam.of(run, tokenizer, train, held_out)
    return Text(train=train, held_out=held_out, also=also, exam=exam, tokenizer=tokenizer)


def _split(data: DataSection, read: Callable[[Path], Dataset], seed: int) -> tuple[Dataset, Dataset | None]:
    dataset = read(data.path)
    if data.eval_path is not None:
        return dataset, read(data.eval_path)
    return hold_out(dataset, data.eval_fraction, seed) if data.eval_fraction else (dataset, None)


def describe(text: Text, run: RunConfig) -> str:
    """Say how many examples there are, and what became of long ones."""
    held_out = f"{len(text.held_out)} held out" if text.held_out is not None else "none held out"
    limit = f"longer than max_seq_length = {run.text.max_seq_length}"
    cut_off = f"{text.train.num_truncated} {limit} and cut off there" if text.train.num_truncated else f"none {limit}"
    dropped = f", {text.train.num_dropped} left out because nothing to learn was left" if text.train.num_dropped else ""
    return f"{counted(len(text.train), 'example')} to train on ({cut_off}{dropped}), {held_out}"
