"""The chunked loss against the library's: CPU time, interleaved in one process, and peak memory, a process for each.

python -m benchmarks.loss --json FILE
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from splitfl.models.loss import Head, chunked_loss
from splitfl.telemetry.memory import peak_rss_bytes, rss_bytes

ROWS, LENGTH = 8, 512
MIB = 1 << 20


def material(vocabulary: int, width: int, *, trains: bool) -> tuple[Head, Tensor, Tensor]:
    """Return a head, hidden states BSD and labels BS."""
    torch.manual_seed(0)
    weight_VD = nn.Parameter(torch.empty(vocabulary, width).normal_(std=0.02), requires_grad=trains)
    labels_BS = torch.randint(0, vocabulary, (ROWS, LENGTH))
    return Head(weight_VD=weight_VD), torch.randn(ROWS, LENGTH, width, requires_grad=True), labels_BS


def run(kind: str, head: Head, hidden_BSD: Tensor, labels_BS: Tensor) -> float:
    """Take loss and gradients once; return CPU seconds."""
    head.weight_VD.grad = hidden_BSD.grad = None
    begun = time.process_time()
    if kind == "chunked":
        loss = chunked_loss(head, hidden_BSD, labels_BS, None)
    else:
        loss = ForCausalLMLoss(head.logits(hidden_BSD), labels_BS, head.weight_VD.shape[0])
    loss.backward()
    return time.process_time() - begun


def ratio(vocabulary: int, width: int, *, trains: bool, repeats: int) -> dict[str, float]:
    """Return the median CPU seconds of each and their ratio."""
    given = material(vocabulary, width, trains=trains)
    seconds: dict[str, list[float]] = {"plain": [], "chunked": []}
    for _ in range(repeats):
        for kind, taken in seconds.items():
            taken.append(run(kind, *given))
    medians = {f"{kind}_cpu_seconds": statistics.median(taken) for kind, taken in seconds.items()}
    return medians | {"ratio": medians["chunked_cpu_seconds"] / medians["plain_cpu_seconds"]}


def peak(kind: str, vocabulary: int, width: int, *, trains: bool) -> int:
    """Return the peak RSS, above head and hidden states, of a process that takes one loss."""
    command = [sys.executable, "-m", "benchmarks.loss", "--one", kind, str(vocabulary), str(width), str(int(trains))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def one(kind: str, vocabulary: int, width: int, trains: int) -> None:
    """Print the peak of this process, in bytes."""
    given = material(vocabulary, width, trains=bool(trains))
    before = rss_bytes()
    run(kind, *given)
    print(peak_rss_bytes() - before)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=4, metavar=("KIND", "V", "D", "TRAINS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        kind, *numbers = arguments.one
        one(kind, *map(int, numbers))
        return
    size = (arguments.vocabulary, arguments.width)
    result = {}
    for trains in (False, True):
        measured = ratio(*size, trains=trains, repeats=arguments.repeats)
        peaks = {f"{kind}_peak_bytes": float(peak(kind, *size, trains=trains)) for kind in ("plain", "chunked")}
        result["trained" if trains else "frozen"] = measured | peaks
    print(f"{ROWS} x {LENGTH} tokens, vocabulary {size[0]}, width {size[1]}, float32, one thread")
    for head, row in result.items():
        print(
            f"{head:8} plain {row['plain_cpu_seconds']:.1f} s {row['plain_peak_bytes'] / MIB:.0f} MiB,"
            f" chunked {row['chunked_cpu_seconds']:.1f} s {row['chunked_peak_bytes'] / MIB:.0f} MiB,"
            f" ratio {row['ratio']:.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
