"""Products of packed weights on a GPU, beside torch's and others': microseconds of one call, by format, shape and rows.

    python benchmarks/gpu_products.py --out benchmarks/results/gpu_products.json [--quick] [--tune]

A CUDA graph holds 20 calls or more, each with the next of as many copies of a weight as no cache holds (200 MB); a time
is the median of its replays over the calls in it. Peers are timed the same way in the same run: torch's bfloat16
product, its tinygemm (INT4, groups of 128), bitsandbytes' NF4 and gemlite's INT4 where they are installed. The floor of
a row is what it has to read and write over the bandwidth of the quickest large copy, measured first. Every result is
compared with float64 before it is timed: the error is given as a share of the bound that rounding W (with its scale:
twice) and y to bfloat16 and adding in float32 allow. ``--tune`` first times the shapes of the kernels and takes the
best ones from there on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_decode import PEERS, installed
from torch import Tensor
from torch.nn import functional

from nybble.core.files import atomic_file
from nybble.kernels import _few_rows, cuda_products
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
TUNED = ("INT4 g128", "NVFP4")
QUICK_ROWS = (1, 16, 64, 2048)
CALLS, COLD = 20, 200e6
SHAPES_TRIED = (
    ((32, 1), (24, 1), (16, 1), (16, 1)),
    ((16, 2), (16, 2), (12, 1), (12, 1)),
    ((24, 1), (16, 1), (8, 2), (8, 1)),
    ((8, 3), (8, 3), (8, 1), (8, 2)),
)
"""Warps of a block and blocks of a multiprocessor, for up to 8, 16, 32 and 64 rows."""
BARS = {  # (columns out, rows): the most of floors, by format; of bf16 where rows are 2048
    (14336, 1): {"NF4": 1.8, "NF4 double": 1.8, "": 1.5},
    (4096, 1): {"": 2.4},
    (14336, 16): {"": 2.2},
    (14336, 64): {"": 3.8},
    (14336, 2048): {"": 1.2},
}


def timed(calls: Sequence[Call], budget: float = 0.03) -> float:
    """Microseconds of one of ``calls``, which a graph holds in turn, :data:`CALLS` of them or more."""
    many = max(CALLS, len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in itertools.islice(itertools.cycle(calls), many):
            call()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 6 or (time.perf_counter() - start < budget and len(times) < 200):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()  # type: ignore[no-untyped-call]
        graph.replay()
        end.record()  # type: ignore[no-untyped-call]
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / many)
    return statistics.median(times[1:])


def eager(calls: Sequence[Call], count: int = 200) -> float:
    """Microseconds of one call without a graph."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in itertools.islice(itertools.cycle(calls), count):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6 / count


def copies(nbytes: float) -> range:
    return range(max(2, math.ceil(COLD / nbytes)))


def bandwidth() -> dict[str, float]:
    """Bytes a second, read and written, of copies of 1 GiB: in a graph, and by another kernel of torch's."""
    one = torch.empty(1 << 28, dtype=torch.float32, device="cuda").normal_()
    two = torch.empty_like(one)
    ways: dict[str, Call] = {"copy_": lambda: two.copy_(one), "neg": lambda: torch.neg(one, out=two)}
    found = {name: 2 * one.numel() * 4 / (timed([call]) * 1e-6) for name, call in ways.items()}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()  # type: ignore[no-untyped-call]
    for _ in range(10):
        two.copy_(one)
    end.record()  # type: ignore[no-untyped-call]
    end.synchronize()
    return found | {"copy_ without a graph": 10 * 2 * one.numel() * 4 / (begin.elapsed_time(end) * 1e-3)}


def peers(n: int, k: int, m: int) -> Iterator[tuple[str, float]]:
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    dense = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in copies(2 * n * k)]
    yield "bf16", timed([lambda w=w: functional.linear(x, w) for w in dense])  # type: ignore[misc]
    for name, (package, make) in PEERS.items():
        if find_spec(package) is not None:
            try:
                made = [make(dense[0]) for _ in copies(n * k / 2)]
                yield name, timed([lambda w=w: w(x) for w in made])  # type: ignore[misc]
            except (ImportError, RuntimeError, TypeError, ValueError) as error:
                print(f"{name} for {m} rows: {type(error).__name__}: {error}"[:300], flush=True)


def layers(line: str, n: int, k: int) -> tuple[QTensor, list[list[Tensor]], str]:
    """A quantized weight; copies of its tensors; its key."""
    packed = Quantizer(line).quantize(torch.randn(n, k, device="cuda") / math.sqrt(k))
    tensors = packed.tensors()
    made = [[t.clone() for t in tensors.values()] for _ in copies(packed.nbytes())]
    return packed, made, key_of(packed.spec(), list(tensors))


def share_of_bound(y: Tensor, x: Tensor, packed: QTensor, bias: Tensor | None = None) -> float:
    """The largest error over its bound: W, its scale and y rounded to the dtype of x, sums of float32."""
    eps = torch.finfo(x.dtype).eps / 2
    w = packed.dequantize(torch.float32).double()
    exact, size = x.double() @ w.T, x.double().abs() @ w.abs().T
    if bias is not None:
        exact = exact + bias.double()
    bound = 2 * eps * exact.abs() + (2.1 * eps + w.shape[1] * 2.0**-24) * size + 1e-30
    return float(((y.double() - exact).abs() / bound).max())


def row_of(name: str, made: Any, m: int, n: int, k: int, found: dict[str, float], speed: float) -> dict[str, Any]:
    packed, tensors, key = made
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    share = share_of_bound(packed_linear(x, tensors[0], key, [n, k], None), x, packed)
    if not share < 1:
        raise ArithmeticError(f"the error is {share:.3g} times its bound")
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


def small(line: str, n: int = 64, k: int = 256) -> Weight:
    found = weight_of(Quantizer(line).quantize(torch.randn(n, k, device="cuda")))
    assert isinstance(found, Weight)
    return found


def build(lines: Sequence[str], tried: Sequence[Any], dtype: torch.dtype = torch.bfloat16) -> None:
    """Compile what these formats need, all at once."""
    kinds = {_few_rows.kind_of(small(LINES[name]), dtype, m) for name in lines for m in (1, 64)}
    asked = [(kind, shapes) for kind in sorted(k for k in kinds if not isinstance(k, str)) for shapes in tried]
    start = time.perf_counter()
    device = torch.cuda.current_device()

    def one(given: Any) -> Any:
        torch.cuda.set_device(device)
        try:
            return _few_rows.library(*given)
        except Exception as error:
            print(f"not compiled: {type(error).__name__} {error}", flush=True)
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(one, asked))
    print(f"{len(asked)} kernels in {time.perf_counter() - start:.1f} s, {made.count(None)} not compiled", flush=True)


def check() -> None:
    """Every format on odd shapes, with a bias, float16 too; raises SystemExit."""
    wrong = 0
    for dtype, names in ((torch.bfloat16, list(LINES)), (torch.float16, ["INT4 g128", "NF4"])):
        build(names, [None], dtype)
        for name, (n, k), m in itertools.product(names, ((1000, 4096), (4104, 1280)), (1, 9, 30, 100)):
            line = LINES[name]
            packed, tensors, key = layers(line, n, k)
            weight = weight_of(packed)
            assert isinstance(weight, Weight)
            x = torch.randn(m, k, dtype=dtype, device="cuda")
            bias = torch.randn(n, dtype=dtype, device="cuda")
            share = share_of_bound(packed_linear(x, tensors[0], key, [n, k], bias), x, packed, bias)
            if not share < 1:
                wrong += 1
                print(f"WRONG {name} {n}x{k} M={m} {dtype} {cuda_products.path_of(weight, m, dtype)}: {share:.3g}")
    raise SystemExit(wrong)


def tune(lines: Sequence[str], rows: Sequence[int], end: float) -> list[dict[str, Any]]:
    """Times of the kernels' shapes; prints the best, and takes those of the compiled ones."""
    results: list[dict[str, Any]] = []
    for (n, k), name in itertools.product(SHAPES, lines):
        packed, tensors, _ = layers(LINES[name], n, k)
        names = list(packed.tensors())
        weights = [weight_of(type(packed).rebuild(packed.spec(), dict(zip(names, t, strict=True)))) for t in tensors]
        found = weights[0]
        assert isinstance(found, Weight)
        for m in rows:
            x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
            here = []
            for label, shapes, call in ways(found, m, full=name == lines[0] and n == SHAPES[0][0]):
                if time.perf_counter() > end:
                    break
                try:
                    share = share_of_bound(call(x, found), x, packed)
                    us = timed([lambda w=w, call=call, x=x: call(x, w) for w in weights], 0.01)  # type: ignore[misc]
                except Exception as error:
                    print(f"  {name} {n}x{k} M={m} {label}: {type(error).__name__} {str(error)[:200]!r}", flush=True)
                    continue
                here.append({"format": name, "shape": [n, k], "rows": m, "way": label, "shapes": shapes,
                             "us": round(us, 2), "of_bound": round(share, 3)})  # fmt: skip
            here.sort(key=lambda row: row["us"])
            results += here
            for row in here[:3]:
                print(f"  {name} {n}x{k} M={m}: {row['us']} us {row['way']} ({row['of_bound']} of bound)", flush=True)
    for of in _few_rows.SHAPES:
        total: dict[tuple[int, int], float] = {}
        for row in results:
            if row["shapes"] and (row["rows"] - 1) // 8 + 1 in ((of,) if of < 4 else (of - 1, of)):
                at = row["shapes"][list(_few_rows.SHAPES).index(of)]
                total[at] = total.get(at, 0) + row["us"]
        if total:
            _few_rows.SHAPES[of] = min(total, key=lambda shape: total[shape])
    print(f"taken: {_few_rows.SHAPES}", flush=True)
    return results


def ways(weight: Weight, rows: int, full: bool) -> Iterator[tuple[str, Any, Callable[[Tensor, Weight], Tensor]]]:
    kind = _few_rows.kind_of(weight, torch.bfloat16, rows)
    for shapes in SHAPES_TRIED if cuda_products.COMPILED and rows <= 64 and not isinstance(kind, str) else ():
        made = _few_rows.library(kind, shapes)  # type: ignore[arg-type]
        if made is not None:
            yield f"compiled {shapes}", shapes, lambda x, w, made=made: _few_rows.multiply(made, x, w, None)
    if full:
        for label, call in cuda_products.candidates(weight, rows):
            yield label, None, call


def rows_of(lines: Sequence[str], rows: Sequence[int], found: Any, speed: float, end: float) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for (n, k), name in itertools.product(SHAPES, lines):
        if time.perf_counter() > end:
            break
        made = layers(LINES[name], n, k)
        for m in rows:
            if (n, m) not in found:
                found[n, m] = dict(peers(n, k, m))
            try:
                results.append(row_of(name, made, m, n, k, found[n, m], speed))
            except Exception as error:
                print(f"FAILED {name} {n}x{k} M={m}: {type(error).__name__} {str(error)[:300]}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--quick", action="store_true", help="the four main formats and the rows that have a bar")
    parser.add_argument("--tune", action="store_true", help="time the kernels' shapes first, and take the best")
    parser.add_argument("--check", action="store_true", help="only compare with float64, on small odd shapes")
    parser.add_argument("--seconds", type=float, default=210, help="nothing is begun after these (default 210)")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.check:
        check()
    begin = time.perf_counter()
    end = begin + options.seconds
    checking = subprocess.Popen(
        [sys.executable, __file__, "--check"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    build(TUNED if options.tune else QUICK, SHAPES_TRIED if options.tune else [None])
    said = checking.communicate(timeout=180)[0]
    print(f"check: {checking.returncode} in {time.perf_counter() - begin:.0f} s\n{said[-2000:]}", flush=True)
    if checking.returncode:  # what writes or reads elsewhere would end all that is timed
        cuda_products.COMPILED = False
    speeds = bandwidth()
    speed = max(speeds.values())
    print(
        f"{torch.cuda.get_device_name()}, copies { ({k: round(v / 1e12, 3) for k, v in speeds.items()}) } TB/s",
        flush=True,
    )
    tuned = tune(TUNED, (1, 16, 32, 64, 2048), begin + options.seconds * 0.6) if options.tune else []
    if cuda_products.COMPILED:
        build(QUICK if options.quick else list(LINES), [None])
    found: dict[tuple[int, int], dict[str, float]] = {}
    results = rows_of(QUICK, QUICK_ROWS, found, speed, end)
    compiled, cuda_products.COMPILED = cuda_products.COMPILED, False
    portable = rows_of(("INT4 g128", "NVFP4", "NF4"), QUICK_ROWS[:3], found, speed, end) if compiled else []
    cuda_products.COMPILED = compiled
    print_rows(results, portable, found)
    for lines, rows in (
        ()
        if options.quick
        else (  # less and less of what the bars speak of
            ([name for name in LINES if name not in QUICK], QUICK_ROWS),
            (list(LINES), [m for m in ROWS if m not in QUICK_ROWS]),
        )
    ):
        save(options.out, report(begin, speeds, found, results, portable, tuned))
        results += rows_of(lines, rows, found, speed, end)
    save(options.out, report(begin, speeds, found, results, portable, tuned))
    print(f"{len(results)} rows, {time.perf_counter() - begin:.0f} s")


def report(begin: float, speeds: Any, found: Any, results: Any, portable: Any, tuned: Any) -> dict[str, Any]:
    return {
        "what": (__doc__ or "").partition("\n")[0], "device": torch.cuda.get_device_name(),
        "copy_bytes_a_second": speeds, "python": platform.python_version(), "torch": torch.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", None), "cuda": torch.version.cuda,
        "installed": installed("bitsandbytes", "gemlite"),
        "seconds": round(time.perf_counter() - begin), "shapes": {str(k): v for k, v in _few_rows.SHAPES.items()},
        "peers": [{"columns_out": n, "rows": m, **{name: round(us, 2) for name, us in us_of.items()}}
                  for (n, m), us_of in found.items()],
        "results": results, "triton_alone": portable, "tuned": tuned,
    }  # fmt: skip


def save(out: Path | None, found: dict[str, Any]) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as file:
            file.write((json.dumps(found, indent=2) + "\n").encode())


def print_rows(results: list[dict[str, Any]], portable: list[dict[str, Any]], found: dict[Any, Any]) -> None:
    for (n, m), us in found.items():
        print(n, m, {name: round(value, 2) for name, value in us.items()})
    for row in [*results, *portable]:
        if row["rows"] in QUICK_ROWS:
            bar = f"bar {row['bar']} {'met' if row['met'] else 'MISSED'}" if "bar" in row else ""
            end = f"{row.get('eager_us', '')} {row['kernel']} {bar}"
            print(
                f"{row['format']:21} {row['shape'][0]:5} M={row['rows']:<4} {row['us']:7.2f} us "
                f"{row['times_floor']:5.2f} floors {row['of_bf16']:5.2f} bf16 {end}"
            )


if __name__ == "__main__":
    main()
