"""Products of two quantized operands on a GPU, their quantizers and attention over a quantized cache, beside bfloat16.

    python benchmarks/gpu_quantized.py --tune --out benchmarks/results/gpu_quantized.json

Times are of CUDA graphs: each holds at least twenty calls that take turns over at least 200 MB of weight copies, so
that no weight stays in the cache; bfloat16 goes the same way in the same run. Before anything is timed its result is
compared with float64 of the operands that the quantizers make. Floors come from this run's own copy. With ``--tune``
tiles are tried first, and the best are used; kernels are compiled by several processes beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
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
from nybble.kernels._gpu_tiles import Tile
from nybble.nn.compiled import key_of
from nybble.nn.float_products import float_linear
from nybble.nn.integer_products import integer_linear
from nybble.quantizer import Quantizer

N, K = 14336, 4096
CALLS, COPIES = 20, 200 << 20
WRONG = 5e-3  # bfloat16 results are 1.7e-3 from exact ones
SIZES = (2048, 16, 1, 64, 256)
PRODUCTS = (
    # weights, activations, times the bfloat16 product that they may take at 2,048 rows
    ("float4_e2m1fn channel", "float4_e2m1fn token", 0.8),
    ("float4_e2m1fn channel", "float8_e4m3fn token", 0.8),
    ("int4 channel", "int8 token", 0.8),
    ("mxfp4-ocp", "mxfp4-ocp", 1.3),
    ("nvfp4", "nvfp4", 1.3),
    ("fp4-m2", "float8_e4m3fn token", 0.8),
    ("mxfp4-ocp", "float8_e4m3fn token", 0.8),
    ("float8_e4m3fn channel", "float8_e4m3fn token", 0.8),
    ("int8 channel", "int8 token", 0.8),
    ("float4_e2m1fn channel", "int8 token", 0.8),
    ("int4 channel symmetric=false", "int8 token symmetric=false", None),
    ("int4 group=128", "int8 token", None),
)
QUANTIZERS = (
    "int8 token", "float8_e4m3fn token", "float4_e2m1fn token", "int8 token symmetric=false", "mxfp4-ocp", "mxfp4",
    "nvfp4",
)  # fmt: skip
CACHES = ("int8 token", "int4 group=64 scale_format=float32", "float8_e4m3fn token", "int4 token symmetric=false")
LENGTHS = ((1, 8192), (1, 32768), (16, 4096))
EIGHT = (
    Tile(128, 256, 128, 8, 3, True), Tile(128, 256, 128, 8, 4, True), Tile(128, 128, 128, 4, 4, True),
    Tile(128, 128, 128, 8, 4, True), Tile(256, 128, 128, 8, 3, True), Tile(128, 256, 128, 8, 3),
    Tile(128, 128, 128, 8, 4),
)  # fmt: skip
SIXTEEN = (
    Tile(128, 256, 64, 8, 3, True), Tile(128, 256, 64, 8, 4, True), Tile(256, 128, 64, 8, 4, True),
    Tile(128, 128, 64, 4, 4, True), Tile(128, 256, 64, 8, 3),
)  # fmt: skip
LARGE = (
    Tile(128, 128, 64, 8, 4, True), Tile(256, 128, 64, 8, 3, True), Tile(128, 128, 128, 8, 3, True),
    Tile(128, 128, 64, 4, 4, True), Tile(128, 128, 64, 8, 4), Tile(256, 64, 128, 4, 3, True),
)  # fmt: skip
FEW = {
    16: (
        Tile(16, 64, 128, 4, 4), Tile(16, 64, 128, 4, 4, True), Tile(16, 128, 128, 4, 4), Tile(16, 64, 256, 4, 3),
        Tile(16, 32, 256, 4, 4), Tile(16, 64, 128, 4, 6),
    ),
    64: (
        Tile(64, 64, 128, 4, 4), Tile(64, 64, 128, 4, 4, True), Tile(64, 128, 128, 8, 3), Tile(64, 128, 64, 4, 4),
        Tile(64, 64, 64, 4, 6),
    ),
}  # fmt: skip
Call = Callable[[int], Any]
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- timing
def graph_us(call: Call, copies: int, rounds: int = 5) -> float:
    """Microseconds of one call, the median of some replays of a graph of at least :data:`CALLS`."""
    count = max(CALLS, copies)
    for i in range(copies):
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


def eager_us(call: Call, copies: int) -> float:
    """Wall-clock microseconds of one call outside a graph, one behind the other."""
    for i in range(copies):
        call(i)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(100):
        call(i % copies)
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / 100


def tried(row: Row, measure: Callable[[], Row]) -> Row:
    """``row`` with what is measured, or with why that failed: one row that fails leaves the others theirs."""
    try:
        return row | measure()
    except Exception as problem:
        return row | {"failed": f"{type(problem).__name__}: {problem}"[:500]}


def copies_of(nbytes: int) -> int:
    return max(2, -(-COPIES // nbytes))


# --------------------------------------------------------------------------------------------------------------- data
@cache
def drawn(name: str, *shape: int) -> Tensor:
    """Normal numbers, the same for the same name and shape; all are drawn outside of graphs."""
    generator = torch.Generator("cuda").manual_seed(sum(map(ord, name)) + sum(shape))
    return torch.randn(shape, device="cuda", generator=generator)


def rows(m: int) -> Tensor:
    return drawn("x", m, K).bfloat16()


class Made:
    """Copies of one weight on the device, of those that are asked for."""

    def __init__(self, line: str, copies: int | None = None) -> None:
        weight = Quantizer(line).quantize(drawn("weight", N, K) / 64)
        tensors = weight.tensors()
        self.key, self.nbytes = key_of(weight.spec(), list(tensors)), sum(t.nbytes for t in tensors.values())
        self.weight = weight
        count = copies_of(self.nbytes) if copies is None else copies
        self.copies = [[t.clone() for t in tensors.values()] for _ in range(count)]

    def call(self, x: Tensor, line: str) -> Call:
        """The product with one of the copies."""
        op = integer_linear if Quantizer(line).format.is_integer else float_linear
        return lambda i: op(x, self.copies[i], self.key, [N, K], None, [], "", line)

    def error(self, x: Tensor, line: str) -> float:
        """Distance of some rows from float64 on the rounded operands, over its norm."""
        y, part = self.call(x, line)(0), slice(0, 48)
        whole = Quantizer(line).fake_quantize(x.float())  # of all rows: a scale may be the tensor's
        dense = self.weight.dequantize()[:512].double()
        exact = whole[part].double() @ dense.T
        return float((y[part, :512].double() - exact).norm() / exact.norm())

    def us(self, x: Tensor, line: str) -> float:
        """Microseconds of a product."""
        return graph_us(self.call(x, line), len(self.copies))


# -------------------------------------------------------------------------------------------------------------- tiles
@dataclass(frozen=True)
class Trial:
    """One tile for one kind of product."""

    kind: str
    weights: str
    inputs: str
    m: int
    tile: Tile
    promote: int = tiles.USUAL
    part: int = 16 << 20

    def use(self) -> None:
        """Let products go so."""
        if self.kind.startswith("packed"):
            size = int(self.kind.rpartition(" ")[2])
            tiles.PACKED[size] = self.tile
            gpu_quantized.FEW = max(64, size)
        else:
            tiles.DENSE[{"INT8": tiles.INT8, "FP8": tiles.FP8, "BF16": tiles.BF16}[self.kind]] = self.tile
            tiles.USUAL, tiles.PART, tiles.TORCH = self.promote, self.part, False

    def undo(self) -> None:
        """Let them go as before, but for the tile."""
        tiles.PACKED.pop(2048, None)
        tiles.USUAL, tiles.PART, gpu_quantized.FEW, tiles.TORCH = 128, 16 << 20, 64, True


def trials() -> list[Trial]:
    fp8 = ("float8_e4m3fn channel", "float8_e4m3fn token")
    found = [Trial("INT8", "int8 channel", "int8 token", 2048, tile) for tile in EIGHT]
    found += [Trial("FP8", *fp8, 2048, tile, promote) for tile in EIGHT for promote in (128, 64)]
    found += [Trial("BF16", "mxfp4-ocp", "mxfp4-ocp", 2048, tile) for tile in SIXTEEN]
    found += [Trial("BF16", "mxfp4-ocp", "mxfp4-ocp", 2048, SIXTEEN[0], part=part << 20) for part in (8, 64)]
    for weights, inputs in (("int4 channel", "int8 token"), ("float4_e2m1fn channel", "float8_e4m3fn token")):
        found += [Trial("packed 2048", weights, inputs, 2048, tile) for tile in LARGE]
        for m, few in FEW.items():
            found += [Trial(f"packed {m}", weights, inputs, m, tile) for tile in few]
    return found


def run_trials(weights: dict[str, Made]) -> Iterator[Row]:
    for trial in trials():
        made = weights.setdefault(trial.weights, None) or Made(trial.weights)  # type: ignore[arg-type]
        weights[trial.weights] = made
        trial.use()
        row = asdict(trial) | {"tile": tuple(asdict(trial.tile).values())}
        yield tried(row, lambda m=made, t=trial: {"us": m.us(rows(t.m), t.inputs)})  # type: ignore[misc]
        trial.undo()


def best_of(found: list[Row]) -> dict[str, list[int]]:
    """The fastest tile of each kind (for packed weights, by the first inputs)."""
    best: dict[str, Row] = {}
    for row in found:
        kind, usual = row["kind"], row["promote"] == 128 and row["part"] == 16 << 20
        if "us" not in row or kind == "packed 2048" or not usual:
            continue
        before = best.setdefault(kind, row)
        if row["us"] < before["us"] and before["weights"] == row["weights"]:
            best[kind] = row
    return {kind: list(row["tile"]) for kind, row in best.items()}


def use_best(best: dict[str, list[Any]]) -> None:
    names = {"INT8": tiles.INT8, "FP8": tiles.FP8, "BF16": tiles.BF16}
    for kind, tile in best.items():
        if kind in names:
            tiles.DENSE[names[kind]] = Tile(*tile)
        else:
            tiles.PACKED[int(kind.rpartition(" ")[2])] = Tile(*tile)


# ---------------------------------------------------------------------------------------------------------- compiling
def compile_some(items: list[Callable[[], Any]], share: tuple[int, int]) -> None:
    """Every so-many-th of some calls, once each; what fails here fails again where it is measured."""
    for item in items[share[0] :: share[1]]:
        try:
            item()
            torch.cuda.synchronize()
        except Exception as problem:
            print(f"compiling: {type(problem).__name__}: {problem}"[:200], file=sys.stderr)


def try_trial(trial: Trial) -> None:
    trial.use()
    try:
        Made(trial.weights, 1).call(rows(trial.m), trial.inputs)(0)
    finally:
        trial.undo()


def measured_items(sizes: tuple[int, ...]) -> list[Callable[[], Any]]:
    found: list[Callable[[], Any]] = []
    for weights, inputs, _ in PRODUCTS:
        found += [lambda w=weights, i=inputs, m=m: Made(w, 1).call(rows(m), i)(0) for m in sizes]  # type: ignore[misc]
    for line in CACHES:
        found += [lambda t=line, b=b, n=n: Cache(t, b, n, 1).call(0) for b, n in LENGTHS]  # type: ignore[misc]
    return found


def worker(share: tuple[int, int], tune: bool, sizes: tuple[int, ...]) -> None:
    if tune:
        compile_some([lambda t=t: try_trial(t) for t in trials()], share)  # type: ignore[misc]
        print("tuned", flush=True)
        use_best(json.loads(sys.stdin.readline()))
    compile_some(measured_items(sizes), share)
    print("compiled", flush=True)


class Workers:
    """Processes that compile what this one is going to measure."""

    def __init__(self, options: argparse.Namespace) -> None:
        count = max(1, min(12, (os.cpu_count() or 2) - 2))
        flags = ["--tune"] * options.tune + ["--quick"] * options.quick
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", f"{i}/{count}", *flags], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, text=True,
            )
            for i in range(count)
        ]  # fmt: skip

    def wait(self) -> None:
        """Until all have done what they were told."""
        for process in self.processes:
            assert process.stdout is not None
            process.stdout.readline()

    def tell(self, best: dict[str, list[int]]) -> None:
        """The tiles that are going to be measured."""
        for process in self.processes:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(best) + "\n")
                process.stdin.flush()
            except OSError:
                print("a compiling process is gone", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------ figures
def copy_gbs() -> float:
    """Bytes read and written a second by a copy within the device's memory, in GB."""
    a = drawn("copy", 1 << 27)
    b = torch.empty_like(a)
    return 2 * a.nbytes / graph_us(lambda i: b.copy_(a), 1) / 1e3


def bf16_rows(sizes: tuple[int, ...]) -> dict[int, float]:
    dense = drawn("weight", N, K).bfloat16() / 64
    weights = [dense.clone() for _ in range(copies_of(dense.nbytes))]
    found = {}
    for m in sizes:
        x = rows(m)
        found[m] = graph_us(lambda i, x=x: torch.nn.functional.linear(x, weights[i]), len(weights))  # type: ignore[misc]
    return found


def products(weights: dict[str, Made], sizes: tuple[int, ...], bf16: dict[int, float], gbs: float) -> Iterator[Row]:
    for m in sizes:
        for line, inputs, bar in PRODUCTS:
            made = weights.get(line) or Made(line)
            weights[line] = made
            decoded = gpu_quantized.decoded(made.copies[0], made.key, gpu_quantized.rounder_of(inputs), m)
            way = "as any rows" if decoded else gpu_quantized.route(weight_of(made.copies[0], made.key), inputs, m)
            row: Row = {"weights": line, "inputs": inputs, "m": m, "way": str(way)}

            def measure(m: int = m, made: Made = made, inputs: str = inputs) -> Row:
                error = made.error(rows(m), inputs)
                if not error < WRONG:
                    raise ArithmeticError(f"error {error:.3g}")
                us = made.us(rows(m), inputs)
                floor = (made.nbytes + 2 * m * (K + N)) / gbs / 1e3
                return {"error": error, "us": us, "bf16_us": bf16[m], "of_bf16": us / bf16[m], "floor_us": floor}

            yield tried(row | ({"bar": bar} if m == 2048 and bar else {}), measure)


def peers() -> Iterator[Row]:
    """Torch's own products of operands that are rounded already, at 2,048 rows; and expanding a weight."""
    x, weight = rows(2048), drawn("weight", N, K)
    count = copies_of(N * K)
    a, b = x.to(torch.float8_e4m3fn), [weight.to(torch.float8_e4m3fn) for _ in range(count)]
    one, left, right = (torch.ones(s, device="cuda") for s in ((), (2048, 1), (1, N)))
    for fast in (False, True):
        for name, scales in (("tensor", (one, one)), ("row", (left, right))):

            def call(i: int, s: Any = scales, f: bool = fast) -> Tensor:
                return torch._scaled_mm(a, b[i].t(), *s, out_dtype=torch.bfloat16, use_fast_accum=f)

            row = {"peer": f"torch._scaled_mm, a scale a {name}, fast={fast}"}
            yield tried(row, lambda c=call: {"us": graph_us(c, count)})  # type: ignore[misc]
    c, d = (x * 9).to(torch.int8), [(weight * 9).to(torch.int8) for _ in range(count)]
    yield tried(
        {"peer": "torch._int_mm, int32 out"}, lambda: {"us": graph_us(lambda i: torch._int_mm(c, d[i].t()), count)}
    )
    for line, dot in (("int4 channel", tiles.INT8), ("float4_e2m1fn channel", tiles.FP8), ("mxfp4-ocp", tiles.BF16)):
        made = Made(line)
        plan = [weight_of(tensors, made.key) for tensors in made.copies]
        for part in (8 << 20, 64 << 20):
            step = min(N, part // K)
            room = torch.empty((step, K), dtype=tiles.DOT_DTYPES[dot], device="cuda")

            def expand(i: int, p: Any = plan, d: int = dot, s: int = step, room: Tensor = room) -> None:
                _, by, factor = p[i].on(d)
                for start in range(0, N, s):
                    tiles.expand(p[i], by, factor, room, start, min(N, start + s))

            row = {"expanding": line, "dot": dot, "part": part}
            count = len(plan)
            yield tried(row, lambda c=expand, n=count: {"us": graph_us(c, n)})  # type: ignore[misc]


def quantizers(gbs: float) -> Iterator[Row]:
    """At 2,048 rows: the fused kernel, the same by torch's operators, and the floor of bytes."""
    xs = [drawn(f"x{i}", 2048, K).bfloat16() for i in range(copies_of(2048 * K * 2))]
    for line in QUANTIZERS:
        rule = gpu_quantized.rounder_of(line)
        assert rule is not None

        def fused(i: int, line: str = line, dot: int = rule.cores) -> Any:
            return gpu_quantized.rows_of(xs[i], [], "", line, dot, False, 0)

        def measure(line: str = line, call: Call = fused) -> Row:
            moved = xs[0].nbytes + call(0).codes.nbytes
            plain = graph_us(lambda i: Quantizer(line).fake_quantize(xs[i]), len(xs), 2)
            return {"us": graph_us(call, len(xs)), "torch_us": plain, "floor_us": moved / gbs / 1e3}

        yield tried({"quantizer": line}, measure)


def same_bits() -> Row:
    """Whether each quantizer's values are the Python reference's, on this device."""
    found = {}
    for line in QUANTIZERS:
        rule = gpu_quantized.rounder_of(line)
        assert rule is not None
        x = drawn("bits", 64, K)
        made = gpu_quantized.rows_of(x, [], "", line, rule.cores, False, 0)
        codes = made.codes.float() if made.zero is None else made.codes.float() - made.zero[:, None]
        want = Quantizer(line).quantize(x)
        if made.scale.numel() == 1:
            exact = want.dequantize().double() / made.scale.double()
            found[line] = bool((codes.double() - exact).abs().max() <= 2e-7 * exact.abs().max())
        else:
            found[line] = torch.equal(codes * made.scale[:, None], want.dequantize())
    return found


class Cache:
    """Copies of keys and values of 8 heads, 128 wide, in few bits (or not, without a line), and 32 heads of queries."""

    def __init__(self, line: str, batch: int, tokens: int, copies: int | None = None) -> None:
        self.q = drawn("q", batch, 32, 1, 128).bfloat16()
        self.floats = [drawn(name, batch, 8, tokens, 128).bfloat16() for name in ("keys", "values")]
        found: list[Any] = [Quantizer(line).quantize(t) for t in self.floats] if line else self.floats
        sides = [gpu_attention.Side.of(t) for t in found]
        assert sides[0] is not None and sides[1] is not None
        self.nbytes = sides[0].nbytes + sides[1].nbytes
        count = copies_of(self.nbytes) if copies is None else copies
        self.copies = [(sides[0].copy(), sides[1].copy()) for _ in range(count)]
        self.wide = [t.dequantize() for t in found] if line else [t.float() for t in found]

    def call(self, i: int) -> Tensor:
        """Attention over one of the copies."""
        return gpu_attention.decode(self.q, *self.copies[i], 128**-0.5)

    def error(self) -> float:
        """Distance of the first sequence's result from float64 over what the cache holds, over its norm."""
        keys, values = (t[:1].double().repeat_interleave(4, 1) for t in self.wide)
        exact = (self.q[:1].double() @ keys.transpose(2, 3) * 128**-0.5).softmax(-1) @ values
        return float((self.call(0)[:1].double() - exact).norm() / exact.norm())


def attention(gbs: float) -> Iterator[Row]:
    """One token for each of some sequences, beside torch's attention over bfloat16."""
    attend = torch.nn.functional.scaled_dot_product_attention
    for batch, tokens in LENGTHS:
        plain = Cache("", batch, tokens)
        pairs = [(k.codes, v.codes) for k, v in plain.copies]
        row: Row = {"cache": "bfloat16", "batch": batch, "tokens": tokens}
        queries = plain.q.view(batch, 8, 4, 128)

        def measure(plain: Cache = plain, pairs: Any = pairs, queries: Tensor = queries) -> Row:
            count = len(pairs)
            torch_us = graph_us(lambda i: attend(plain.q, *pairs[i], enable_gqa=True), count)
            folded = graph_us(lambda i: attend(queries, *pairs[i]), count)
            return {"torch_us": torch_us, "torch_folded_us": folded, "us": graph_us(plain.call, count),
                    "error": plain.error(), "floor_us": plain.nbytes / gbs / 1e3}  # fmt: skip

        found = tried(row, measure)
        yield found
        best = min(found.get("torch_us", 1e9), found.get("torch_folded_us", 1e9))
        for line in CACHES:

            def one(line: str = line, batch: int = batch, tokens: int = tokens, best: float = best) -> Row:
                made = Cache(line, batch, tokens)
                if not made.error() < WRONG:
                    raise ArithmeticError(f"error {made.error():.3g}")
                us = graph_us(made.call, len(made.copies))
                return {"error": made.error(), "us": us, "of_bf16": us / best, "floor_us": made.nbytes / gbs / 1e3}

            yield tried({"cache": line, "batch": batch, "tokens": tokens}, one)


def overhead() -> Iterator[Row]:
    """One row outside of graphs."""
    x, dense = rows(1), [drawn("weight", N, K).bfloat16() for _ in range(2)]
    linear = torch.nn.functional.linear
    yield {"call": "bfloat16", "eager_us": eager_us(lambda i: linear(x, dense[i]), 2)}
    for line, inputs in (("int4 channel", "int8 token"), ("nvfp4", "nvfp4")):
        made = Made(line, 2)
        row = {"call": f"{line} x {inputs}"}
        yield tried(row, lambda m=made, i=inputs: {"eager_us": eager_us(m.call(x, i), 2)})  # type: ignore[misc]


# --------------------------------------------------------------------------------------------------------------- main
def show(row: Row) -> Row:
    parts = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
    print("  ".join(parts), flush=True)
    return row


def write(found: dict[str, Any], out: Path | None) -> None:
    if out:
        with atomic_file(out) as partial:
            partial.write(f"{json.dumps(found, indent=1)}\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--quick", action="store_true", help="1, 16 and 2,048 rows")
    parser.add_argument("--tune", action="store_true", help="try tiles first, and use the best")
    parser.add_argument("--seconds", type=float, default=240, help="leave out sections that begin later (default 240)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    begun, sizes = time.perf_counter(), SIZES[:3] if options.quick else SIZES
    if options.worker:
        share = tuple(int(n) for n in options.worker.split("/"))
        worker((share[0], share[1]), options.tune, sizes)
        return
    workers, weights = Workers(options), dict[str, Made]()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
    }  # fmt: skip
    if options.tune:
        workers.wait()
        print(f"## tiles ({time.perf_counter() - begun:.0f} s)")
        found["tiles"] = [show(row) for row in run_trials(weights)]
        found["best"] = best_of(found["tiles"])
        use_best(found["best"])
        workers.tell(found["best"])
        write(found, options.out)
    workers.wait()
    gbs, bf16 = copy_gbs(), bf16_rows(sizes)
    show({"copy_gbs": gbs, "bf16_us": bf16})
    found |= {"copy_gbs": gbs, "bf16_us": bf16}
    sections: dict[str, Callable[[], Any]] = {
        "products": lambda: products(weights, sizes, bf16, gbs),
        "attention": lambda: attention(gbs),
        "quantizers": lambda: quantizers(gbs),
        "peers": peers,
        "overhead": overhead,
        "bits": lambda: [same_bits()],
        "accumulators": lambda: [accumulator_bits()],
    }
    for name, section in sections.items():
        spent = time.perf_counter() - begun
        if spent > options.seconds:
            print(f"## {name}: left out after {spent:.0f} s")
            continue
        print(f"## {name} ({spent:.0f} s)")
        found[name] = []
        try:
            for row in section():
                found[name].append(show(row))
        except Exception as problem:
            found[name].append(show({"failed": f"{type(problem).__name__}: {problem}"[:1000]}))
        write(found, options.out)
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
