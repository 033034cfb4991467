import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("splitfl", "server_backbone", "client_edge")
FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")
PROGRAM = """
from splitfl.reporting import page
from splitfl.reporting.report import build_report
assert page.__file__.startswith({installed!r}), page.__file__
print(page.render_page(build_report([])))
"""


def test_the_page_is_found_where_a_wheel_was_installed(tmp_path):
    source, installed = tmp_path / "source", tmp_path / "installed"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", *options, "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, timeout=100)
    with zipfile.ZipFile(next(tmp_path.glob("splitfl-*.whl"))) as wheel:
        wheel.extractall(installed)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(installed=str(installed))],
        env={"PYTHONPATH": str(installed), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "<h1>unnamed run</h1>" in done.stdout
    assert "font: 16px/1.55 var(--font)" in done.stdout
