"""Which versions made something, for reports, cards and benchmarks."""

from collections.abc import Iterable
from importlib.metadata import version


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the installed versions by name; torch's with the build, as in 2.13.0+cu130.

    PyPI's wheel names its build in `torch.__version__` and not in its metadata, a CPU wheel in both. The build decides
    which kernels ran, so torch's own word counts.
    """
    return {name: _torch_version() if name == "torch" else version(name) for name in packages}


def _torch_version() -> str:
    import torch  # heavy, and only needed where something was computed with it

    return str(torch.__version__)
