"""Products of packed weights on a CPU, beside torch's dense ones: thread time of one call, by rows and shape.

    python benchmarks/cpu_products.py --out benchmarks/results/cpu_products.json

Peers in the same run: ``functional.linear`` of float32 and bfloat16, and ``torch._int_mm``, which gets its codes of x
for nothing and leaves the scales out. Each time is the best of many calls by one thread's own clock, which stands still
while another process has the core; the weights are taken in turn from copies that no cache holds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from nybble.core.files import atomic_file
from nybble.kernels import cpu_integers, cpu_products
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.linear import QuantLinear
from nybble.quantizer import Quantizer

LAYERS = (
    ("int8 channel", "int8 token", torch.float32),
    ("int8 channel", "int8 token", torch.bfloat16),
    ("int8 channel", "int8 token symmetric=false", torch.float32),
    ("int8 channel", None, torch.float32),
    ("int4 channel", "int8 token", torch.float32),
    ("int4 group=128", "int8 token", torch.float32),
    ("int4 group=32", "int8 token", torch.float32),
    ("int4 group=64 symmetric=false", "int8 token", torch.float32),
    ("int4 group=64 symmetric=false", None, torch.float32),
)
ROWS = (1, 4, 8, 64, 512)
SHAPES = ((4096, 4096), (1536, 576))
COLD = 1 << 26
"""Bytes of copies of a weight that take turns."""


def best(calls: Sequence[Callable[[], Tensor]], seconds: float) -> float:
    """Microseconds of the fastest call, at least two rounds of all."""
    found, end, turn = float("inf"), time.perf_counter() + seconds, 0
    while turn < 2 * len(calls) or time.perf_counter() < end:
        start = time.thread_time()
        calls[turn % len(calls)]()
        spent = time.thread_time() - start
        found, turn = min(found, spent), turn + 1
    return 1e6 * found


def copies(count: float) -> range:
    return range(max(2, int(COLD / count)))


def dense(x: Tensor, n: int, k: int) -> list[Callable[[], Tensor]]:
    weights = [torch.randn(n, k).to(x.dtype) for _ in copies(n * k * x.element_size())]
    return [lambda w=w: functional.linear(x, w) for w in weights]  # type: ignore[misc]


def whole(rows: int, n: int, k: int) -> list[Callable[[], Tensor]]:
    x = torch.randint(-127, 128, (rows, k), dtype=torch.int8)
    weights = [torch.randint(-127, 128, (n, k), dtype=torch.int8) for _ in copies(n * k)]
    return [lambda w=w: torch._int_mm(x, w.t()) for w in weights]  # type: ignore[misc]


def layers(weights: str, inputs: str | None, n: int, k: int) -> list[QuantLinear]:
    packed = Quantizer(weights).quantize(torch.randn(n, k))
    made = []
    for _ in copies(packed.nbytes()):
        own = type(packed).rebuild(packed.spec(), {name: t.clone() for name, t in packed.tensors().items()})
        made.append(QuantLinear(own, inputs=ActivationQuantizer(Quantizer(inputs)) if inputs else None))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument(
        "--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES], help="of the weight, as 4096x4096"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number (default 1)")
    parser.add_argument("--lines", nargs="+", help="only these weights")
    parser.add_argument("--isa", type=int, help="at most this set of instructions: 0, 2, 3, 4")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.isa is not None:
        cpu_integers._ISA = cpu_products._ISA = options.isa
    rows = []
    for shape in options.shapes:
        n, k = (int(side) for side in shape.split("x"))
        peers = {}
        for count in options.rows:
            x = torch.randn(count, k)
            peers[count] = {
                "float32_us": best(dense(x, n, k), options.seconds),
                "bfloat16_us": best(dense(x.bfloat16(), n, k), options.seconds),
                "int_mm_us": best(whole(count, n, k), options.seconds),
            }
            print(shape, count, *(f"{name} {us:.0f}" for name, us in peers[count].items()), flush=True)
        for weights, inputs, dtype in LAYERS:
            if options.lines and weights not in options.lines:
                continue
            made = layers(weights, inputs, n, k)
            for count in options.rows:
                x = torch.randn(count, k).to(dtype)
                with torch.no_grad():
                    us = best([lambda one=one, x=x: one(x) for one in made], options.seconds)  # type: ignore[misc]
                faster = min(peers[count]["float32_us"], peers[count]["bfloat16_us"])
                rows.append({
                    "shape": [n, k], "rows": count, "weights": weights, "inputs": inputs, "dtype": str(dtype)[6:],
                    "us": round(us, 1), **{name: round(peer, 1) for name, peer in peers[count].items()},
                    "times_dense": round(faster / us, 3), "kernel": made[0].how()[1],
                })  # fmt: skip
                print(
                    f"{shape} {count:4} {weights} x {inputs} {dtype}: {us:.0f} us, {faster / us:.2f} x dense",
                    flush=True,
                )
    report = {
        "what": __doc__.partition("\n")[0] if __doc__ else "",
        "load_average": [round(v, 2) for v in os.getloadavg()],
        "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__, "results": rows,
    }  # fmt: skip
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(options.out) as file:
            file.write((json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
