"""A step of every preset of AdamW beside torch's, bitsandbytes' and torchao's in the same run, and their bytes.

    python benchmarks/optimizers.py --device cuda --out benchmarks/results/optimizers.json [--seconds 240]
    python benchmarks/optimizers.py --device cpu --out benchmarks/results/optimizers_cpu.json [--seconds 120]
    python benchmarks/optimizers.py --device cuda --variants 4,4 8,4 4,4,96 4,4,96,0 [--presets AdamW4bit ...]

First the kernels' bits against the rules', for parameters, codes, scales and counts after three steps with NaN and
infinite gradients among them. Then milliseconds a step: the median of several rounds of steps one after another, of
which each round ends when the device has finished; what Python does is inside. On a CPU a round is one step of each
optimizer in turn; the least, the threads and the machine's load are told, too. ``bytes`` are those of the state for
each parameter. What isn't installed is left out and named.

``--variants`` compares launches of the GPU's kernels on the first size instead: warps, tiles of a program one after
another, registers of a thread at most (0: any; left out: as they are chosen), and whether tables are read through
shared memory (1, or 0). ``--small`` makes all tensors small, to see that it runs; ``--cases`` compares some bits and
stops.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nybble.optim
from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.optim import NonFiniteWarning

SIZES: dict[str, list[tuple[str, list[tuple[int, ...]], torch.dtype]]] = {
    "cuda": [
        ("16 of 4096 x 3072, bfloat16", [(4096, 3072)] * 16, torch.bfloat16),
        ("1,000 of 256 x 256, bfloat16", [(256, 256)] * 1000, torch.bfloat16),
    ],
    "cpu": [
        ("8 of 1024 x 3072, float32", [(1024, 3072)] * 8, torch.float32),
        ("8 of 1024 x 3072, bfloat16", [(1024, 3072)] * 8, torch.bfloat16),
    ],
}
BLOCKWISE4 = {"exp_avg": "state4", "exp_avg_sq": "linear4 flat=128 scale_format=float32 rounding=half-down"}
RULES = ("AdamW", "Adam", "SGD", "Lion", "RMSprop", "Adagrad")
SHAPES = ((24, 256), (700,), (5, 7), (64, 130), (512, 384), (3, 50))
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def ours(device: str) -> dict[str, Make]:
    """Presets by the names that the report has."""
    presets = {name: getattr(nybble.optim, name) for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")}
    presets["AdamWCompanded8bit"] = nybble.optim.AdamWCompanded8bit
    found: dict[str, Make] = {f"nybble {name}": kind for name, kind in presets.items()}
    found["nybble AdamW4bit, block-wise v"] = lambda p: presets["AdamW4bit"](p, state=BLOCKWISE4)
    found["nybble AdamW8bit, residual8"] = lambda p: presets["AdamW8bit"](p, weights=_if_bf16(p, "residual8"))
    found["nybble AdamW8bit, stochastic"] = lambda p: presets["AdamW8bit"](p, weights=_if_bf16(p, "stochastic"))
    found["nybble AdamW, float32 states"] = lambda p: nybble.optim.AdamW(p, state=None)
    if device == "cpu":
        found["nybble AdamW8bit, the rule"] = lambda p: presets["AdamW8bit"](p, fused=False)
    return found


def _if_bf16(params: list[nn.Parameter], weights: str) -> str:
    return weights if params[0].dtype == torch.bfloat16 else "nearest"


def peers(device: str, absent: dict[str, str]) -> Iterator[tuple[str, Make]]:
    """Torch's and whatever else can be imported."""
    yield "torch AdamW", lambda p: torch.optim.AdamW(p)
    yield "torch AdamW, foreach", lambda p: torch.optim.AdamW(p, foreach=True)
    yield "torch AdamW, fused", lambda p: torch.optim.AdamW(p, fused=True)
    wanted = {"bitsandbytes": ("bitsandbytes.optim", ["AdamW8bit"]), "torchao": ("torchao.optim", [])}
    wanted["torchao"][1].extend(("AdamW8bit", "AdamW4bit", "AdamWFp8"))
    for name, (module, kinds) in wanted.items():
        if name == "bitsandbytes" and device == "cpu":
            absent[name] = "its optimizers have no CPU kernels"
            continue
        try:
            found = importlib.import_module(module)
        except Exception as error:  # whatever a broken installation raises
            absent[name] = f"{type(error).__name__}: {error}"
            continue
        yield from ((f"{name} {kind}", getattr(found, kind)) for kind in kinds)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors of the states but those of one element."""
    if isinstance(optimizer, nybble.optim.LowBitOptimizer):
        return sum(size for name, size in optimizer.state_bytes().items() if name != "step")
    return sum(_size(x) for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))


def _size(x: Tensor) -> int:
    if hasattr(x, "__tensor_flatten__"):
        return sum(_size(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.numel() * x.element_size() if x.numel() > 1 and not getattr(x, "is_table", False) else 0


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """With gradients."""
    params = [nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * 0.02) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def milliseconds(optimizer: torch.optim.Optimizer, device: str, seconds: float) -> tuple[float, int]:
    """A step's, and how many were taken."""
    for _ in range(4):
        optimizer.step()
    _wait(device)
    start = time.perf_counter()
    optimizer.step()
    _wait(device)
    once = time.perf_counter() - start
    each = max(1, min(20, int(seconds / 5 / max(once, 1e-4))))
    rounds, count, until = [], 0, time.perf_counter() + seconds
    while not rounds or (time.perf_counter() < until and len(rounds) < 30):
        start = time.perf_counter()
        for _ in range(each):
            optimizer.step()
        _wait(device)
        rounds.append((time.perf_counter() - start) / each * 1e3)
        count += each
    return statistics.median(rounds), count


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_in_turn(seconds: float, report: dict[str, Any], save: Callable[[], None]) -> None:
    """On a CPU: a step of each after the other, again and again, so that what else the machine does meets them all."""
    makers = [*ours("cpu").items(), *peers("cpu", report["absent"])]
    for size, shapes, dtype in SIZES["cpu"]:
        params = parameters(shapes, dtype, "cpu")
        made, times = dict[str, torch.optim.Optimizer](), dict[str, list[float]]()
        for name, make in makers:
            try:
                made[name] = make(params)
                made[name].step()
            except Exception as error:  # a peer that can't; a report says so
                made.pop(name, None)
                failed = f"{type(error).__name__}: {str(error)[-300:]}"
                report["rows"].append({"size": size, "optimizer": name, "failed": failed})
        until = time.perf_counter() + seconds / len(SIZES["cpu"])
        while time.perf_counter() < until or not times:
            for name, optimizer in made.items():
                start = time.perf_counter()
                optimizer.step()
                times.setdefault(name, []).append((time.perf_counter() - start) * 1e3)
        for name, optimizer in made.items():
            found = times[name]
            row = {"size": size, "optimizer": name, "ms": statistics.median(found), "least ms": min(found)}
            row |= {"steps": len(found), "bytes": state_bytes(optimizer) / sum(p.numel() for p in params)}
            if isinstance(optimizer, nybble.optim.LowBitOptimizer):
                row["kernel"] = [r["kernel"] or r["reason"] for r in optimizer.kernels()]
            report["rows"].append(row)
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
        save()


def measure(device: str, seconds: float, report: dict[str, Any], save: Callable[[], None]) -> None:
    """All of ours and of the peers', on all sizes."""
    if device == "cpu":
        measure_in_turn(seconds, report, save)
        return
    makers = [*ours(device).items(), *peers(device, report["absent"])]
    share = seconds / len(makers) / len(SIZES[device])
    for size, shapes, dtype in SIZES[device]:
        for name, make in makers:
            row: dict[str, Any] = {"size": size, "optimizer": name}
            params = parameters(shapes, dtype, device)
            total = sum(p.numel() for p in params)
            try:
                optimizer = make(params)
                row["ms"], row["steps"] = milliseconds(optimizer, device, share)
                row["bytes"] = state_bytes(optimizer) / total
                if isinstance(optimizer, nybble.optim.LowBitOptimizer):
                    row["kernel"] = [r["kernel"] or r["reason"] for r in optimizer.kernels()]
                del optimizer
            except Exception as error:  # a peer that can't; a report says so
                row["failed"] = f"{type(error).__name__}: {str(error)[-300:]}"
            del params
            report["rows"].append(row)
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
            save()


def compare(device: str, seconds: float, report: dict[str, Any], variants: list[str], chosen: list[str]) -> None:
    """Milliseconds of a step by the GPU's kernels, by how they are launched."""
    from nybble.kernels import gpu_optim

    names = [name for name in ours(device) if not chosen or name.removeprefix("nybble ") in chosen]
    _, shapes, dtype = SIZES["cuda"][0]
    shared = gpu_optim.SHARED
    for name in names:
        params = parameters(shapes, dtype, device)
        for variant in variants:
            warps, steps, *rest = map(int, variant.split(","))
            gpu_optim.WARPS, gpu_optim.STEPS = warps, steps
            gpu_optim.REGISTERS = rest[0] if rest else None
            gpu_optim.SHARED = bool(rest[1]) if rest[1:] else shared
            try:
                optimizer = ours(device)[name](params)
                ms, steps_taken = milliseconds(optimizer, device, seconds / len(names) / len(variants))
            except Exception as error:  # too many registers or too large a tile
                report["rows"].append({"optimizer": name, "variant": variant, "failed": str(error)[-300:]})
            else:
                report["rows"].append({"optimizer": name, "variant": variant, "ms": ms, "steps": steps_taken})
            print(json.dumps(report["rows"][-1]), flush=True)


def trained(kind: Any, device: str, dtype: torch.dtype, fused: bool, options: dict[str, Any]) -> tuple[Any, Any]:
    """Parameters of every kind of shape after three steps, with gradients that aren't finite, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]
    optimizer = kind(params, min_size=40, fused=None if fused else False, **options)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for k, p in enumerate(params):
            p.grad = (torch.randn(p.shape, generator=generator) * 10.0 ** (k - 3)).to(device, dtype)
            p.grad.view(-1)[:3] = 0
            if step:
                p.grad.view(-1)[5], p.grad.view(-1)[34] = torch.nan, torch.inf
        optimizer.step()
    return params, optimizer


def different(kind: Any, device: str, dtype: torch.dtype, options: dict[str, Any]) -> list[str]:
    """What a kernel leaves otherwise than the rule does; empty where all bits are the same."""
    (params, one), (twins, other) = (trained(kind, device, dtype, fused, options) for fused in (True, False))
    if any(row["kernel"] is None for row in one.kernels()):
        return [f"no kernel: {row['reason']}" for row in one.kernels() if row["kernel"] is None]
    wrong = [f"parameter {i}" for i, (p, q) in enumerate(zip(params, twins, strict=True)) if not _same(p.data, q.data)]
    states, others = (nybble.optim.flatten(x.state_dict())[0] for x in (one, other))
    if states.keys() != others.keys():
        wrong.append("names of states")
    wrong += [
        f"{name}: {int((x != others[name]).sum())} of {x.numel()}"
        for name, x in states.items()
        if name in others and not _same(x, others[name])
    ]
    return wrong if one.set_aside() == other.set_aside() else [*wrong, "counts of what was set aside"]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.float().nan_to_num(nan=7e30), b.float().nan_to_num(nan=7e30))


def cases() -> Iterator[tuple[str, torch.dtype, dict[str, Any]]]:
    """Presets, dtypes and options whose bits are compared, the most used first."""
    suffixes = ("8bit", "4bit", "Fp8", "Companded8bit")
    yield from ((f"AdamW{suffix}", torch.bfloat16, {}) for suffix in suffixes)
    yield "AdamW4bit", torch.bfloat16, {"state": BLOCKWISE4}
    yield "AdamW8bit", torch.bfloat16, {"weights": "stochastic"}
    yield "AdamW4bit", torch.bfloat16, {"weights": "residual8"}
    yield "AdamW", torch.bfloat16, {"state": None}
    for rule in RULES:
        more = {"momentum": 0.9} if rule == "SGD" else {}
        for suffix in suffixes:
            yield rule + suffix, torch.float32, {"weight_decay": 0.1, **more}
        yield f"{rule}8bit", torch.float16, more
    yield "SGD8bit", torch.bfloat16, {"momentum": 0.9, "nesterov": True}
    yield "RMSprop8bit", torch.bfloat16, {"momentum": 0.9}
    yield "Adagrad8bit", torch.bfloat16, {"initial_accumulator_value": 0.5, "lr_decay": 0.1}


def check(device: str, until: float, report: dict[str, Any], chosen: list[Any]) -> None:
    """Compare bits until time is up."""
    found = report["bits"]
    for name, dtype, options in chosen:
        if time.perf_counter() > until:
            found["left out"] += 1
            continue
        case = f"{name} {str(dtype).removeprefix('torch.')} {options}"
        try:
            wrong = different(getattr(nybble.optim, name), device, dtype, options)
        except Exception as error:
            wrong = [f"{type(error).__name__}: {str(error)[-500:]}"]
        found["compared"] += 1
        if wrong:
            found["different"][case] = wrong
            print(case, wrong, flush=True)
    print(json.dumps({k: v for k, v in found.items() if k != "different"}), flush=True)


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=240, help="in all, but for what compiling takes")
    parser.add_argument("--variants", nargs="+", metavar="WARPS,TILES[,REGISTERS[,SHARED]]")
    parser.add_argument("--presets", nargs="+", default=[], help="of these variants, by the names of the report")
    parser.add_argument("--cases", nargs="+", type=int, help="compare the bits of these of the list alone, and stop")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.small:
        SIZES["cuda"] = [(name, [(64, 256)] * 2, dtype) for name, _, dtype in SIZES["cuda"]]
    sys.path.insert(0, str(Path(__file__).parent / "quality"))
    from run import hardware

    warnings.simplefilter("ignore", NonFiniteWarning)
    report: dict[str, Any] = {"hardware": hardware(options.device), "versions": versions(), "absent": {}, "rows": []}
    report["bits"] = {"compared": 0, "left out": 0, "different": {}}

    def save() -> None:
        if options.out is not None:
            atomic_write_json(options.out, report)

    if options.device == "cpu":
        report["threads"], report["load before"] = torch.get_num_threads(), os.getloadavg()[0]
    start, chosen = time.perf_counter(), list(cases())
    if options.cases:
        check(options.device, start + options.seconds, report, [chosen[k] for k in options.cases])
        save()
        return
    if options.variants:
        compare(options.device, options.seconds / 2, report, options.variants, options.presets)
        save()
        return
    check(options.device, start + options.seconds / 4, report, chosen[:8])
    save()
    measure(options.device, options.seconds / 2, report, save)
    check(options.device, start + options.seconds, report, chosen[8:])
    save()
    print(json.dumps({"absent": report["absent"]}), flush=True)


if __name__ == "__main__":
    main()
