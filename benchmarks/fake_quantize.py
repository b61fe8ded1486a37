"""Time of fake-quantizing a 4096 x 4096 float32 tensor on the CPU, scales included, beside torch's own operator.

    python benchmarks/fake_quantize.py --out benchmarks/results/fake_quantize.json

The peer, ``torch.fake_quantize_per_channel_affine`` to INT4, gets its scales for nothing; nybble finds one a block. The
two take turns, A B A B, and the ratio is the median of the ratios of neighbours. Run it on an otherwise idle machine:
nybble's many short steps wait for each other, and suffer more than torch's one long one when a core is taken away.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nybble.core.files import atomic_file
from nybble.quantizer import Quantizer

LINES = (
    "float4_e2m1fn group=32",
    "mxfp4",
    "int4 group=32",
    "nf4 group=32",
    "float8_e4m3fn token",
)
SHAPE = (4096, 4096)


def timed(call: Callable[[], Tensor]) -> float:
    """Seconds of one call; its result is freed before the clock stops, as it would be in a loop."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peer(x: Tensor) -> Callable[[], Tensor]:
    scale, zero_point = x.abs().amax(1) / 7, torch.zeros(len(x), dtype=torch.int32)
    return lambda: torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, -8, 7)


def compare(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], rounds: int) -> dict[str, float]:
    """Milliseconds of both (medians) and the median ratio of turns that follow each other."""
    for _ in range(2):
        ours(), theirs()
    turns = [(timed(ours), timed(theirs)) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in turns)
    return {
        "nybble_ms": round(1e3 * statistics.median(a for a, _ in turns), 2),
        "torch_ms": round(1e3 * statistics.median(b for _, b in turns), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_p20": round(ratios[len(ratios) // 5], 3),
        "ratio_p80": round(ratios[-1 - len(ratios) // 5], 3),
    }


def processor() -> str:
    """Model name as Linux tells it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--rounds", type=int, default=21, help="turns of each line (default 21)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads, for both")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    theirs = peer(x)
    results = {}
    print(f"{'line':26} {'nybble ms':>10} {'torch ms':>10} {'ratio':>7}")
    for line in LINES:
        q = Quantizer(line)
        results[line] = compare(partial(q.fake_quantize, x), theirs, options.rounds)
        row = results[line]
        print(f"{line:26} {row['nybble_ms']:10.1f} {row['torch_ms']:10.1f} {row['ratio']:7.3f}", flush=True)
    report = {
        "what": "fake_quantize of a float32 tensor, scales included, against torch.fake_quantize_per_channel_affine",
        "shape": SHAPE,
        "rounds": options.rounds,
        "threads": options.threads,
        "cores": os.cpu_count(),
        "processor": processor(),
        "load_average": [round(v, 2) for v in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "results": results,
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(options.out) as file:
            file.write((json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
