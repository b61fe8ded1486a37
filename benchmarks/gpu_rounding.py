"""Rounding on a GPU: the fused kernels beside the readable operations and torch's own fake quantization.

    python benchmarks/gpu_rounding.py --out benchmarks/results/gpu_rounding.json [--seconds 40]

First every operation's bits against the readable version's, on the GPU. Then microseconds in a CUDA graph of 20 calls
that take turns over copies of the tensor of 200 MB and more, medians of 10 replays; the readable version and torch's
own operators the same way, in the same run; ``floor`` is a copy of the tensor, measured there. torch's operators get
their scales for nothing. "There and back" is forward and backward through a quantizer that measures its input, by one
operation each way and step by step.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.formats import get_format
from nybble.ops import blocks, measured, rounding, straight, tables
from nybble.ops.reaching import reaching
from nybble.quantizer import Quantizer

SHAPES = ((8 * 1024, 1536), (4096, 14336))
DTYPES = (torch.float32, torch.bfloat16)
CALLS, ROTATED = 20, 200 << 20
PER_CHANNEL = "torch.fake_quantize_per_channel_affine"
"""It looks at its zero points on the CPU, and so can't be recorded: its calls are timed as they are."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = ("float4_e2m1fn", "int4", "nf4", "float8_e4m3fn", "int8")
LINES = ("nvfp4", "mxfp4-ocp", "int8 token", "float8_e4m3fn token", "int4 group=32")


def operations(x: Tensor, fmt: str) -> Iterator[tuple[str, Any, Callable[[Tensor], tuple[Any, ...]]]]:
    """Name, operation and what makes its arguments of a tensor."""
    form, group = get_format(fmt), 32
    scale = x.view(-1, group).float().abs().amax(1, keepdim=True) / form.absmax
    codes = rounding.encode(x.float() / scale.max(), fmt, "nearest-even")
    if x.dtype == torch.float32:
        yield "round_to", rounding.round_to, lambda t: (t, fmt, "nearest-even")
        yield "encode", rounding.encode, lambda t: (t, fmt, "nearest-even")
        yield "decode", rounding.decode, lambda t: (codes, fmt)
        values = rounding.grid_table(fmt, x.device)
        yield "around", tables.around, lambda t: (t, values, True)
    yield "scaled_round", blocks.scaled_round, lambda t: (t.view(-1, group), scale, fmt, "nearest-even")
    for size, name in ((group, "dynamic_round, groups of 32"), (x.shape[1], "dynamic_round, rows")):
        yield (
            name,
            blocks.dynamic_round,
            lambda t, size=size: (t.view(-1, size), fmt, "nearest-even", form.absmax, "", "float32"),
        )
    yield "dynamic_scale", measured.dynamic_scale, lambda t: (t.view(-1, group), fmt, form.absmax, "", "float16")
    yield "nested_scale", measured.nested_scale, lambda t: (t.view(-1, 16), 6.0, "float8_e4m3fn", 448.0, 2.0**-6)
    yield (
        "straight_round_backward, x",
        straight.straight_round_backward,
        lambda t: (t.view(-1, group), t.view(-1, group), scale, None, None, fmt, "nearest-even", True, True, False),
    )
    if x.dtype == torch.float32:
        shift = torch.rand_like(x).view(-1, group) - 0.5
        zero = torch.full_like(scale, 1.0).round() if form.is_integer else None
        yield (
            "straight_round, shifted",
            straight.straight_round,
            lambda t: (t.view(-1, group), scale, zero, shift, fmt, "nearest-even"),
        )
        yield (
            "straight_round_backward, shifted, scale",
            straight.straight_round_backward,
            lambda t: (
                t.view(-1, group),
                t.view(-1, group),
                scale,
                zero,
                shift,
                fmt,
                "nearest-even",
                True,
                False,
                True,
            ),
        )


def hard_numbers(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Normal numbers with zero, huge, subnormal and non-finite blocks among them, and ties."""
    x = torch.randn(shape, device=DEVICE) * torch.exp(torch.randn(shape[0], 1, device=DEVICE))
    x[0], x[1], x[2] = 0, -0.0, torch.randint(-9, 9, shape[1:], device=DEVICE) * 2.0**-149
    x[3], x[4, 5], x[5, 7], x[6] = x[3] * 1e30, torch.nan, -torch.inf, torch.arange(shape[1], device=DEVICE) / 4
    return x.to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for the payloads of NaNs."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and bool(((a == b) & (a.signbit() == b.signbit()) | nan).all())


def close(a: Tensor, b: Tensor, args: tuple[Any, ...]) -> bool:
    """Sums over blocks: within what adding up in another order may change, 32 roundings of the terms' magnitudes."""
    gradient, x, scale, *rest = args
    rounded = straight.straight_round(x, scale, *rest[:4])
    terms = gradient.double().abs() * (rounded.double().abs() + x.double().abs()) / blocks.safe_divisor(scale).abs()
    bound, finite = 32 * 2.0**-24 * terms.sum(1, keepdim=True), a.isfinite() & b.isfinite()
    return torch.equal(a.isnan(), b.isnan()) and bool(((a.double() - b.double()).abs() <= bound)[finite].all())


def check_operations(part: tuple[torch.dtype, str]) -> tuple[int, list[str]]:
    """How many operations were compared with the readable ones, and those that differ."""
    wrong, count, (dtype, fmt) = [], 0, part
    x = hard_numbers((640, 1536), dtype)
    for name, op, arguments in operations(x, fmt):
        args, count = arguments(x), count + 1
        try:
            fast, slow = op(*args), op._init_fn(*args)
        except Exception as error:
            wrong.append(f"{name} {fmt} {dtype}: {type(error).__name__}: {str(error)[-300:]}")
            continue
        pairs = zip(fast, slow, strict=True) if isinstance(fast, tuple) else ((fast, slow),)
        for i, (mine, theirs) in enumerate(pairs):
            sums = i == 1 and name.startswith("straight_round_backward") and mine.numel()
            if not (close(mine, theirs, args) if sums else same(mine, theirs)):
                wrong.append(f"{name} {fmt} {dtype} [{i}]")
    return count, wrong


def check_passes(line: str) -> tuple[int, list[str]]:
    """The same of forward and backward through a quantizer, at once and by steps."""
    wrong, gradient = [], torch.randn(64, 1536, device=DEVICE)
    for dtype in (torch.bfloat16, torch.float32):
        x, found = torch.randn(64, 1536, device=DEVICE).to(dtype), []
        for at_once in (True, False):
            leaf = x.clone().requires_grad_()
            out = Quantizer(line).soft(leaf, None, reaching if at_once else by_steps)
            found.append((out.detach(), *torch.autograd.grad(out, leaf, gradient.to(dtype))))
        found.append((Quantizer(line).fake_quantize(x), found[0][1]))
        for other in found[1:]:
            wrong += [f"{line} {dtype} [{i}]" for i in (0, 1) if not same(found[0][i], other[i])]
    return 2, wrong


def check(report: dict[str, Any]) -> None:
    """All of them, in processes of their own, which compile at the same time."""
    parts = [(torch.float32, fmt) for fmt in (*FORMATS, "float8_e5m2", "dynamic8", "float16_e8m7")]
    parts += [(dtype, "float4_e2m1fn") for dtype in (torch.bfloat16, torch.float16)] + [(torch.bfloat16, "int8")]
    with multiprocessing.get_context("spawn").Pool(12 if DEVICE == "cuda" else 1) as pool:
        first, second = pool.map_async(check_operations, parts, 1), pool.map_async(check_passes, LINES, 1)
        found = [*first.get(), *second.get()]
    report["checked"], report["wrong"] = sum(count for count, _ in found), [w for _, wrong in found for w in wrong]
    print(f"{report['checked']} operations checked; wrong: {report['wrong'] or 'none'}", flush=True)


def by_steps(y: Tensor, grid: Any) -> Tensor:
    """The same rounding, but not one that is known to be done at once."""
    return reaching(y, grid)


def clocked(call: Callable[[Tensor], Any], x: Tensor, recorded: bool = True) -> float:
    """Microseconds of a call, in a graph (or a row) of calls that take turns over copies of ``x``."""
    copies = [x] + [x.clone() for _ in range(max(1, math.ceil(ROTATED / x.nbytes)) - 1)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(copies[0]), call(copies[-1])
    torch.cuda.synchronize()

    def row() -> None:
        for i in range(CALLS):
            call(copies[i % len(copies)])

    run: Callable[[], Any] = row
    if recorded:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            row()
        run = graph.replay
    taken = []
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(taken)


def torchs_own(x: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    """What torch has to compare with."""
    zeros = torch.zeros(len(x), dtype=torch.int32, device=DEVICE)
    scale = x.float().abs().amax(1) / 7
    out = torch.empty_like(x)
    yield "copy", lambda t: out.copy_(t)
    if x.dtype == torch.float32:
        yield (
            PER_CHANNEL,
            lambda t: torch.fake_quantize_per_channel_affine(t, scale, zeros, 0, -8, 7),
        )
    yield (
        "torch.fake_quantize_per_tensor_affine",
        lambda t: torch.fake_quantize_per_tensor_affine(t, 0.1, 0, -8, 7),
    )


def passed(line: str, at_once: bool) -> Callable[[Tensor], Any]:
    """Forward and backward through a quantizer that measures."""
    quantizer = Quantizer(line)
    how = reaching if at_once else by_steps

    def run(t: Tensor) -> Any:
        leaf = t.detach().requires_grad_()
        out = quantizer.soft(leaf, None, how)
        return torch.autograd.grad(out, leaf, t)

    return run


def tasks(x: Tensor) -> Iterator[tuple[dict[str, Any], Callable[[Tensor], Any]]]:
    """What is timed on one tensor: how its row begins, and the call."""
    for name, call in torchs_own(x):
        yield {"what": name}, call
    for line in LINES:
        yield {"what": "there and back, at once", "format": line}, passed(line, True)
        yield {"what": "fake_quantize", "format": line}, Quantizer(line).fake_quantize
    yield {"what": "there and back, by steps", "format": LINES[0]}, passed(LINES[0], False)
    for fmt in FORMATS[:1] if x.dtype == torch.bfloat16 else FORMATS:
        for name, op, arguments in operations(x, fmt):
            yield {"what": name, "format": fmt}, lambda t, op=op, arguments=arguments: op(*arguments(t))
            if fmt == FORMATS[0]:
                row = {"what": f"{name}: readable", "format": fmt}
                yield row, lambda t, op=op, arguments=arguments: op._init_fn(*arguments(t))


def measure(shape: tuple[int, int], dtype: torch.dtype, until: float) -> Iterator[dict[str, Any]]:
    """Rows of the table for one tensor."""
    x, floor = torch.randn(shape, device=DEVICE).to(dtype), 0.0
    for row, call in tasks(x):
        if time.perf_counter() > until:
            return
        row = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), **row}
        try:
            took = clocked(call, x, row["what"] != PER_CHANNEL)
        except RuntimeError as error:
            yield {**row, "failed": str(error)[-200:]}
            continue
        floor = floor or took
        yield {**row, "us": took, "over_floor": took / floor}


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=40, help="of the timings")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent / "quality"))
    from run import hardware

    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {"hardware": hardware(DEVICE), "versions": versions(), "rows": rows}
    check(report)
    until = time.perf_counter() + (options.seconds if DEVICE == "cuda" else 0)
    for dtype in reversed(DTYPES):
        for shape in reversed(SHAPES):
            for row in measure(shape, dtype, until):
                rows.append(row)
                print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
                if options.out is not None:
                    atomic_write_json(options.out, report)
    if options.out is not None:
        atomic_write_json(options.out, report)


if __name__ == "__main__":
    main()
