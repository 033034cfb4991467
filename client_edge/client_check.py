"""What `splitfl check` says of a client: it reads the data, asks the server for the run's settings, and goes again.

A client becomes part of a run when it resumes; one that leaves before that has only looked, and nobody waits for it.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from client_edge.connection.connection import Connection
from client_edge.consent.consent import Consent, sentences_of
from client_edge.consent.gate import OpenGate, folder_of
from client_edge.consent.policy import check_policy
from client_edge.link.files import Files
from client_edge.link.link import Link
from client_edge.link.received import fetch_description
from client_edge.screen import screen
from client_edge.text.batches import TrainBatches, padding_share
from client_edge.text.own_text import Text, check_files, describe, read_text
from splitfl.config.own import ClientSection
from splitfl.config.trees import ClientConfig, RunConfig
from splitfl.models.foreign import foreign_cut
from splitfl.models.source import WEIGHTS_FILE
from splitfl.telemetry.findings import Finding
from splitfl.telemetry.units import counted, format_bytes, format_share
from splitfl.training.device import open_device
from splitfl.training.forecast import EvaluationWork, Part, evaluations_of, memory_of, steps_of, wire_of
from splitfl.training.kinds import shared_parts
from splitfl.training.terms import terms_of


def check_client(path: Path, overrides: Sequence[str]) -> Iterator[Finding]:
    """Look at all that a client needs: its own files first, then what only the server can tell."""
    config = ClientConfig.load(path, overrides)
    open_device(config.client.device, "client.device")
    yield Finding(topic="config", sentences=(f"{path} is a client's: {config.client.client_id}.",))
    check_files(config)
    yield Finding(topic="files", sentences=(f"{config.data.path} can be read, and so can the held-out files.",))
    connection = Connection(config.client, OpenGate(config.client, config.policy), tell=_tell, is_patient=False)
    connection.leaving = "has only looked (splitfl check)"
    try:
        yield _server(connection)
        yield _consent(connection, config)
        check_policy(config.policy, connection.run, connection.welcome)
        yield _policy(Files(connection), config)
        yield _way(Link(connection))
        with tempfile.TemporaryDirectory() as folder:
            directory = fetch_description(Files(connection), config.client, Path(folder))
            text = read_text(config, connection.run, directory)
            yield _data(text, connection.run, config.client)
            yield evaluations_of(connection.run, _evaluation_work(text))
            cut = foreign_cut(directory, connection.run)
    finally:
        connection.close()
    yield steps_of(connection.run)
    yield wire_of(connection.run, terms_of(connection.run, cut))
    yield memory_of(Part.of(cut, "client", connection.run.optimizer), "This client holds", topic="memory")


def _tell(text: str) -> None:
    screen().print(text, markup=False, highlight=False)


def _server(connection: Connection) -> Finding:
    welcome = connection.welcome
    layers = welcome.file_sizes[welcome.file_names.index(WEIGHTS_FILE)]
    encrypted = "encrypted" if connection.is_encrypted else "not encrypted, on this machine alone"
    return Finding(
        topic="server",
        sentences=(
            f"{connection.address} answers ({encrypted}): run {welcome.run_id}, model"
            f" {connection.run.model.model_name_or_path}, {connection.run.federation.server_mode}.",
            f"The layers that a client holds are {format_bytes(layers)}, fetched once.",
        ),
        numbers={"run_id": welcome.run_id, "address": connection.address, "bytes_of_layers": layers},
    )


def _way(link: Link) -> Finding:
    num_bytes, seconds = link.probe()
    return Finding(
        topic="way",
        sentences=(f"A full frame of {num_bytes:,} bytes went both ways in {seconds * 1000:.0f} ms.",),
        numbers={"frame_bytes": num_bytes, "round_trip_seconds": seconds},
    )


def _consent(connection: Connection, config: ClientConfig) -> Finding:
    asked = Consent.asked_for(
        connection.run,
        run_id=connection.welcome.run_id,
        client_id=config.client.client_id,
        address=connection.address,
        server_key=connection.server_key,
    )
    before = Consent.read(folder_of(config.client, connection.welcome.run_id))
    is_covered = before is not None and before.covers(asked)
    said = f"It was accepted at {before.agreed_at} ({before.how})." if before and is_covered else _NOT_YET
    return Finding(
        topic="consent",
        sentences=(*sentences_of(asked, connection.run, None if is_covered else before), said),
        numbers={"fingerprint": asked.fingerprint, "accepted": is_covered},
    )


_NOT_YET = "Nobody has accepted this yet: `splitfl client` asks on a terminal, and needs --accept without one."


def _policy(files: Files, config: ClientConfig) -> Finding:
    digest = files.digest_of(WEIGHTS_FILE)
    pinned = config.policy.known_weights
    said = "policy.known_weights compares them when joining" if pinned else "policy.known_weights can pin them"
    return Finding(
        topic="policy",
        sentences=(
            "Your policy allows these settings.",
            f"The first layers have SHA-256 {digest}; {said}. It vouches for nothing that merges bring later.",
        ),
        numbers={"hash_of_layers": digest, "allowed": True},
    )


def _evaluation_work(text: Text) -> EvaluationWork:
    if text.held_out is None:
        return EvaluationWork(examples=0)
    return EvaluationWork(
        examples=len(text.held_out),
        classified=len(text.exam.to_classify),
        labels=len(text.exam.labels),
        answered=len(text.exam.to_answer),
    )


def _data(text: Text, run: RunConfig, client: ClientSection) -> Finding:
    num_tokens = sum(len(example.input_ids) for example in text.train.examples)
    batches = TrainBatches.of(text.train, run, client)
    num_rows, rows_in_step = len(batches.rows), _rows_in_step(run)
    measured = min(run.total_steps, -(-num_rows // rows_in_step))
    padding = padding_share(batches, measured)
    return Finding(
        topic="data",
        sentences=(
            f"{describe(text, run)}.",
            _way_through(run, num_tokens, num_rows),
            *([] if padding is None else [_padding(run, padding, measured)]),
        ),
        numbers={
            "examples": len(text.train),
            "held_out": len(text.held_out) if text.held_out is not None else 0,
            "truncated": text.train.num_truncated,
            "dropped": text.train.num_dropped,
            "tokens": num_tokens,
            "rows": num_rows,
            "padding_share": padding,
            "epochs": run.total_steps * rows_in_step / num_rows,
        },
    )


def _rows_in_step(run: RunConfig) -> int:
    return run.federation.per_device_train_batch_size * run.federation.gradient_accumulation_steps


def _way_through(run: RunConfig, num_tokens: int, num_rows: int) -> str:
    rows = _rows_in_step(run)
    packed = (
        f", packed into {counted(num_rows, 'row')} of at most {run.text.max_seq_length}" if run.text.packing else ""
    )
    of_what = counted(rows, "row" if run.text.packing else "example")
    return (
        f"{num_tokens:,} {'token' if num_tokens == 1 else 'tokens'} in the training examples{packed};"
        f" {counted(run.total_steps, 'step')} of {of_what} go through them"
        f" {run.total_steps * rows / num_rows:.2f} times{shared_parts(run).steps_unsaid}."
    )


def _padding(run: RunConfig, share: float, num_steps: int) -> str:
    remedy = "" if run.text.packing else "; text.packing on the server leaves less"
    return f"{format_share(share)} of the positions sent in the first {counted(num_steps, 'step')} are padding{remedy}."
