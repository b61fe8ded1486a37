"""ZeroQuant-FP taken apart: number formats, constraints on scales, low-rank compensation by model size.

    python benchmarks/quality/zeroquant_fp.py --record benchmarks/results/zeroquant_fp.json [--device cuda]
        [--ladder FOLDER] [--smollm2 FILE.gguf] [--models llama-30m smollm2] [--sizes llama-0.3m ...]
        [--studies formats scales rank] [--samples 32] [--windows 120] [--seconds N] [--missing]

All weights have groups of 64, and GPTQ. Calibrated on the ladder's calibration text, judged on its three held-out ones.

    formats  INT4 or E2M1 weights beside INT8, E4M3 (a scale a token) or float inputs; the recipe whole, and to nearest
    scales   E2M1 beside E4M3 inputs; real scales, powers of two (M1), powers of two times a number a row (M2), all of
             plain maxima; both also by the exponent that loses least ("real, searched" is the row of ``formats``), M2
             by the best of 8 numbers a row too
    rank     rank 8 or none under 4-, 3- and 2-bit weights, on every model of the ladder

Powers and their phases on a CPU (results/zeroquant_scales.json): ``--studies scales --models llama-10m neox-3m
--windows 40 --record benchmarks/results/zeroquant_scales.json``.

An estimate is printed first; with ``--seconds`` no row is begun later than that, and ``--missing`` goes on from there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import defaults
from defaults import judge, ladder_texts, recorded

from nybble.models.sources.open import open_source
from nybble.recipe import load_recipe

E2M1, FP8 = "float4_e2m1fn group=64", "float8_e4m3fn token"
ROW = "scale_format=(ufloat3_e3m0_finite channel floor=normal)"
SIZES = [f"{family}-{size}" for size in ("0.3m", "1m", "3m", "10m", "30m") for family in ("llama", "neox")]
PER_BLOCK = {"cuda": 0.25, "cpu": 2.0}  # seconds for one block of one row, judged: an H100, two cores
BLOCKS = {"0.3m": 6, "1m": 5, "3m": 4, "10m": 6, "30m": 10, "smollm2": 30}


def formats() -> defaults.Rows:
    """Weights x inputs, and the recipe as it is."""
    found: defaults.Rows = {}
    for weights, line in {"INT4": "int4 group=64", "E2M1": E2M1}.items():
        for inputs, other in {"float": "", "INT8": "int8 token", "E4M3": FP8}.items():
            scheme = {"weights": line, **({"inputs": other} if other else {})}
            found[f"{weights} x {inputs}"] = ([{"solver": "gptq"}], scheme)
    recipe = load_recipe("zeroquant-fp").to_dict()
    found["zeroquant-fp"] = (recipe["steps"], recipe["scheme"])
    found["zeroquant-fp's scheme, to nearest"] = ([{"solver": "rtn"}], recipe["scheme"])
    return found


def scales() -> defaults.Rows:
    """Constraints, under scales of plain maxima."""
    e8m0 = "scale_format=(float8_e8m0fnu scale=one)"
    lines = {
        "real": E2M1, "M1 up": "fp4-m1", "M1 nearest": f"{E2M1} scale=pow2(mode=nearest) {e8m0}",
        "M2 down": f"{E2M1} scale=pow2-ratio(mode=down)", "M2 nearest": f"{E2M1} scale=pow2-ratio",
        "M1 searched": f"{E2M1} scale=stored {e8m0}", "M2 searched": f"{E2M1} scale=stored {ROW}",
        "M2 searched, 8 phases": f"{E2M1} scale=pow2-ratio(mode=search,phases=8)",
        "M2 nearest, 8 phases": f"{E2M1} scale=pow2-ratio(phases=8)",
    }  # fmt: skip
    plain = [{"solver": "gptq", "clip": False}]
    return {
        f"scales {name}": ([{"solver": "gptq"}] if "searched" in name else plain, {"weights": line, "inputs": FP8})
        for name, line in lines.items()
    }


def rank() -> defaults.Rows:
    """Low-rank compensation on and off."""
    found: defaults.Rows = {}
    lines = {"W4": f"{E2M1} scale=pow2-ratio", **{f"W{n}": f"int{n} group=64 symmetric=false" for n in (3, 2)}}
    for name, line in lines.items():
        for size in (0, 8):
            steps: list[dict[str, Any]] = [{"solver": "gptq"}]
            steps += [{"correction": "low-rank", "rank": size}] if size else []
            found[f"{name} rank {size}"] = (steps, {"weights": line})
    return found


STUDIES = {"formats": formats, "scales": scales, "rank": rank}


def main() -> None:
    """Every study on its models; then what it says."""
    args = arguments()
    plan = plan_of(args)
    blocks = sum(len(rows) * BLOCKS[model.rpartition("-")[2]] for model, rows in plan)
    print(
        f"{sum(len(rows) for _, rows in plan)} rows of {len(plan)} models, {blocks} blocks in all: about "
        f"{blocks * PER_BLOCK[args.device.partition(':')[0]]:.0f} s at the full number of windows",
        flush=True,
    )
    started = time.monotonic()
    args.until = started + args.seconds
    for model, rows in plan:
        where = args.smollm2 if model == "smollm2" else str(args.ladder / "models" / model)
        if model != "smollm2" and not Path(where).is_dir():
            raise SystemExit(f"no {where}: train it (python -m benchmarks.ladder), or name others with --sizes")
        judge(title(model), where, *ladder_texts(open_source(where).tokenizer(), args), rows, args)
        print(f"{time.monotonic() - started:.0f} s so far", flush=True)
    if args.record:
        about = {"samples": args.samples, "seq_len": args.seq_len, "windows": args.windows}
        found = json.loads(args.record.read_text(encoding="utf-8")) | about
        args.record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        for model, _ in plan:
            conclude(title(model), recorded(args.record, title(model)))


def title(model: str) -> str:
    """As the results have it."""
    return "SmolLM2-135M-Instruct" if model == "smollm2" else f"ladder {model}"


def plan_of(args: argparse.Namespace) -> list[tuple[str, defaults.Rows]]:
    """Rows by model, without those that are there already where that is asked for; SmolLM2, which is slow, last."""
    plan: dict[str, defaults.Rows] = {}
    for study in args.studies:
        for model in args.sizes if study == "rank" else args.models:
            plan.setdefault(model, {}).update(STUDIES[study]())
    if args.missing:
        for model, rows in plan.items():
            done = recorded(args.record, title(model))
            plan[model] = {name: row for name, row in rows.items() if name not in done}
    return sorted(((m, rows) for m, rows in plan.items() if rows), key=lambda item: item[0] == "smollm2")


def conclude(model: str, rows: dict[str, Any]) -> None:
    """Print what perplexity on each text gains over what a row is compared with, in per cent, and what it costs."""
    pairs = [(name, "scales real") for name in rows if name.startswith("scales M")]
    pairs += [(f"scales M2 searched{more}", "E2M1 x E4M3") for more in ("", ", 8 phases")]
    pairs += [("zeroquant-fp", "zeroquant-fp's scheme, to nearest")]
    pairs += [(f"{w} x E4M3", f"{w} x INT8") for w in ("INT4", "E2M1")]
    pairs += [(f"E2M1 x {a}", f"INT4 x {a}") for a in ("float", "INT8", "E4M3")]
    pairs += [(f"W{n} rank 8", f"W{n} rank 0") for n in (4, 3, 2)]
    for one, other in pairs:
        if one in rows and other in rows:
            changes = [100 * (rows[one]["ppl"][t] / rows[other]["ppl"][t] - 1) for t in rows[one]["ppl"]]
            bits = rows[one]["bits"] - rows[other]["bits"]
            shown = ", ".join(f"{change:+.2f}%" for change in changes)
            print(f"{model}: {one} over {other}: {shown}; {bits:+.2f} bits")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smollm2", default="demo:smollm2")
    parser.add_argument("--ladder", type=Path, default=Path("build/ladder"), help="what benchmarks/ladder wrote")
    parser.add_argument("--models", nargs="*", default=["llama-30m", "smollm2"], help="of formats and scales")
    parser.add_argument("--sizes", nargs="*", default=SIZES, help="of rank")
    parser.add_argument("--studies", nargs="*", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=120, help="of each text")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no other row is begun")
    parser.add_argument("--missing", action="store_true", help="leave out the rows that the record has")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--beside", type=int, default=0, help="how many other runs share the device, for the record")
    parser.set_defaults(seed=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
