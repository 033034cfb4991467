"""The clients' text: phenotype definitions by organ system, rated snippets of four sources, or a file of the user's
own.

Records are dealt to clients as they naturally belong, evenly, or by Dirichlet over a label; each client's last
records are held out.
"""

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.split_vs_full.plan import ClientText
from splitfl.config.own import default_cache_dir
from splitfl.demo import hpo
from splitfl.errors import ConfigError, DataError
from splitfl.federation.partition import DirichletPartitioner, IidPartitioner, read_records

Record: TypeAlias = Mapping[str, Any]

_VADER = "vaderSentiment==3.3.2"
_VADER_FILES = {
    "tweets": "tweets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "films": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
}
_LABELS = ["negative", "neutral", "positive"]
# Mean ratings run from -4 to 4; near 0 raters see neither.
_NEUTRAL = 0.5
_VADER_CITATION = (
    "Hutto and Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text, ICWSM 2014"
    " (MIT licence; read from the source distribution of vaderSentiment 3.3.2)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """All records, each with the client it naturally belongs to and the label that a skew is drawn over."""

    name: str
    citation: str
    records: Sequence[Record]
    client_field: str
    """"" if the records belong to nobody."""
    label_field: str
    """"" if they have no label."""

    @property
    def key(self) -> str:
        """Part of a folder's name: readable, and different for texts that differ in anything."""
        digest = hashlib.sha256(json.dumps([dict(record) for record in self.records], default=str).encode())
        return f"{re.sub('[^A-Za-z0-9.]+', '-', self.name).strip('-')}-{digest.hexdigest()[:8]}"


def source_of(data: str, *, client_field: str = "", label_field: str = "") -> Source:
    """Read "hpo", "vader", "toy" or a file; raises `DataError` or `ConfigError` with what is missing.

    "hpo:HP:0025031,HP:0001939" takes the organ systems under these terms instead of the demo's four.
    """
    match data.partition(":"):
        case ("hpo", _, roots):
            clinics = hpo.clinics([root for root in roots.split(",") if root])
            records = [record for records in clinics.values() for record in records]
            return Source(
                name="hpo" + (f" ({', '.join(clinics)})" if roots else ""),
                citation=hpo.CITATION,
                records=records,
                client_field="organ_system",
                label_field="organ_system",
            )
        case ("vader", "", _):
            return Source(
                name="vader", citation=_VADER_CITATION, records=_vader(), client_field="source", label_field="label"
            )
        case ("toy", "", _):
            return Source(name="toy", citation="made up", records=_toy(), client_field="place", label_field="place")
    records = [dict(record) for record in read_records(Path(data))]
    for name in filter(None, (client_field, label_field)):
        if name not in records[0]:
            raise ConfigError(f"{data}: no field {name!r}; the fields there are {', '.join(records[0])}")
    return Source(
        name=Path(data).name, citation=data, records=records, client_field=client_field, label_field=label_field
    )


def write_clients(
    source: Source, folder: Path, *, dealt: str, num_clients: int, num_eval: int, seed: int
) -> dict[str, ClientText]:
    """Deal the records and write each client's files; the same arguments write the same bytes."""
    clients = {}
    for name, records in _deal(source, dealt, num_clients, num_eval, seed).items():
        # by a hash of what the record is, as the demo does: no version of a random generator changes it
        shuffled = sorted(records, key=lambda record: _digest(seed, record))
        if len(shuffled) <= num_eval:
            raise ConfigError(f"client {name} has {len(shuffled)} records, {num_eval} of which are to be held out")
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        clients[name] = ClientText(train=own / "train.jsonl", eval=own / "eval.jsonl")
        _write(clients[name].eval, shuffled[:num_eval])
        _write(clients[name].train, shuffled[num_eval:])
    return clients


def _deal(source: Source, dealt: str, num_clients: int, num_eval: int, seed: int) -> dict[str, list[Record]]:
    records = source.records
    if dealt == "natural" and source.client_field:
        return _naturally(source, num_clients, seed)
    if dealt.startswith("dirichlet:"):
        if not source.label_field:
            raise ConfigError(f"{source.name} has no label to draw a Dirichlet skew over: name one with --label-field")
        parts = DirichletPartitioner(
            num_partitions=num_clients,
            field=source.label_field,
            alpha=float(dealt.partition(":")[2]),
            seed=seed,
            min_partition_size=2 * num_eval,
        ).partition(records)
    else:
        parts = IidPartitioner(num_partitions=num_clients, seed=seed).partition(records)
    return {f"client-{number:02}": [records[index] for index in part] for number, part in enumerate(parts)}


def _naturally(source: Source, num_clients: int, seed: int) -> dict[str, list[Record]]:
    """Give each natural owner's records to one client, or to several if there are more clients than owners."""
    owners: dict[str, list[Record]] = {}
    for record in source.records:
        owners.setdefault(str(record[source.client_field]), []).append(record)
    if num_clients <= len(owners):
        return dict(list(owners.items())[:num_clients])
    each, left = divmod(num_clients, len(owners))
    if left:
        raise ConfigError(
            f"{source.name} belongs to {len(owners)} ({', '.join(owners)}): {num_clients} clients must be a multiple"
        )
    clients = {}
    for owner, records in owners.items():
        for number, part in enumerate(IidPartitioner(num_partitions=each, seed=seed).partition(records)):
            clients[f"{owner}-{number}"] = [records[index] for index in part]
    return clients


def _digest(seed: int, record: Record) -> bytes:
    return hashlib.sha256(f"{seed} {json.dumps(record, sort_keys=True, default=str)}".encode()).digest()


def _write(path: Path, records: Sequence[Record]) -> None:
    lines = (json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def _vader() -> list[Record]:
    """Return the rated snippets, fetched once from the package's source distribution."""
    kept = default_cache_dir() / "benchmarks" / "vader.jsonl"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        half_done = kept.with_suffix(".partial")
        _write(half_done, _rated(_vader_archive()))
        half_done.replace(kept)
    return [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]


def _vader_archive() -> bytes:
    """Download the source distribution with pip and return the archive of ratings within."""
    with tempfile.TemporaryDirectory(prefix="splitfl-vader-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run([*command, "--dest", folder, _VADER], capture_output=True, text=True, check=False)
        found = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or not found:
            words = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DataError(f"{_VADER} could not be downloaded ({words}); a package index must be in reach")
        with tarfile.open(found[0]) as outer:
            name = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
            inner = outer.extractfile(name)
            if inner is None:
                raise DataError(f"{_VADER} is not as expected: {name} is no file")
            return inner.read()


def _rated(archive: bytes) -> list[Record]:
    records = []
    with tarfile.open(fileobj=io.BytesIO(archive)) as ratings:
        for source, file_name in _VADER_FILES.items():
            member = next(name for name in ratings.getnames() if name.endswith(file_name))
            content = ratings.extractfile(member)
            if content is None:
                raise DataError(f"{_VADER} is not as expected: {member} is no file")
            for line in content.read().decode("utf-8", errors="replace").splitlines():
                number, rating, text = line.split("\t", 2)
                records.append(_snippet(source, number, float(rating), text))
    return records


def _snippet(source: str, number: str, rating: float, text: str) -> Record:
    label = "neutral" if abs(rating) < _NEUTRAL else "positive" if rating > 0 else "negative"
    return {
        "prompt": f"Text: {text.strip()}\nSentiment:",
        "completion": f" {label}",
        "source": source,
        "label": label,
        "labels": _LABELS,
        "id": f"{source}-{number}",
    }


def _toy() -> list[Record]:
    """Return prompts and completions in the words of the toy model's tokenizer; each place has words of its own."""
    records = []
    for place in range(4):
        for number in range(40):
            words = [f"w{(place * 40 + number * 7 + position * 3) % 250}" for position in range(10)]
            records.append(
                {
                    "prompt": " ".join(words[:4]),
                    "completion": " ".join(words[4:]),
                    "place": f"place-{place}",
                    "id": f"{place}-{number}",
                }
            )
    return records
