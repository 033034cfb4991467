"""What a redo record costs, by the setting that decides when it is forced to the disk.

`python -m benchmarks.fsync [--json FILE]`: records of LoRA's size are appended under each setting in turn; the
medians are of one run on one disk.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from splitfl.durability.record import Record
from splitfl.durability.store import Store

Setting = Literal["always", "interval", "never"]


def measure(folder: Path, num_bytes: int, rounds: int) -> dict[str, Any]:
    """Return milliseconds per append, by setting."""
    record = Record(kind="commit", fields={"number": 1}, tensors={"gradient": torch.randn(num_bytes // 4)})
    stores = {
        setting: Store(folder / f"{setting}-{num_bytes}", fsync=setting, fsync_interval=1.0, keep=2)
        for setting in get_args(Setting)
    }
    times: dict[str, list[float]] = {setting: [] for setting in stores}
    for store in stores.values():
        store.snapshot(record)
    for _ in range(rounds):
        for setting, store in stores.items():
            begun = time.perf_counter()
            store.append(record)
            times[setting].append((time.perf_counter() - begun) * 1000)
    for store in stores.values():
        store.close()
    return {
        setting: {"median_ms": round(statistics.median(found), 3), "max_ms": round(max(found), 3)}
        for setting, found in times.items()
    }


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.fsync", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = {
            f"{num_bytes} bytes": measure(Path(folder), num_bytes, arguments.rounds)
            for num_bytes in (200 << 10, 2 << 20)
        }
    for size, found in results.items():
        for setting, figures in found.items():
            print(f"{size:16} {setting:9} median {figures['median_ms']:8.2f} ms   most {figures['max_ms']:8.2f} ms")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
