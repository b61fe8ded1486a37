"""What scales in bfloat16 cost beside those in float16 and float32: SmolLM2, integers in groups of 64.

    python benchmarks/quality/scale_dtypes.py [--device cuda] [--record benchmarks/results/scale_dtypes.json]

Scales are rounded to their dtype before codes are found, so what they cost is no more than ends of groups that move by
an eighth of a percent. Codes of a solver that feeds errors back differ in many places all the same, whichever dtype is
changed to whichever: float32 beside float16 shows how far that alone moves the perplexity. SmolLM2's packed weights are
on a grid of 16 values a group with float16 scales; ``rotated`` takes them off it, by a Hadamard matrix that changes
nothing else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from run import hardware

import nybble
from nybble.core.versions import versions
from nybble.data import load_text, token_samples
from nybble.eval import evaluate_many
from nybble.models.sources.open import open_source
from nybble.nn.swap import hold_dense
from nybble.recipe import parse_recipe

DTYPES = ("float32", "float16", "bfloat16")
STEPS: dict[str, list[dict[str, Any]]] = {
    "rtn": [{"solver": "rtn"}],
    "rotated rtn": [{"transform": "rotate"}, {"solver": "rtn"}],
    "rotated gptq": [{"transform": "rotate"}, {"solver": "gptq"}],
}
WINDOW, CALIBRATION, JUDGED = 256, 16, 32


def main() -> None:
    """Quantize and judge every row; print and record them."""
    args = arguments()
    source = open_source("demo:smollm2")
    tokenizer = source.tokenizer()
    calibration, judged = (
        token_samples(load_text("builtin", part, tokenizer), tokenizer, samples=samples, seq_len=WINDOW)
        for part, samples in (("calibration", CALIBRATION), ("evaluation", JUDGED))
    )
    reference = source.model(torch.bfloat16, args.device)
    found: dict[str, Any] = {"hardware": hardware(args.device), "versions": versions(), "rows": {}}
    for steps in args.rows:
        for bits in (4, 3):
            for dtype in DTYPES:
                scheme = {"weights": f"int{bits} group=64 symmetric=false scale_format={dtype}"}
                recipe = parse_recipe(
                    {"name": steps, "summary": "", "source": "", "scheme": scheme, "steps": STEPS[steps]}
                )
                model, report = nybble.quantize(
                    source.model(torch.bfloat16, args.device), recipe, calibration, settings={"device": args.device}
                )
                hold_dense(model, torch.bfloat16)
                errors = [layer.error for layer in report.layers if layer.error is not None]
                judge = evaluate_many(reference, {"it": model}, judged.input_ids, ("nll", "ppl", "kl"))["it"]
                row = {**judge.metrics, "mean_layer_error": sum(errors) / len(errors)}
                found["rows"][f"int{bits} {steps} {dtype}"] = row
                print(f"int{bits} {steps} {dtype}: {row}", flush=True)
                args.record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--record", type=Path, default=Path(__file__).parents[1] / "results" / "scale_dtypes.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
