"""Multiply-accumulate units: simulated bit for bit, mapped to LUTs, and the mapped netlist simulated again.

    apt-get install iverilog yosys
    python benchmarks/hardware/mac.py [--pairs int4,int4 e2m1,int8] [--length 4608]

Every unit's sum is exact, and as wide as a dot product of so many terms needs (4608: the longest of ResNet-18). Both
the Verilog and what Yosys made of it play the same codes, all pairs where there are at most 4096 and else as many
random ones, in runs that are cleared at random, and every sum is compared with nybble's own. LUTs, carry blocks and
flip-flops are Yosys's, before placement, without multiplier blocks. ``toggles`` stands in for energy: nets of the
netlist that change per term, when both operands are N(0, 1) scaled to their largest of 1024. It leaves out glitches,
wires and the clock, so it compares units and says nothing in joules. Result: benchmarks/results/mac.json; a pair
replaces its earlier result, and at the end the coefficients of nybble.costs.mac are fitted to all of them anew and
printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from nybble.core.versions import versions
from nybble.costs.mac import features, fitted
from nybble.formats import NumberFormat, get_format
from nybble.hardware.mac import LONGEST, MacUnit
from nybble.hardware.tools import FLOW, Term, simulate, synthesize, toggles, version_of

RESULT = Path(__file__).parents[1] / "results" / "mac.json"
MINIFLOATS = (
    "e1m1_finite", "e2m0_finite", "e1m2_finite", "e2m1", "e3m0_finite", "e2m2_finite", "e3m1_finite", "e4m0_finite",
    "e2m3", "e3m2", "e4m1_finite", "e2m4_finite", "e3m3_finite", "e4m2_finite", "e2m5_finite", "e3m4_finite",
    "e4m3_finite", "e5m2_finite",
)  # fmt: skip
WIDE = ("int8", "e2m5_finite", "e3m4_finite", "e4m3_finite")
PAIRS = (
    *((f"int{bits}", f"int{bits}") for bits in range(3, 9)),
    *((name, name) for name in MINIFLOATS),
    *((narrow, wide) for narrow in ("int4", "e2m1") for wide in WIDE),
    ("e4m3fn", "e4m3fn"), ("e2m1", "e4m3fn"), ("int4", "uint8"), ("nf4", "int8"), ("dybit4", "dybit8"),
)  # fmt: skip
MOST = 4096


def main() -> None:
    """Every pair, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=[",".join(pair) for pair in PAIRS], metavar="WEIGHTS,INPUTS")
    parser.add_argument("--length", type=int, default=LONGEST)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    tools = {"yosys": version_of("yosys"), "iverilog": version_of("iverilog")}
    found = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"units": []}
    for pair in args.pairs:
        weights, inputs = (get_format(name) for name in pair.split(","))
        row = judged(MacUnit(weights=weights, inputs=inputs, length=args.length))
        key = (row["weights"], row["inputs"], row["length"])
        kept = [r for r in found["units"] if (r["weights"], r["inputs"], r["length"]) != key]
        found = {"flow": FLOW, "tools": tools, "versions": versions(), "machine": platform.machine()}
        found["units"] = sorted([*kept, row], key=lambda r: (r["bits"], r["luts"]))
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(row, flush=True)
    rows = [(features(unit_of(row)), row["luts"]) for row in found["units"]]
    print("coefficients", fitted(rows))


def unit_of(row: dict[str, Any]) -> MacUnit:
    """The unit of a result."""
    return MacUnit(weights=get_format(row["weights"]), inputs=get_format(row["inputs"]), length=row["length"])


def judged(unit: MacUnit) -> dict[str, Any]:
    """Simulate, map, simulate what was mapped."""
    started = time.perf_counter()
    terms = terms_for(unit)
    wanted = played(unit, terms)
    if simulate(unit, terms) != wanted:
        raise SystemExit(f"{unit.name}: the Verilog computes something else than nybble")
    mapped = synthesize(unit)
    if simulate(unit, terms, mapped.netlist) != wanted:
        raise SystemExit(f"{unit.name}: the netlist computes something else than nybble")
    w, x = (normal_codes(fmt, seed) for seed, fmt in enumerate((unit.weights, unit.inputs)))
    gaussian = [(i == 0, a, b) for i, (a, b) in enumerate(zip(w, x, strict=True))]
    return {
        "weights": unit.weights.name,
        "inputs": unit.inputs.name,
        "bits": unit.weights.bits + unit.inputs.bits,
        "length": unit.length,
        "accumulator": unit.bits,
        "luts": mapped.luts,
        "carries": mapped.carries,
        "flops": mapped.flops,
        "toggles": round(toggles(unit, gaussian, mapped.netlist), 2),
        "simulated": len(terms),
        "all_pairs": len(terms) > 1 << unit.weights.bits + unit.inputs.bits,
        "seconds": round(time.perf_counter() - started, 1),
    }


def terms_for(unit: MacUnit) -> list[Term]:
    """All pairs of codes in random order, or as many random ones as :data:`MOST`; cleared now and then."""
    draw = random.Random(0)
    w, x = 1 << unit.weights.bits, 1 << unit.inputs.bits
    pairs = [(a, b) for a in range(w) for b in range(x)] if w * x <= MOST else []
    pairs = pairs or [(draw.randrange(w), draw.randrange(x)) for _ in range(MOST)]
    draw.shuffle(pairs)
    found: list[Term] = [(True, 0, 0)]
    for a, b in pairs:
        found += [(True, a, b)] if draw.random() < 0.01 else []
        found.append((False, a, b))
    return found


def played(unit: MacUnit, terms: list[Term]) -> list[tuple[int, bool]]:
    """What nybble says of the terms."""
    found: list[tuple[int, bool]] = []
    starts = [i for i, (reset, _, _) in enumerate(terms) if reset]
    for start, stop in zip(starts, [*starts[1:], len(terms)], strict=True):
        run = terms[start + 1 : stop]
        found += [(0, False), *unit.sums([w for _, w, _ in run], [x for _, _, x in run])]
    return found


def normal_codes(fmt: NumberFormat, seed: int, count: int = 1024) -> list[int]:
    """Codes of N(0, 1), the largest magnitude at the largest value; of magnitudes where a format has no sign."""
    x = np.random.default_rng(seed).standard_normal(count)
    x = x if fmt.signed else np.abs(x)
    y = x / np.abs(x).max() * fmt.absmax
    nearest = np.abs(y[:, None] - fmt.grid[None]).argmin(1)
    return [int(code) for code in fmt.grid_codes[nearest]]


if __name__ == "__main__":
    main()
