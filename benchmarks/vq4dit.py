"""VQ4DiT in 2 and 3 bits beside its parts and integers: a diffusion pipeline's folder, or a language model.

    python benchmarks/vq4dit.py build/diffusion/float --device cuda --out benchmarks/results/vq4dit_dit.json
    python benchmarks/vq4dit.py demo:smollm2 --device cuda --out benchmarks/results/vq4dit_smollm2.json

The folder is what benchmarks/diffusion.py trains. Every row quantizes into a folder; ``blocks`` are mean squared errors
of each block's output before learning and after, over the calibration data. Of a pipeline ``noise_mse`` is judged on
latents of another seed's way, of a language model nats a token of held-out text. ``bits`` a weight are stored ones:
codes, code books, scales. Rows that are done are in ``--work``; a second call goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nybble
from nybble.calibration.trajectory import Sampling, scheduler_of, trajectory_samples
from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.models.pipeline_parts import INDEX, scheduler_config
from nybble.pipelines.evaluate import run_eval
from nybble.pipelines.load import load_with_origin
from nybble.recipe import load_recipe, parse_recipe

BOOKS = {2: (256, 4), 3: (64, 2)}
"""Entries and width by bits, as the paper has them."""


def vectors(bits: int, learned: bool = True, penalty: float | None = None, **part: Any) -> dict[str, Any]:
    """vq4dit with options of its part changed; or k-means alone."""
    found = load_recipe("vq4dit").to_dict()
    entries, width = BOOKS[bits]
    steps = [{**step, "entries": entries, "width": width} if "solver" in step else step for step in found["steps"]]
    more = {"weights": {"vector-candidates": part}} | ({} if penalty is None else {"penalty": penalty})
    steps = [{**step, **more} if "reconstruction" in step else step for step in steps]
    found["steps"] = [step for step in steps if learned or "reconstruction" not in step]
    return found


def other(recipe: str, weights: str = "") -> dict[str, Any]:
    """Another recipe, in its own scheme or another."""
    found = load_recipe(recipe).to_dict()
    return {**found, "scheme": {"weights": weights}} if weights else found


def rows(text: bool) -> dict[str, dict[str, Any]]:
    """What is quantized how."""
    found = {}
    for bits in BOOKS:
        found |= {
            f"{bits} bits, VQ4DiT": vectors(bits), f"{bits} bits, k-means": vectors(bits, learned=False),
            f"{bits} bits, release order": vectors(bits, order="release"),
            **{f"{bits} bits, {n} candidates": vectors(bits, candidates=n) for n in (1, 3, 4)},
            f"{bits} bits, rtn": other("rtn", f"int{bits} channel"),
            f"{bits} bits, gptq": other("gptq", f"int{bits} channel"),
        }  # fmt: skip
    found |= {
        "2 bits, equal ratios": vectors(2, ratios="equal"), "2 bits, product": vectors(2, term="product"),
        **{f"2 bits, penalty {p:g}": vectors(2, penalty=p) for p in (1.0, 10.0)},
    }  # fmt: skip
    return found | ({"ptq1.61": other("ptq1.61"), "decoupleq": other("decoupleq")} if text else {})


def one(name: str, seed: int, judge: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Quantize into a folder and judge that."""
    out, made, gpu = args.work / "packed" / f"{name} {seed}", rows(args.text)[name], args.device == "cuda"
    made["steps"] = [step | ({"steps": args.steps} if "reconstruction" in step else {}) for step in made["steps"]]
    settings = {"samples": args.samples, "batch": args.batch, "seed": seed, "device": args.device}
    settings |= {"seq_len": args.seq_len} if args.text else {"dtype": "float32"}
    if out.exists():
        shutil.rmtree(out)  # killed before it was judged
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    _, report = nybble.quantize(args.model, parse_recipe(made), out=out, settings=settings)
    windows = [w for row in report.layers for w in (row.learned or {}).get("windows", ()) if "curve" in w]
    return {
        **judge(out), "seconds": round(time.monotonic() - began, 1),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if gpu else 0,
        "bits": sum(row.bits * math.prod(row.shape) for row in report.layers)
        / sum(math.prod(row.shape) for row in report.layers),
        "blocks": [[window["before"], window["after"]] for window in windows],
        "kept": [window["kept"] for window in windows], "fell_back": sum(
            any("kept the latter" in note for note in row.notes) for row in report.layers),
    }  # fmt: skip


def judge_of(args: argparse.Namespace) -> Any:
    """What judges a folder."""
    if args.text:
        windows = {"samples": args.windows, "seq_len": args.seq_len, "device": args.device}

        def nats(out: Any) -> dict[str, float]:
            return {"nll": run_eval({"it": str(out)}, "builtin", metrics=["nll"], **windows)["models"]["it"]["nll"]}

        return nats
    exact, _ = load_with_origin(args.model, dtype="float32", device=args.device)
    scheduler = scheduler_of(scheduler_config(Path(args.model)), args.model)
    held = trajectory_samples(exact, scheduler, args.windows, Sampling(seed=10_007)).inputs

    @torch.no_grad()
    def noise(out: Any) -> dict[str, float]:
        model, _ = load_with_origin(out, dtype="float32", device=args.device)
        errors = []
        for at in range(0, args.windows, args.batch):
            given = {key: value[at : at + args.batch].to(args.device) for key, value in held.items()}
            errors.append((model(**given).logits - exact(**given).logits).square().mean((1, 2, 3)))
        return {"noise_mse": float(torch.cat(errors).mean())}

    return noise


def main() -> None:
    """Row after row; print, and write after each."""
    args = arguments()
    args.text = not (Path(args.model) / INDEX).exists()
    judge, found = judge_of(args), dict[str, Any]()
    result: dict[str, Any] = {
        "what": __doc__.split("\n")[0], "versions": versions(), "float": judge(args.model), "rows": found,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "CPU",
        "options": {key: value for key, value in vars(args).items() if isinstance(value, int | float)},
    }  # fmt: skip
    ends, measure = time.monotonic() + args.seconds, "nll" if args.text else "noise_mse"
    for name in rows(args.text):
        if args.rows and not any(word in name for word in args.rows):
            continue
        for seed in args.seeds:
            done = args.work / f"{name} {seed}.json"
            if not done.exists() and time.monotonic() < ends:
                atomic_write_json(done, one(name, seed, judge, args))
            if done.exists():
                found.setdefault(name, {})[str(seed)] = json.loads(done.read_text())
        told = list(found.get(name, {}).values())
        if told:
            values = [row[measure] for row in told]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{name:28} {statistics.mean(values):.5g} +- {spread:.2g}  {told[0]['bits']:.3f} bits", flush=True)
        if args.out:
            atomic_write_json(args.out, result)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a pipeline's folder, or a language model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--work", type=Path, default=Path("build/vq4dit"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--samples", type=int, default=128, help="of calibration")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64, help="that are judged")
    parser.add_argument("--steps", type=int, default=1000, help="of every reconstruction")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="*", default=[], help="words in the names of the rows wanted")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after these")
    return parser.parse_args()


if __name__ == "__main__":
    main()
