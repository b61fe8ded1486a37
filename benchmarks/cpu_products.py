"""Products of packed weights on a CPU, beside torch's dense ones: thread time of one call, by rows and shape.

    python benchmarks/cpu_products.py --out benchmarks/results/cpu_products.json

Peers in the same run: ``functional.linear`` of float32 and bfloat16, and ``torch._int_mm``, which gets its codes of x
for nothing and leaves the scales out. All take turns: in one each is called a few times, and its fastest call counts,
by one thread's own clock, which stands still while another process has the core. A time is the median over the turns,
a ratio the median of ratios within one. Weights come in turn from copies that no cache holds.

bfloat16's product takes two turns in each; ``noise`` is the spread of the ratios of the two (half the distance of their
quartiles), and where its median is above ``--noise`` nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nybble.core.errors import GranularityError
from nybble.core.files import atomic_file
from nybble.kernels import cpu_integers, cpu_products
from nybble.nn.activation import ActivationQuantizer
from nybble.nn.linear import QuantLinear
from nybble.quantizer import Quantizer

WEIGHTS = (
    "int4 group=32", "int4 group=128", "int4 group=64 symmetric=false", "float4_e2m1fn group=32", "mxfp4", "nvfp4",
    "nf4 group=64", "int8 channel", "float8_e4m3fn channel", "int3 group=32", "int2 group=32",
)  # fmt: skip
LAYERS = (
    *((line, None, dtype) for line in WEIGHTS for dtype in (torch.bfloat16, torch.float32)),
    ("int8 channel", "int8 token", torch.float32),
    ("int8 channel", "int8 token", torch.bfloat16),
    ("int8 channel", "int8 token symmetric=false", torch.float32),
    ("int4 channel", "int8 token", torch.float32),
    ("int4 group=128", "int8 token", torch.float32),
    ("int4 group=32", "int8 token", torch.float32),
    ("int4 group=64 symmetric=false", "int8 token", torch.float32),
)
ROWS = (1, 2, 4, 8, 16)
SHAPES = ((4096, 4096), (1536, 576))
CALLS = 3
"""Of one turn."""
COLD = 1 << 26
"""Bytes of copies of a weight that take turns."""


class Turns:
    """Times of some calls, microseconds: of each turn the fastest of a few.

    Args:
        calls: of one contender over copies of its weight.
    """

    def __init__(self, calls: Sequence[Callable[[], Tensor]]) -> None:
        self._calls, self._next = calls, 0
        for call in calls:  # a first call looks at its weight
            call()
        self.times: list[float] = []

    def take(self) -> None:
        """One turn."""
        spent = []
        for _ in range(CALLS):
            call = self._calls[self._next % len(self._calls)]
            self._next += 1
            start = time.thread_time()
            call()
            spent.append(time.thread_time() - start)
        self.times.append(1e6 * min(spent))


def ratio(a: Turns, b: Turns) -> float:
    """Median of how many times longer a took than b."""
    return statistics.median(x / y for x, y in zip(a.times, b.times, strict=True))


def spread(a: Turns, b: Turns) -> float:
    found = statistics.quantiles([x / y for x, y in zip(a.times, b.times, strict=True)])
    return (found[2] - found[0]) / 2


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


def measured(
    weights: str, inputs: str | None, dtype: torch.dtype, rows: int, made: list[QuantLinear], turns: int
) -> dict[str, Any]:
    """One row of the table; ``made`` are copies of one layer."""
    n, k = made[0].weight.shape
    x = torch.randn(rows, k).to(dtype)
    own = Turns([lambda one=one: one(x) for one in made])  # type: ignore[misc]
    peers = {"float32": dense(x.float(), n, k), "bfloat16": dense(x.bfloat16(), n, k)}
    contenders = {"own": own, **{name: Turns(calls) for name, calls in peers.items()}}
    contenders["again"] = Turns(peers["bfloat16"])
    if inputs is not None:
        contenders["int_mm"] = Turns(whole(rows, n, k))
    for _ in range(turns):
        for one in contenders.values():
            one.take()
    faster = min((contenders["float32"], contenders["bfloat16"]), key=lambda one: statistics.median(one.times))
    twin = contenders["bfloat16" if dtype == torch.bfloat16 else "float32"]
    return {
        "shape": [n, k], "rows": rows, "weights": weights, "inputs": inputs, "dtype": str(dtype)[6:],
        "us": {name: round(statistics.median(one.times), 1) for name, one in contenders.items() if name != "again"},
        "times_dense": round(ratio(faster, own), 3), "times_twin": round(ratio(twin, own), 3),
        "noise": round(spread(contenders["bfloat16"], contenders["again"]), 3), "kernel": made[0].how()[1],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument(
        "--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES], help="of the weight, as 4096x4096"
    )
    parser.add_argument("--turns", type=int, default=15, help="of each number (default 15)")
    parser.add_argument("--lines", nargs="+", help="only these weights")
    parser.add_argument("--isa", type=int, help="at most this set of instructions: 0, 2, 3, 4")
    parser.add_argument("--noise", type=float, default=0.25, help="most that is borne (default 0.25)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.isa is not None:
        cpu_integers._ISA = cpu_products._ISA = options.isa
    results, load = [], [os.getloadavg()[0]]
    for shape in options.shapes:
        n, k = (int(side) for side in shape.split("x"))
        for weights, inputs, dtype in LAYERS:
            if options.lines and weights not in options.lines:
                continue
            try:
                made = layers(weights, inputs, n, k)
            except GranularityError as error:
                print(f"{shape} {weights}: {error}", flush=True)
                continue
            for rows in options.rows:
                with torch.no_grad():
                    found = measured(weights, inputs, dtype, rows, made, options.turns)
                results.append(found)
                print(
                    f"{shape} {rows:3} {weights} x {inputs} {dtype}: {found['us']['own']:.0f} us, "
                    f"{found['times_dense']} x the faster dense, {found['times_twin']} x its twin, "
                    f"noise {found['noise']}",
                    flush=True,
                )
            load.append(os.getloadavg()[0])
    worst = statistics.median(row["noise"] for row in results)
    report = {
        "what": __doc__.partition("\n")[0] if __doc__ else "",
        "load_average": {"least": round(min(load), 2), "most": round(max(load), 2)}, "noise": worst,
        "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
        "processor": processor(), "results": results,
    }  # fmt: skip
    if worst > options.noise:
        raise SystemExit(f"bfloat16's product against itself spreads by {worst} (at most {options.noise}): try again.")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(options.out) as file:
            file.write((json.dumps(report, indent=1) + "\n").encode())


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return " ".join([name, *(flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16") if flag in flags)])


if __name__ == "__main__":
    main()
