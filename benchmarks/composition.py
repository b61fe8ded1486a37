"""Every recipe with every family of formats at every granularity: what is legal, and that all that is legal works.

    python benchmarks/composition.py --out benchmarks/results/composition.json [--recipes NAME ...]
        [--formats NAME ...] [--every N] [--jobs 2]

The file keeps the rows that a run doesn't try: what was mended is tried again alone.

Legal is what ``nybble recipes --matrix`` says. Each legal pair is then run whole, with few steps, on a llama of one
block, and three promises are looked at: the forward is that of the unpacked weights, and a folder that is saved and
loaded gives the same logits, bit for bit; the same request gives the same bytes again; no layer's error is above
round-to-nearest's by more than float noise where both were measured. Inputs stay in float, but for the recipe that
learns on rounded inputs alone, which keeps its own. One format stands for its family (a listed format
of each code path); ``--matrix`` itself lists them all.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent / "quality"))
from run import hardware
from transformers import LlamaConfig, LlamaForCausalLM

import nybble
from nybble.core.errors import NybbleError
from nybble.core.files import atomic_write_json
from nybble.core.versions import versions
from nybble.nn.kinds import quant_modules
from nybble.nn.rotated_linear import RotatedQuantLinear
from nybble.nn.rotation import BlockRotation
from nybble.pipelines import matrix
from nybble.quantizer import Quantizer
from nybble.recipe import Recipe, load_recipe, recipe_names
from nybble.scheme import Rule, Scheme

FORMATS = (
    "int4", "int4_full", "uint4", "int2", "int8", "binary", "ternary", "float4_e2m1fn", "float4_e3m0_finite",
    "float6_e3m2fn", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "nf4", "fp4_bnb", "af4", "dybit4", "udybit4",
    "dynamic8", "linear8",
)  # fmt: skip
SETTINGS = {"samples": 4, "seq_len": 16, "batch": 2, "dtype": "float32"}
STEPS = 3


def model() -> Any:
    """One block; the sizes divide by what the granularities' examples want."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def shortened(recipe: Recipe) -> Recipe:
    """With few steps, and what searches in its quick way."""
    steps = []
    for step in recipe.steps:
        options = {**step.options, **step.quick}
        if "steps" in options:
            options["steps"] = min(STEPS, options["steps"])
        if options.get("every"):
            options["every"] = 2
        steps.append(replace(step, options=options, quick={}))
    return replace(recipe, steps=tuple(steps))


def inputs_of(recipe: Recipe) -> Quantizer | None:
    """Float, but where something is learned on rounded inputs alone: then the recipe's own."""
    learned = any(step.options.get("rounds") == "activations" for step in recipe.steps)
    return recipe.scheme.rules[0].inputs if learned else None


def rounding(quantizer: Quantizer) -> Any:
    """A hook that rounds what enters a layer, as the quantizer measures it."""
    return lambda _, entering: (quantizer.fake_quantize(entering[0]), *entering[1:])


def turning(rotation: BlockRotation) -> Any:
    """A hook that rotates what enters a layer."""
    return lambda _, entering: (rotation(entering[0]), *entering[1:])


def proved(recipe_name: str, name: str, granularity: str) -> str:
    """What is wrong with a legal pair; empty where nothing is."""
    quantizer = matrix.quantizer_of(name, granularity)
    recipe = shortened(load_recipe(recipe_name))
    recipe = recipe.with_scheme(Scheme(rules=(Rule(weights=quantizer, inputs=inputs_of(recipe)),)))
    data = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(2):
        done, report = nybble.quantize(model(), recipe, data, settings=SETTINGS)
        found.append({key: value for key, value in done.state_dict().items() if isinstance(value, torch.Tensor)})
    first, second = found
    if first.keys() != second.keys() or not all(torch.equal(first[key], second[key]) for key in first):
        return "the same request gave other bytes"
    with torch.no_grad():
        want = done(data).logits
        if not bool(torch.isfinite(want).all()):
            return "the logits are not finite"
        with tempfile.TemporaryDirectory() as folder:
            nybble.save(done, Path(folder) / "out")
            if not torch.equal(nybble.load(Path(folder) / "out", dtype="float32")[0](data).logits, want):
                return "the loaded folder gives other logits"
        dense = model()
        dense.load_state_dict(
            {key: value for key, value in done.state_dict().items() if isinstance(value, torch.Tensor)}, strict=False
        )
        for place, module in quant_modules(done):
            layer = dense.get_submodule(place)
            layer.weight.copy_(module.weight.qtensor().dequantize(torch.float32))
            if isinstance(module, RotatedQuantLinear):  # its input is turned before it is rounded
                layer.register_forward_pre_hook(turning(module.rotation))
            if module.inputs is not None:
                layer.register_forward_pre_hook(rounding(module.inputs.quantizer))
        if not torch.equal(dense(data).logits, want):
            return "the forward is not that of the unpacked weights"
    for row in report.layers:
        known = row.error is not None and row.rtn_error is not None and not row.notes
        if known and row.error > 1.001 * row.rtn_error + 1e-6:
            return f"{row.name}: error {row.error:.4g} above round-to-nearest's {row.rtn_error:.4g}"
    return ""


def tried(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what running it came to."""
    torch.set_num_threads(1)
    if row["reason"]:
        return row
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fault = proved(row["recipe"], row["format"], row["granularity"])
        except NybbleError as error:
            fault = f"{type(error).__name__}: {error}"
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"[:300]
    return row | {"fault": fault}


def rows_of(recipe: str, formats: Sequence[str]) -> list[dict[str, Any]]:
    """All of one recipe, legal or not."""
    torch.set_num_threads(1)
    return matrix.legal_combinations([recipe], formats)


def record(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Write the file with these rows in the place of theirs."""
    if path is None:
        return
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    kept = {(row["recipe"], row["format"], row["granularity"]): row for row in [*known, *rows]}
    found = {"formats": FORMATS, "rows": list(kept.values()), "hardware": hardware("cpu"), "versions": versions()}
    atomic_write_json(path, found)


def main() -> None:
    """Try all, write after each recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--recipes", nargs="+", default=recipe_names())
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--every", type=int, default=1, help="only each Nth pair")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    started, done, number = time.monotonic(), [], 0
    with ProcessPoolExecutor(options.jobs) as pool:
        for recipe in options.recipes:
            rows = pool.submit(rows_of, recipe, options.formats).result()
            chosen = [row for at, row in enumerate(rows, number) if at % options.every == 0]
            number += len(rows)
            fresh = list(pool.map(tried, chosen, chunksize=4))
            for row in fresh:
                if row.get("fault"):
                    print(json.dumps(row), flush=True)
            done += fresh
            record(options.out, fresh)
            print(f"{recipe}: {len(fresh)} pairs, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    legal = [row for row in done if not row["reason"]]
    faults = [row for row in legal if row["fault"]]
    print(f"{len(done)} pairs, {len(legal)} legal, {len(faults)} with a fault, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
