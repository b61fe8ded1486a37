"""Inverse-scaling look-alikes over bits of one model, and over sizes of a ladder: metrics, and the shape of each curve.

    python benchmarks/inverse_scaling.py --device cuda --ladder build/ladder/models
        --out benchmarks/results/inverse_scaling.json

Weights of a model rounded to nearest in groups of 64 at 2, 3, 4, 6 and 8 bits, and in float, on the same questions;
then the float models of the ladder by size, each architecture apart. A label (inverse, U-shaped, ...) is of minus the
loss; rho is Spearman's, with an interval from drawing questions anew. The questions are look-alikes made here, not the
prize's: what is shown is what quantization does to such answers, not the published trends.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import nybble
from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.data.kinds import data_kind
from nybble.eval._logits import evaluating
from nybble.eval.inverse_scaling.scoring import score
from nybble.eval.inverse_scaling.tasks import TASKS, find_questions, made_here
from nybble.eval.inverse_scaling.trends import paired, rank_correlation, summary, trend
from nybble.pipelines.load import load_with_origin
from nybble.pipelines.request import build_recipe

BITS = (2, 3, 4, 6, 8)


def scored(model: str, bits: int | None, asked: dict[str, Any], options: argparse.Namespace) -> dict[str, list[Any]]:
    """Rows of each task."""
    made, origin = load_with_origin(model, dtype=options.dtype, device=options.device)
    if bits is not None:
        nybble.quantize(made, build_recipe("rtn", weights=f"int{bits} group=64"))
    tokenizer = data_kind("tokens").tokenizer(origin)
    with evaluating(made):
        return {name: score(made, tokenizer, each, batch=options.batch) for name, each in asked.items()}


def curve(asked: dict[str, Any], found: dict[str, dict[str, list[Any]]], sizes: list[float]) -> dict[str, Any]:
    """Of each task: every model's metrics, and the shape over them in their order; the last is the reference."""
    told: dict[str, Any] = {}
    last = [*found][-1]
    for name, each in asked.items():
        means = {model: summary(each, rows[name]) for model, rows in found.items()}
        goodness = [-metrics["loss"] for metrics in means.values()]
        losses = torch.tensor([[-row["loss"] for row in rows[name]] for rows in found.values()])
        told[name] = {
            "cause": TASKS[name].cause, "models": means,
            "trend": trend(goodness, [metrics["loss_se"] for metrics in means.values()]),
            "rank correlation": rank_correlation(sizes, losses),
            "paired": {model: paired(found[last][name], rows[name]) for model, rows in found.items() if model != last},
        }  # fmt: skip
    return told


def main() -> None:
    """Bits, then sizes; print, write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2", help="or its GGUF file")
    parser.add_argument("--ladder", type=Path, help="folder of the ladder's models; left out: bits alone")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=300, help="questions of a task")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tasks", nargs="+", default=made_here())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    asked = {name: find_questions(name, rows=options.rows) for name in options.tasks}
    result: dict[str, Any] = {
        "what": (__doc__ or "").split("\n")[0], "versions": versions(), "rows": options.rows, "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "sha256": {name: each.sha256 for name, each in asked.items()},
    }  # fmt: skip

    def told(key: str, found: dict[str, dict[str, list[Any]]], sizes: list[float]) -> None:
        result[key] = curve(asked, found, sizes)
        for name, each in result[key].items():
            losses = " ".join(f"{model} {metrics['loss']:.3f}" for model, metrics in each["models"].items())
            rho = each["rank correlation"]
            print(f"{key}: {name}: {losses}: {each['trend']['label']}, rho {rho['rho']:.2f} "
                  f"[{rho['low']:.2f}, {rho['high']:.2f}]", flush=True)  # fmt: skip
        if options.out:
            atomic_write_json(options.out, result)

    by_bits = {f"int{bits}": scored(options.model, bits, asked, options) for bits in BITS}
    told("bits", by_bits | {"float": scored(options.model, None, asked, options)}, [*map(float, BITS), 16.0])
    if options.ladder is not None:
        for family in ("llama", "neox"):
            folders = [path.parent for path in options.ladder.glob(f"{family}-*/config.json")]
            sizes = {folder.name: _parameters(folder) for folder in folders}
            names = sorted(sizes, key=lambda name: sizes[name])
            rows = {name: scored(str(options.ladder / name), None, asked, options) for name in names}
            told(f"sizes of {family}", rows, [sizes[name] for name in names])


def _parameters(folder: Path) -> float:
    """How many a saved model has."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return float(total)


if __name__ == "__main__":
    main()
