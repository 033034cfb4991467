"""Breaks the code in one place after the other, and sees which test notices.

`python -m benchmarks.mutants` takes some minutes; with names it does those alone, `--list` names all. Each mutant is a
few letters of one function, found by the function's name wherever that lies, and changed in a copy of the working tree.
The test that notices must pass once the code is whole again. `--root DIR` does it with another checkout, `--json FILE`
writes what was found. It ends with 1 if a mutant lives.

A mutant whose function or letters no longer exist is a mistake of this list: change it together with the code, and keep
what it breaks. Tests that take too long have noticed as well, since that is how a hang is seen.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.house import PACKAGES, ROOT

_NOT_COPIED = (".*", "__pycache__", "build", "dist", "runs", "*.egg-info")
_TIMEOUT_S = 170
_HANGS = f"no end within {_TIMEOUT_S} s"
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", flags=re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One thing broken."""

    name: str
    function: str
    """`Class.method` or a function, of any module."""
    letters: str
    """They stand once in the function."""
    instead: str
    tests: str
    """The tests that should notice, or their files or folders, separated by blanks; those that are not there wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What became of a mutant."""

    name: str
    noticed_by: str
    """The first test that failed, "" if none did."""
    seconds: float


MUTANTS = (
    # the cut
    Mutant(
        name="cut leaves no backbone",
        function="Cut.of",
        letters="bottom_layers + top_layers >= anatomy.num_blocks",
        instead="bottom_layers + top_layers > anatomy.num_blocks",
        tests="tests/models/test_cut.py",
    ),
    Mutant(
        name="chunked loss forgets the head's scale on the way back",
        function="_forward_and_back_to_linear",
        letters="grad_RV.mul_(head.scale) if head.scale != 1.0 else grad_RV",
        instead="grad_RV",
        tests="tests/models/test_loss.py",
    ),
    Mutant(
        name="packed examples predict each other's first token",
        function="_joined",
        letters="labels[starts] = IGNORED_LABEL",
        instead="labels[:1] = IGNORED_LABEL",
        tests="tests/client_edge/test_batches.py tests/client_edge/test_packed_rows.py",
    ),
    # the wire
    Mutant(
        name="true is a number",
        function="_check_scalar",
        letters="type(value) is not wanted",
        instead="not isinstance(value, wanted)",
        tests="tests/protocol",
    ),
    Mutant(
        name="frames that nobody described are taken",
        function="_take_tensors",
        letters="taken != len(buffers)",
        instead="taken > len(buffers)",
        tests="tests/protocol",
    ),
    Mutant(
        name="infinity is taken for a number",
        function="Tensors._check_values",
        letters="not math.isfinite(norm)",
        instead="math.isnan(norm)",
        tests="tests/protocol/test_tensors.py",
    ),
    # sessions
    Mutant(
        name="a client claims more label tokens than it sent",
        function="ServerSession._admit_commit",
        letters="message.num_label_tokens > num_tokens",
        instead="message.num_label_tokens > 2 * num_tokens",
        tests="tests/session tests/traces",
    ),
    Mutant(
        name="a step has a row too many",
        function="ServerSession._check_rows",
        letters="total > most",
        instead="total > most + 1",
        tests="tests/session tests/traces",
    ),
    Mutant(
        name="a client that is late goes on all the same",
        function="ServerSession._compare",
        letters='return "anew", ',
        instead='return "go", ',
        tests="tests/session tests/traces",
    ),
    Mutant(
        name="a later round's merge ends this one",
        function="SharedRounds.may_end",
        letters="return merge == number",
        instead="return merge >= number",
        tests="tests/session tests/traces",
    ),
    # gates and rounds
    Mutant(
        name="as many commits as members, whoever they are of",
        function="SharedGate._apply_if_complete",
        letters="self._expected <= self._asked",
        instead="len(self._expected) <= len(self._asked)",
        tests="tests/server_backbone tests/traces",
    ),
    Mutant(
        name="who sits out goes before those who wait",
        function="SequentialGate._next_turn",
        letters="if not self.sits_out(held)",
        instead="if self.sits_out(held)",
        tests="tests/server_backbone tests/traces",
    ),
    Mutant(
        name="a round asks for one client more than it needs",
        function="Rounds._close",
        letters="len(done) >= fewest",
        instead="len(done) > fewest",
        tests="tests/server_backbone tests/traces",
    ),
    # merges
    Mutant(
        name="a mean without weights",
        function="exact_means",
        letters="total.div_(sum(weights))",
        instead="total.div_(len(weights))",
        tests="tests/federation",
    ),
    Mutant(
        name="controls are not scaled to the clients there are",
        function="SCAFFOLD.aggregate_controls",
        letters="total = control * num_before",
        instead="total = control * num_clients",
        tests="tests/federation",
    ),
    Mutant(
        name="a client's controls move though its layers were not merged",
        function="Controls.round_ends",
        letters="if counted and self._rate > 0:",
        instead="if self._rate > 0:",
        tests="tests/client_edge/test_controls.py",
    ),
    Mutant(
        name="an upload weighs what its client says",
        function="Uploads.spool",
        letters="min(upload.num_examples, seen.num_examples)",
        instead="upload.num_examples",
        tests="tests/learning/test_claims.py",
    ),
    # the audit: what a log must prove
    Mutant(
        name="a record with a wrong checksum is read",
        function="unpack",
        letters="file.read(_DIGEST_BYTES) != digest.digest()",
        instead="len(file.read(_DIGEST_BYTES)) != _DIGEST_BYTES",
        tests="tests/durability",
    ),
    Mutant(
        name="a record that the disk refused stays in the log",
        function="Store.append",
        letters="log.cut(before)",
        instead="log.sync()",
        tests="tests/durability",
    ),
    Mutant(
        name="a commit number left out is no problem",
        function="_check_order",
        letters="!= state.commit_number + 1",
        instead="<= state.commit_number",
        tests="tests/test_recorded_runs.py",
    ),
    # limits
    Mutant(
        name="a message has no room for frames beside its tensors",
        function="_most_frames",
        letters="beside + max(",
        instead="max(",
        tests="tests/session tests/transport",
    ),
    Mutant(
        name="a client begins sessions without end",
        function="Admission._may_begin",
        letters="(left - 1, now_s)",
        instead="(left, now_s)",
        tests="tests/server_backbone",
    ),
    Mutant(
        name="an allowance begins anew with each start",
        function="Allowance.__init__",
        letters='int(before.get("bytes_sent", 0))',
        instead="0",
        tests="tests/client_edge/test_policy.py",
    ),
    Mutant(
        name="two names for one key",
        function="authorize",
        letters="owner is not None and owner != client_id",
        instead="owner is not None and owner == client_id",
        tests="tests/commands/test_keys.py tests/transport",
    ),
    # the client's journal and its optimizer
    Mutant(
        name="a client that starts again keeps the model's first weights",
        function="Snapshots.go_to",
        letters="self._edge.restore(snapshot.tensors)",
        instead="snapshot.tensors",
        tests="tests/faults/test_exactly_once.py::test_a_client_that_dies_at_a_point",
    ),
    Mutant(
        name="a cosine rises again after its last step",
        function="PartOptimizer.learning_rate",
        letters="min(step - 1, self._last)",
        instead="step - 1",
        tests="tests/training",
    ),
    Mutant(
        name="dropout is the same for every client",
        function="seed_for",
        letters="map(str, parts)",
        instead="map(str, parts[:2])",
        tests="tests/training",
    ),
    # the display
    Mutant(
        name="the bar is a round ahead",
        function="RunView.fraction",
        letters="self.round.number - 1 + steps",
        instead="self.round.number + steps",
        tests="tests/telemetry tests/reporting",
    ),
    Mutant(
        name="a peer's name steers the terminal",
        function="printable",
        letters='else "?"',
        instead="else character",
        tests="tests/telemetry tests/reporting",
    ),
)


class Misplaced(Exception):  # noqa: N818  # the name is the finding
    """A mutant of this list that does not fit the code any more."""


def broken(root: Path, mutant: Mutant) -> tuple[Path, str]:
    """Return the file that a mutant changes, and its new text; raise `Misplaced` where there is not one such place."""
    found = []
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if mutant.letters not in source:
            continue
        lines = source.splitlines(keepends=True)
        for first, last in _lines_of(source, mutant.function):
            function = "".join(lines[first - 1 : last])
            if function.count(mutant.letters) == 1:
                changed = function.replace(mutant.letters, mutant.instead)
                found.append((path, "".join([*lines[: first - 1], changed, *lines[last:]])))
    if len(found) != 1:
        where = f"{len(found)} functions {mutant.function} have {mutant.letters!r} once"
        raise Misplaced(f"{mutant.name}: {where}, and it must be one: change MUTANTS with the code")
    return found[0]


def _lines_of(source: str, function: str) -> Iterator[tuple[int, int]]:
    """Yield the first and the last line, from 1, of every function with this name."""
    nodes: list[tuple[str, ast.AST]] = [("", ast.parse(source))]
    while nodes:
        prefix, node = nodes.pop()
        for child in ast.iter_child_nodes(node):
            name = f"{prefix}{child.name}" if isinstance(child, ast.ClassDef | ast.FunctionDef) else prefix
            if name == function and isinstance(child, ast.FunctionDef):
                yield child.lineno, child.end_lineno or child.lineno
            nodes.append((f"{name}." if name != prefix else prefix, child))


def fate_of(root: Path, mutant: Mutant) -> Fate:
    """Break a checkout, run the tests, and mend it again."""
    path, text = broken(root, mutant)
    whole = path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    begun_s = time.monotonic()
    tests = [each for each in mutant.tests.split() if (root / each.partition("::")[0]).exists()]
    try:
        noticed_by = first_failure(root, tests)
    finally:
        path.write_text(whole, encoding="utf-8")
    seconds = round(time.monotonic() - begun_s, 1)
    if noticed_by and (also := first_failure(root, tests if noticed_by == _HANGS else [noticed_by])):
        raise SystemExit(f"{mutant.name}: {noticed_by}, and where nothing is broken {also}: mend that first")
    return Fate(name=mutant.name, noticed_by=noticed_by, seconds=seconds)


def first_failure(root: Path, tests: Sequence[str]) -> str:
    """Run tests up to the first that fails, those marked `slow` as well, and return its name, "" if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not field", *tests]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return _HANGS
    if not done.returncode:
        return ""
    failed = _FAILED.search(done.stdout)
    if failed is None:
        raise SystemExit(f"pytest ended with {done.returncode} and no failure:\n{(done.stdout + done.stderr)[-2000:]}")
    return failed[1]


def _copied(root: Path, folder: Path) -> Path:
    return Path(shutil.copytree(root, folder / "broken", ignore=shutil.ignore_patterns(*_NOT_COPIED)))


def _chosen(names: Sequence[str]) -> list[Mutant]:
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        raise SystemExit(f"no such mutant: {', '.join(sorted(unknown))}; --list names all")
    return [mutant for mutant in MUTANTS if not names or mutant.name in names]


def main(argv: Sequence[str] | None = None) -> int:
    """Break one thing after the other and say which test noticed; return 1 if one went unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="these mutants alone")
    parser.add_argument("--list", action="store_true", help="name all and end")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="break a copy of this checkout instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what became of each there")
    arguments = parser.parse_args(argv)
    mutants = _chosen(arguments.names)
    if arguments.list:
        print(*(f"{mutant.name} ({mutant.function})" for mutant in mutants), sep="\n")
        return 0
    fates = []
    with tempfile.TemporaryDirectory() as folder:
        root = _copied(arguments.root, Path(folder))
        for mutant in mutants:
            fates.append(fate := fate_of(root, mutant))
            print(f"{fate.name}: {fate.noticed_by or 'NOBODY NOTICED'} ({fate.seconds:.0f} s)", flush=True)
    alive = sum(not fate.noticed_by for fate in fates)
    print(f"{len(fates) - alive} of {len(fates)} were noticed")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(fate) for fate in fates], indent=2) + "\n", encoding="utf-8")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main())
