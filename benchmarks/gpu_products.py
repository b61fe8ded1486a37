"""Products of packed weights on a GPU, beside torch's and others': microseconds of one call, by format, shape and rows.

    python benchmarks/gpu_products.py --out benchmarks/results/gpu_products.json [--quick] [--tune]

A CUDA graph holds 20 calls or more, each with the next of as many copies of a weight as no cache holds (200 MB); a time
is the median of its replays over the calls in it. Peers are timed the same way in the same run: torch's bfloat16
product, its tinygemm (INT4, groups of 128), bitsandbytes' NF4 where it is installed. The floor of a row is what it has to
read and write over the bandwidth of a large copy, measured first. Every result is compared with float64 before it is
timed: the error is given as a share of the bound that rounding W and y to bfloat16 and adding in float32 allow.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nybble.core.files import atomic_file
from nybble.kernels import cuda_products
from nybble.kernels._gpu_weights import Weight, weight_of
from nybble.nn.compiled import key_of
from nybble.nn.products import packed_linear
from nybble.qtensor import QTensor
from nybble.quantizer import Quantizer

Call = Callable[[], Tensor]
LINES = {
    "INT4 g128": "int4 group=128",
    "INT4 g128 zero points": "int4 group=128 symmetric=false",
    "E2M1 g32": "e2m1 group=32",
    "MXFP4": "mxfp4",
    "NVFP4": "nvfp4",
    "NF4": "nf4-bnb",
    "NF4 double": "nf4-bnb-dq",
    "INT3 g128": "int3 group=128",
    "INT2 g128": "int2 group=128",
}
QUICK = ("INT4 g128", "MXFP4", "NVFP4", "NF4")
SHAPES = ((14336, 4096), (4096, 4096))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
QUICK_ROWS = (1, 16, 64, 2048)
CALLS, COLD = 20, 200e6
BARS = {  # (columns out, rows): the most of floors, by format; of bf16 where rows are 2048
    (14336, 1): {"NF4": 1.8, "NF4 double": 1.8, "": 1.5},
    (4096, 1): {"": 2.4},
    (14336, 16): {"": 2.2},
    (14336, 64): {"": 3.8},
    (14336, 2048): {"": 1.2},
}


def timed(calls: Sequence[Call], budget: float = 0.05) -> float:
    """Microseconds of one of ``calls``, which a graph holds in turn, :data:`CALLS` of them or more."""
    many = max(CALLS, len(calls))
    order = [calls[i % len(calls)] for i in range(many)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in order:
            call()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - start < budget and len(times) < 200):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()  # type: ignore[no-untyped-call]
        graph.replay()
        end.record()  # type: ignore[no-untyped-call]
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / many)
    return statistics.median(times[1:])


def eager(calls: Sequence[Call], count: int = 200) -> float:
    """Microseconds of one call without a graph."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in itertools.islice(itertools.cycle(calls), count):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6 / count


def copies(nbytes: float) -> range:
    return range(max(2, math.ceil(COLD / nbytes)))


def bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    one = torch.empty(1 << 28, dtype=torch.float32, device="cuda").normal_()
    two = torch.empty_like(one)
    return 2 * one.numel() * 4 / (timed([lambda: two.copy_(one)]) * 1e-6)


def peers(n: int, k: int, m: int) -> Iterator[tuple[str, float]]:
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    dense = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in copies(2 * n * k)]
    yield "bf16", timed([lambda w=w: functional.linear(x, w) for w in dense])  # type: ignore[misc]
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    scales = torch.rand(k // 128, n, 2, dtype=torch.bfloat16, device="cuda")
    packed = torch._convert_weight_to_int4pack(codes, 8)
    tiny = [(packed.clone(), scales.clone()) for _ in copies(n * k / 2)]
    yield "tinygemm int4 g128", timed([lambda w=w: torch._weight_int4pack_mm(x, w[0], 128, w[1]) for w in tiny])  # type: ignore[misc]
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        return
    weights = [bnb.quantize_4bit(dense[0], quant_type="nf4") for _ in copies(n * k / 2)]
    yield "bitsandbytes NF4", timed([lambda w=w: _bnb(x, w) for w in weights])  # type: ignore[misc]


def _bnb(x: Tensor, weight: Any) -> Tensor:
    import bitsandbytes

    found: Tensor = bitsandbytes.matmul_4bit(x, weight[0].t(), quant_state=weight[1])
    return found


def layers(line: str, n: int, k: int) -> tuple[QTensor, list[list[Tensor]], str]:
    """A quantized weight; copies of its tensors; its key."""
    packed = Quantizer(line).quantize(torch.randn(n, k, device="cuda") / math.sqrt(k))
    tensors = packed.tensors()
    made = [[t.clone() for t in tensors.values()] for _ in copies(packed.nbytes())]
    return packed, made, key_of(packed.spec(), list(tensors))


def share_of_bound(y: Tensor, x: Tensor, packed: QTensor) -> float:
    """The largest error over its bound: W and y rounded to bfloat16, sums of float32."""
    w = packed.dequantize(torch.float32).double()
    exact, size = x.double() @ w.T, x.double().abs() @ w.abs().T
    bound = 2.0**-8 * exact.abs() + (2.0**-8 + w.shape[1] * 2.0**-24) * size + 1e-30
    return float(((y.double() - exact).abs() / bound).max())


def row_of(name: str, made: Any, m: int, n: int, k: int, found: dict[str, float], speed: float) -> dict[str, Any]:
    packed, tensors, key = made
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    share = share_of_bound(packed_linear(x, tensors[0], key, [n, k], None), x, packed)
    if not share < 1:
        raise SystemExit(f"{name} {n}x{k} M={m}: the error is {share:.3g} times its bound")
    calls: list[Call] = [lambda t=t: packed_linear(x, t, key, [n, k], None) for t in tensors]  # type: ignore[misc]
    us = timed(calls)
    weight = weight_of(packed)
    assert isinstance(weight, Weight)
    floor = (weight.nbytes() + 2 * m * (n + k)) / speed * 1e6
    row = {
        "format": name, "shape": [n, k], "rows": m, "us": round(us, 2), "floor_us": round(floor, 2),
        "times_floor": round(us / floor, 3), "of_bf16": round(us / found["bf16"], 3), "of_bound": round(share, 4),
        "kernel": cuda_products.path_of(weight, m, x.dtype),
    }  # fmt: skip
    if m == 1:
        row["eager_us"] = round(eager(calls), 1)
    bar = BARS.get((n, m), {})
    if bar:
        reached = row["of_bf16"] if m == 2048 else row["times_floor"]
        row["bar"] = bar.get(name, bar[""])
        row["met"] = reached <= row["bar"]
    return row


def tune(lines: Sequence[str], rows: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Times of every tile; prints the best."""
    results, end = [], time.perf_counter() + seconds
    for (n, k), name, m in itertools.product(SHAPES, lines, rows):
        packed = Quantizer(LINES[name]).quantize(torch.randn(n, k, device="cuda") / math.sqrt(k))
        found = weight_of(packed)
        assert isinstance(found, Weight)
        weights = [weight_of(type(packed).rebuild(packed.spec(), {a: t.clone() for a, t in packed.tensors().items()}))
                   for _ in copies(found.nbytes())]  # fmt: skip
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        here = []
        for label, call in cuda_products.candidates(found, m):
            if time.perf_counter() > end:
                print("tune: out of time", flush=True)
                return results
            try:
                share = share_of_bound(call(x, found), x, packed)
                us = timed([lambda w=w, call=call: call(x, w) for w in weights], 0.01)  # type: ignore[misc]
            except Exception as error:
                print(f"  {name} {n}x{k} M={m} {label}: {type(error).__name__} {str(error)[:200]!r}", flush=True)
                continue
            here.append({"format": name, "shape": [n, k], "rows": m, "tile": label, "us": round(us, 2),
                         "of_bound": round(share, 3)})  # fmt: skip
        here.sort(key=lambda row: row["us"])
        results += here
        for row in here[:4]:
            print(f"  tune {name} {n}x{k} M={m}: {row['us']} us {row['tile']} (of bound {row['of_bound']})", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--quick", action="store_true", help="the four main formats and the rows that have a bar")
    parser.add_argument("--tune", action="store_true", help="time every tile of the kernels first, and print the best")
    parser.add_argument("--tune-rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--lines", nargs="+", help="only these formats")
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--seconds", type=float, default=210, help="no row is begun after these (default 210)")
    options = parser.parse_args()
    torch.manual_seed(0)
    begin = time.perf_counter()
    lines = options.lines or (QUICK if options.quick else LINES)
    rows = options.rows or (QUICK_ROWS if options.quick else ROWS)
    speed = bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {speed / 1e12:.3f} TB/s", flush=True)
    tuned = tune(lines, options.tune_rows, options.seconds / 2) if options.tune else []
    results: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for n, k in SHAPES:
        found = {m: dict(peers(n, k, m)) for m in rows}
        others += [{"shape": [n, k], "rows": m, **{name: round(us, 2) for name, us in f.items()}}
                   for m, f in found.items()]  # fmt: skip
        for name in lines:
            made = layers(LINES[name], n, k)
            for m in rows:
                if time.perf_counter() - begin > options.seconds:
                    print("out of time", flush=True)
                    break
                results.append(row_of(name, made, m, n, k, found[m], speed))
    report = {
        "what": (__doc__ or "").partition("\n")[0], "device": torch.cuda.get_device_name(),
        "copy_bytes_a_second": round(speed), "python": platform.python_version(), "torch": torch.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", None), "seconds": round(time.perf_counter() - begin),
        "kernels": cuda_products.kernels_there(), "peers": others, "results": results, "tuned": tuned,
    }  # fmt: skip
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(options.out) as file:
            file.write((json.dumps(report, indent=2) + "\n").encode())
    for peer in others:
        print(peer)
    for row in results:
        bar = f"bar {row['bar']} {'met' if row['met'] else 'MISSED'}" if "bar" in row else ""
        print(
            f"{row['format']:22} {row['shape'][0]:5} x {row['shape'][1]} M={row['rows']:<4} {row['us']:8.2f} us = "
            f"{row['times_floor']:5.2f} floors, {row['of_bf16']:5.2f} bf16 {row.get('eager_us', '')} {row['kernel']} {bar}"
        )
    print(f"{report['seconds']} s")


if __name__ == "__main__":
    main()
