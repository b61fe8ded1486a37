"""Products of two quantized operands on a GPU, their quantizers and attention over a quantized cache, beside bfloat16.

    python benchmarks/gpu_quantized.py --out benchmarks/results/gpu_quantized.json

Times are of CUDA graphs: each holds at least twenty calls that take turns over at least 200 MB of weight copies, so
that no weight stays in the cache; bfloat16 goes the same way in the same run. Before anything is timed its result is
compared with float64 of the operands that the quantizers make. Floors come from this run's own copy and products.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_accumulators import accumulator_bits
from torch import Tensor

from nybble.core.files import atomic_file
from nybble.kernels import _gpu_tiles as tiles
from nybble.kernels import gpu_attention, gpu_quantized
from nybble.kernels._gpu_operands import weight_of
from nybble.nn.compiled import key_of
from nybble.nn.float_products import float_linear
from nybble.nn.integer_products import integer_linear
from nybble.quantizer import Quantizer

N, K = 14336, 4096
CALLS, COPIES = 20, 200 << 20
PRODUCTS = (
    # weights, activations, times the bfloat16 product that they may take at 2,048 rows
    ("float4_e2m1fn channel", "float4_e2m1fn token", 0.8),
    ("float4_e2m1fn channel", "float8_e4m3fn token", 0.8),
    ("fp4-m1", "float8_e4m3fn token", 0.8),
    ("fp4-m2", "float8_e4m3fn token", 0.8),
    ("mxfp4-ocp", "float8_e4m3fn token", 0.8),
    ("float8_e4m3fn channel", "float8_e4m3fn token", 0.8),
    ("int4 channel", "int8 token", 0.8),
    ("int8 channel", "int8 token", 0.8),
    ("int4 channel symmetric=false", "int8 token symmetric=false", None),
    ("int4 group=128", "int8 token", None),
    ("mxfp4-ocp", "mxfp4-ocp", 1.3),
    ("nvfp4", "nvfp4", 1.3),
    ("nvfp4", "int8 token", None),
)
QUANTIZERS = (
    "int8 token", "float8_e4m3fn token", "float4_e2m1fn token", "int8 token symmetric=false", "mxfp4-ocp", "mxfp4",
    "nvfp4",
)  # fmt: skip
CACHES = ("int8 token", "int4 group=64 scale_format=float32", "float8_e4m3fn token", "int4 token symmetric=false")
Call = Callable[[int], Any]


def graph_us(call: Call, copies: int, rounds: int = 7) -> float:
    """Microseconds of one call, the median of some replays of a graph of at least :data:`CALLS`."""
    count = max(CALLS, copies)
    for i in range(min(copies, 3)):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i % copies)
    graph.replay()
    torch.cuda.synchronize()
    found = []
    for _ in range(rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        found.append(1e3 * start.elapsed_time(stop) / count)
    return statistics.median(found)


def copies_of(nbytes: int) -> int:
    return max(2, -(-COPIES // nbytes))


def copy_gbs() -> float:
    """Bytes read and written a second by a copy within the device's memory, in GB."""
    a = torch.randn(1 << 28, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / graph_us(lambda i: b.copy_(a), 1) / 1e3


class Made:
    """Copies of one weight on the device."""

    def __init__(self, line: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        weight = Quantizer(line).quantize(torch.randn(N, K, device="cuda") / 64)
        tensors = weight.tensors()
        self.key, self.nbytes = key_of(weight.spec(), list(tensors)), sum(t.nbytes for t in tensors.values())
        self.dense = weight.dequantize()
        self.copies = [[t.clone() for t in tensors.values()] for _ in range(copies_of(self.nbytes))]

    def call(self, x: Tensor, line: str) -> Call:
        op = integer_linear if Quantizer(line).format.is_integer else float_linear
        return lambda i: op(x, self.copies[i], self.key, [N, K], None, [], "", line)


def error(y: Tensor, x: Tensor, dense: Tensor, line: str) -> float:
    """Distance from float64 on the rounded operands, over its norm."""
    rows = slice(0, 64)
    exact = Quantizer(line).fake_quantize(x.float())[rows].double() @ dense.double().T
    return float((y[rows].double() - exact).norm() / exact.norm())


def bf16_rows(sizes: tuple[int, ...]) -> dict[int, float]:
    copies = copies_of(N * K * 2)
    weights = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(copies)]
    return {m: graph_us(lambda i, x=made(m): torch.nn.functional.linear(x, weights[i]), copies) for m in sizes}


def made(m: int) -> Tensor:
    torch.manual_seed(m)
    return torch.randn(m, K, device="cuda", dtype=torch.bfloat16)


def products(sizes: tuple[int, ...], bf16: dict[int, float], gbs: float) -> Iterator[dict[str, Any]]:
    for weights, inputs, bar in PRODUCTS:
        weight = Made(weights)
        way = gpu_quantized.route(weight_of(weight.copies[0], weight.key), inputs, 1)
        for m in sizes:
            x = made(m)
            row: dict[str, Any] = {"weights": weights, "inputs": inputs, "m": m, "way": way}
            try:
                row["error"] = error(weight.call(x, inputs)(0), x, weight.dense, inputs)
                row["us"] = graph_us(weight.call(x, inputs), len(weight.copies))
            except Exception as problem:  # one that fails leaves the others their rows
                row["failed"] = f"{type(problem).__name__}: {problem}"[:600]
                yield row
                continue
            moved = weight.nbytes + 2 * m * K + 2 * m * N
            row |= {"bf16_us": bf16[m], "of_bf16": row["us"] / bf16[m], "floor_us": moved / gbs / 1e3}
            if m == 2048 and bar is not None:
                row["bar"] = bar
            yield row
        del weight


def configurations(quick: bool) -> Iterator[dict[str, Any]]:
    """The dense products under other tiles, and torch's own scaled product, at 2,048 rows."""
    found = {"INT8": (tiles.INT8, "int8 channel", "int8 token"), "BF16": (tiles.BF16, "nvfp4", "nvfp4"),
             "FP8": (tiles.FP8, "float8_e4m3fn channel", "float8_e4m3fn token")}  # fmt: skip
    x = made(2048)
    for name, (dot, weights, inputs) in found.items():
        weight = Made(weights)
        before, depth = tiles.CONFIGS[dot], 64 if dot == tiles.BF16 else 128
        tried = [(128, 256, depth, 8, 3), (128, 128, depth, 4, 4), (128, 128, depth, 8, 4), (256, 128, depth, 8, 3)]
        for tile in tried[: 2 if quick else None]:
            tiles.CONFIGS[dot] = tile
            for promote in (64, 128) if dot == tiles.FP8 else (64,):
                tiles.PROMOTE = promote
                try:
                    us = graph_us(weight.call(x, inputs), len(weight.copies))
                except Exception as problem:
                    us = f"{type(problem).__name__}: {problem}"[:200]
                yield {"cores": name, "tile": tile, "promote": promote, "us": us}
        tiles.CONFIGS[dot], tiles.PROMOTE = before, 64


def peers() -> Iterator[dict[str, Any]]:
    """Torch's own products of operands that are rounded already, at 2,048 rows."""
    x = made(2048)
    a, copies = x.to(torch.float8_e4m3fn), copies_of(N * K)
    b = [(torch.randn(N, K, device="cuda")).to(torch.float8_e4m3fn) for _ in range(copies)]
    one, left, right = (torch.ones(s, device="cuda") for s in ((), (2048, 1), (1, N)))
    for fast in (False, True):
        for name, scales in (("tensor", (one, one)), ("row", (left, right))):

            def call(i: int, s: Any = scales, f: bool = fast) -> Tensor:
                return torch._scaled_mm(a, b[i].t(), *s, out_dtype=torch.bfloat16, use_fast_accum=f)

            yield {"peer": f"torch._scaled_mm, {name} scales, fast={fast}", "us": graph_us(call, copies)}
    c, d = x.to(torch.int8), [t.to(torch.int8) for t in b]
    yield {"peer": "torch._int_mm, int32 out", "us": graph_us(lambda i: torch._int_mm(c, d[i].t()), copies)}


def quantizers(gbs: float) -> Iterator[dict[str, Any]]:
    """At 2,048 rows: the fused kernel, the same by torch's operators, and the floor of bytes."""
    xs = [made(2048 + i)[:2048] for i in range(copies_of(2048 * K * 2))]
    for line in QUANTIZERS:
        rule = gpu_quantized.rounder_of(line)
        assert rule is not None
        dot, quantizer = rule.cores, Quantizer(line)
        row: dict[str, Any] = {"quantizer": line}
        try:
            fused = graph_us(lambda i: gpu_quantized.rows_of(xs[i], [], "", line, dot, False, 0), len(xs))
            out = gpu_quantized.rows_of(xs[0], [], "", line, dot, False, 0).codes
            moved = xs[0].nbytes + out.nbytes
            row |= {"us": fused, "floor_us": moved / gbs / 1e3}
            row["torch_us"] = graph_us(lambda i: quantizer.fake_quantize(xs[i]), len(xs))
        except Exception as problem:
            row["failed"] = f"{type(problem).__name__}: {problem}"[:400]
        yield row


def same_bits() -> dict[str, bool]:
    """Whether each quantizer's values are the Python reference's, on this device."""
    found = {}
    for line in QUANTIZERS:
        rule = gpu_quantized.rounder_of(line)
        assert rule is not None
        x = torch.randn(64, K, device="cuda")
        rows = gpu_quantized.rows_of(x, [], "", line, rule.cores, False, 0)
        codes = rows.codes.float() if rows.zero is None else rows.codes.float() - rows.zero[:, None]
        mine = codes * (rows.scale[:, None] if rows.scale.numel() > 1 else 1)
        want = Quantizer(line).quantize(x)
        if rows.scale.numel() == 1:
            exact = want.dequantize().double() / rows.scale.double()
            found[line] = bool((mine.double() - exact).abs().max() <= 2e-7 * exact.abs().max())
        else:
            found[line] = torch.equal(mine, want.dequantize())
    return found


def attention(gbs: float) -> Iterator[dict[str, Any]]:
    """One token for each of some sequences, 32 heads over 8 of keys, 128 wide."""
    for batch, tokens in ((1, 8192), (1, 32768), (16, 4096)):
        q = torch.randn(batch, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(batch, 8, tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        copies = copies_of(k.nbytes * 2)
        pairs = [(k.clone(), v.clone()) for _ in range(copies)]

        def plain(i: int, q: Tensor = q, pairs: Any = pairs) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, *pairs[i], enable_gqa=True)

        def read(i: int, q: Tensor = q, pairs: Any = pairs) -> Tensor:
            """A flash kernel where the queries of a key's heads are one tile: the stronger form of the peer."""
            q4 = q.view(q.shape[0], 8, 4, 128)
            return torch.nn.functional.scaled_dot_product_attention(q4, *pairs[i])

        us = graph_us(plain, copies)
        folded = graph_us(read, copies)
        yield {"cache": "bfloat16, torch", "batch": batch, "tokens": tokens, "us": us, "folded_us": folded,
               "floor_us": 2 * k.nbytes / gbs / 1e3}  # fmt: skip
        for line in CACHES:
            quantizer = Quantizer(line)
            sides = [gpu_attention.Side.of(quantizer.quantize(t)) for t in (k, v)]
            nbytes = sum(side.nbytes for side in sides)
            row: dict[str, Any] = {"cache": line, "batch": batch, "tokens": tokens}
            if any(side is None for side in sides):
                continue
            try:
                many = [[side.copy() for side in sides] for _ in range(copies_of(nbytes))]
                out = gpu_attention.decode(q, *many[0], 128**-0.5)
                wide = [quantizer.fake_quantize(t).double().repeat_interleave(4, 1) for t in (k, v)]
                p = (q.double() @ wide[0].transpose(2, 3) * 128**-0.5).softmax(-1)
                exact = p @ wide[1]
                row["error"] = float((out.double() - exact).norm() / exact.norm())
                us = graph_us(lambda i: gpu_attention.decode(q, *many[i], 128**-0.5), len(many))
                row |= {"us": us, "of_bf16": us / min(folded, yield_us(plain, copies)), "floor_us": nbytes / gbs / 1e3}
            except Exception as problem:
                row["failed"] = f"{type(problem).__name__}: {problem}"[:600]
            yield row


def yield_us(call: Call, copies: int) -> float:
    return graph_us(call, copies, 3)


def eager_us(call: Call, copies: int) -> float:
    """Wall-clock microseconds of one call outside a graph, device idle before."""
    import time

    for i in range(3):
        call(i % copies)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(200):
        call(i % copies)
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / 200


def overhead() -> Iterator[dict[str, Any]]:
    x = made(1)
    dense = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    yield {"call": "bfloat16", "eager_us": eager_us(lambda i: torch.nn.functional.linear(x, dense[i]), 2)}
    for weights, inputs in (("int4 channel", "int8 token"), ("nvfp4", "nvfp4")):
        weight = Made(weights)
        try:
            yield {"call": f"{weights} x {inputs}", "eager_us": eager_us(weight.call(x, inputs), len(weight.copies))}
        except Exception as problem:
            yield {"call": f"{weights} x {inputs}", "failed": f"{type(problem).__name__}: {problem}"[:300]}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n## {title}")
    for row in rows:
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer rows and tiles")
    parser.add_argument("--only", nargs="*", help="sections to run")
    options = parser.parse_args()
    sizes = (16, 2048) if options.quick else (1, 16, 64, 256, 2048)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
    }  # fmt: skip
    gbs, bf16 = copy_gbs(), bf16_rows(sizes)
    found |= {"copy_gbs": gbs, "bf16_us": bf16}
    print(found)
    sections: dict[str, Callable[[], Any]] = {
        "accumulators": lambda: [accumulator_bits()],
        "quantizers' bits": lambda: [same_bits()],
        "products": lambda: list(products(sizes, bf16, gbs)),
        "peers": lambda: list(peers()),
        "quantizers": lambda: list(quantizers(gbs)),
        "attention": lambda: list(attention(gbs)),
        "tiles": lambda: list(configurations(options.quick)),
        "overhead": lambda: list(overhead()),
    }
    for name, section in sections.items():
        if options.only and name not in options.only:
            continue
        try:
            found[name] = section()
        except Exception as problem:
            found[name] = [{"failed": f"{type(problem).__name__}: {problem}"[:1000]}]
        show(name, found[name])
        if options.out:
            with atomic_file(options.out) as partial:
                partial.write(f"{json.dumps(found, indent=1)}\n".encode())


if __name__ == "__main__":
    main()
