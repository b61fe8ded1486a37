"""Where the loss of a quantized SmolLM2 is: layers are put back to float, and quantized alone, one after the other.

    python benchmarks/texts.py python3.11-doc calibration.jsonl        (and debian-reference-en, perl-doc)
    python benchmarks/quality/layers.py --calibration calibration.jsonl --texts debian-reference-en.jsonl perl-doc.jsonl
        [--device cuda] [--row "LLM-FP4 16/4/4"] [--effort quick] [--samples 128] [--seq-len 1024] [--windows 12]
        [--blocks N] [--out benchmarks/results/layers.json]

The row of rows.py is made as run.py makes it. Then the mean NLL on each text is taken with

    whole    every layer float, quantized, with rounded weights alone, with rounded inputs alone
    kinds    only this kind of layer (q_proj ...) quantized; all but it; only its weights; only its inputs
    blocks   only this decoder block quantized; all but it
    layers   only this layer quantized; all but it

"only" less float is what a set loses alone; the quantized whole less "without", what putting it back recovers. "checks"
says how far all float and all quantized are from run.py's judge, and the model afterwards from what it was.
Evaluations: 7 + 4 a kind + 2 a block + 2 a layer. ``table.py`` turns the result into docs/layers.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rows import ROWS
from run import common_arguments, hardware, judge, named, run_row, tokens_of
from torch import nn

from nybble.core.files import atomic_write_json
from nybble.core.progress import Bars, Progress, task
from nybble.core.versions import versions
from nybble.data import TokenSamples
from nybble.eval import evaluate
from nybble.models.sources.open import open_source
from nybble.nn.kinds import quant_modules
from nybble.nn.linear import QuantLinear
from nybble.nn.packed import Packed
from nybble.nn.swap import set_module
from nybble.recipe import load_recipe
from nybble.report.record import Report

RESULT = Path(__file__).parents[1] / "results" / "layers.json"
FACTS = ("error", "rtn_error", "sqnr", "weights", "inputs")
FLOAT, QUANTIZED, WEIGHTS, INPUTS = "float", "quantized", "weights", "inputs"
Loss = dict[str, float]  # mean NLL on each text, nats a token


def main() -> None:
    """Quantize, account, write."""
    args = arguments()
    source = open_source(args.model)
    calibration, texts = tokens_of(args, source.tokenizer())
    reference = source.model(torch.bfloat16, args.device)
    row = ROWS[args.row]
    model, report, facts = run_row(row, source, calibration, args)
    judged = judge({FLOAT: reference, QUANTIZED: model}, reference, texts)
    forms = Forms(model, reference, texts)
    whole = {form: forms.loss(forms.of, form) for form in (FLOAT, QUANTIZED, WEIGHTS, INPUTS)}
    checks = {form: apart(whole[form], {t: m["nll"] for t, m in judged[form].items()}) for form in (FLOAT, QUANTIZED)}
    seen = {"calibration": named(calibration)} if facts.pop("calibrated") else {}
    about = {"model": args.model, "row": args.row, "bits": row.bits, "run": facts, **seen}
    about |= {"hardware": hardware(args.device), "versions": versions(), "judged": judged, "whole": whole}
    parts = account(forms, report, args.blocks, Bars())
    checks["afterwards"] = apart(evaluated(model, texts), whole[QUANTIZED])
    atomic_write_json(args.out, about | parts | {"checks": checks})


class Forms:
    """A model whose quantized linear layers each stand in one of four forms, the quantized one between calls.

    Args:
        model: quantized, its weights held dense. reference: the float model; its layers go into ``model`` too.
        texts: what :meth:`loss` is measured on.
    """

    def __init__(self, model: nn.Module, reference: nn.Module, texts: dict[str, TokenSamples]) -> None:
        self.model, self.texts = model, texts
        self.of: dict[str, dict[str, nn.Module]] = {}
        for name, module in quant_modules(model):
            if not isinstance(module, QuantLinear):
                sys.exit(f"{name} is a {type(module).__name__}: only rows that quantize linear layers alone fit here")
            self.of[name] = four_forms(module, reference.get_submodule(name))

    def loss(self, names: Iterable[str], form: str, others: str = FLOAT) -> Loss:
        """Mean NLL with these layers in one form, the others in another."""
        chosen = set(names)
        for name, forms in self.of.items():
            set_module(self.model, name, forms[form if name in chosen else others])
        found = evaluated(self.model, self.texts)
        for name, forms in self.of.items():
            set_module(self.model, name, forms[QUANTIZED])
        return found

    def both(self, names: Iterable[str]) -> dict[str, Loss]:
        """Only these layers quantized, and all but these."""
        return {"only": self.loss(names, QUANTIZED), "without": self.loss(names, FLOAT, QUANTIZED)}


def four_forms(own: QuantLinear, exact: nn.Module) -> dict[str, nn.Module]:
    """A layer quantized, float, with its rounded weights alone, and with its rounded inputs alone."""
    assert isinstance(exact, nn.Linear)
    rounded = own.weight.dequantize(exact.weight.dtype) if isinstance(own.weight, Packed) else own.weight.detach()
    return {
        QUANTIZED: own,
        FLOAT: exact,
        WEIGHTS: QuantLinear(rounded, own.bias),
        INPUTS: QuantLinear(exact.weight.detach(), exact.bias, own.inputs, own.outputs),
    }


def account(forms: Forms, report: Report, blocks: int | None, progress: Progress) -> dict[str, Any]:
    """The losses of kinds, blocks and layers, the latter with what the solver said of them."""
    kinds, depths = grouped(forms.of, kind), grouped(forms.of, block)
    depths = dict(list(depths.items())[:blocks])
    layers = [name for names in depths.values() for name in names]
    rows = {row.name.removesuffix(".weight"): row for row in report.layers}
    found: dict[str, dict[str, Any]] = {"kinds": {}, "blocks": {}, "layers": {}}
    with task(progress, len(kinds) + len(depths) + len(layers), "account") as bar:
        for name, names in kinds.items():
            found["kinds"][name] = forms.both(names) | {form: forms.loss(names, form) for form in (WEIGHTS, INPUTS)}
            bar.advance(note=name)
        for number, names in depths.items():
            found["blocks"][number] = forms.both(names)
            bar.advance(note=f"block {number}")
        for name in layers:
            found["layers"][name] = {fact: getattr(rows[name], fact) for fact in FACTS} | forms.both([name])
            bar.advance(note=name)
    return found


def grouped(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    """Names by what ``key`` says of them."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(key(name), []).append(name)
    return found


def kind(name: str) -> str:
    """The last part of a layer's name: ``down_proj``."""
    return name.rpartition(".")[2]


def block(name: str) -> str:
    """The number of a layer's decoder block."""
    found = re.search(r"\.(\d+)\.", name)
    assert found is not None, f"{name} is in no decoder block"
    return found[1]


def evaluated(model: nn.Module, texts: dict[str, TokenSamples]) -> Loss:
    """Mean NLL on each text, in the batches of run.py's judge."""
    return {text: evaluate(model, tokens.input_ids, ("nll",)).metrics["nll"] for text, tokens in texts.items()}


def apart(found: Loss, expected: Loss) -> float:
    """The largest difference; stops where it is more than another order of additions on a GPU explains."""
    difference = max(abs(found[text] - nll) for text, nll in expected.items())
    if difference > 1e-3:
        sys.exit(f"NLL is {found}, but should be {expected}")
    return difference


def arguments() -> argparse.Namespace:
    """The command line: rows that quantize linear layers alone, without transforms of the float model."""
    fits = [name for name, row in ROWS.items() if row.embeddings is None and not load_recipe(row.recipe).transforms]
    parser = common_arguments(__doc__, windows=12)
    parser.add_argument("--row", default="LLM-FP4 16/4/4", choices=fits, metavar="ROW")
    parser.add_argument("--blocks", type=int, help="single blocks and layers of the first N only; all if left out")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
