"""What the best recipe of each target is made of: compositions at one size, judged on several language models.

    python benchmarks/quality/best.py --record benchmarks/results/best.json [--device cuda] [--smollm2 FILE.gguf]
        [--rows WORD ...] [--models smollm2 ladder-neox-10m ...] [--seconds N] [--missing]

Models, texts and options are those of defaults.py. Every row of a target has the same bits in the file. docs/log.md
says what was tried and lost; the recipes ``best-*`` are what won on the models together.
"""

from __future__ import annotations

import defaults
from ptq import DISTILL, GPTQ, PARTS, REFINE, Steps, learned

from nybble.recipe import load_recipe

SMOOTH: Steps = [{"transform": "smooth", "alpha": 0.6}]
SCALES = {"weights": "frozen-codes", "steps": 100, "rates": {"scales": 1e-4}}


def scales(**options: object) -> Steps:
    """Scales (and offsets) behind whatever found the codes."""
    return [{"reconstruction": "mse", **SCALES, **options}]


def together(steps: int) -> Steps:
    """LET and signed rounding of the rest."""
    part = PARTS["sign-round"]
    rates = {**part["rates"], "transform": 0.005}
    found = {"reconstruction": "mse", "weights": "sign-round", "block": {"let": {"where": "all"}}, "steps": steps}
    return [{"solver": "rtn"}, {**found, **part, "rates": rates}]


def rows() -> defaults.Rows:
    """Steps and scheme by name."""
    found: defaults.Rows = {}
    for bits, steps in ((4, 200), (3, 200), (2, 400)):
        candidates = {
            "gptq": GPTQ, "gptq, scales": GPTQ + scales(steps=steps), "sign-round": learned("sign-round", steps),
            "sign-round twice as long": learned("sign-round", 2 * steps),
            "sign-round, scales": learned("sign-round", steps) + scales(),
            "sign-round, refined": learned("sign-round", steps) + REFINE,
            "let and sign-round": together(steps),
        }  # fmt: skip
        if bits == 2:
            norms = scales(norms=True, steps=steps, rates={"scales": 5e-4, "norms": 5e-4})
            candidates |= {
                "decoupleq, scales and norms": [{"solver": "decoupleq", "offsets": False}, *norms],
                "gptq, scales and norms": GPTQ + norms,
            }
        scheme = {"weights": f"int{bits} group=64 symmetric=false"}
        found |= {f"W{bits}A16 {name}": (each, scheme) for name, each in candidates.items()}
    signed = learned("sign-round", 200) + scales()
    targets = {
        "NVFP4": {"weights": "nvfp4", "inputs": "nvfp4"},
        "MXFP4": {"weights": "mxfp4", "inputs": defaults.MX.format("even")},
        "W4A8": {"weights": "int4 group=64 symmetric=false", "inputs": "int8 token"},
    }
    for target, scheme in targets.items():
        candidates = {
            "gptq": GPTQ, "smooth, gptq": SMOOTH + GPTQ, "sign-round": signed, "smooth, sign-round": SMOOTH + signed,
            "let and sign-round": together(200),
        }  # fmt: skip
        if target == "MXFP4":
            candidates["hadamard of 32, sign-round"] = [{"transform": "hadamard", "block": 32}, *signed]
        found |= {f"{target} {name}": (each, scheme) for name, each in candidates.items()}
    return found


def finished() -> defaults.Rows:
    """What the recipes of today come to, and what they do with distillation into scales (and norms) behind them."""
    found: defaults.Rows = {}
    for target in ("w4a16", "w3a16", "w2a16", "w4a8", "nvfp4", "mxfp4"):
        recipe = load_recipe(f"best-{target}").with_effort("full").to_dict()
        steps = [step for step in recipe["steps"] if "train" not in step]
        scheme, name = recipe["scheme"], target.upper()
        found[f"{name} best"] = (steps, scheme)
        alone = {**DISTILL[0], "what": ["norms"], "rates": {"default": 1e-3}}
        found[f"{name} best + distill, norms alone 0.001"] = ([*steps, alone], scheme)
        for rate in (1e-3, 3e-3, 1e-2):
            found[f"{name} best + distill {rate:g}"] = ([*steps, {**DISTILL[0], "rates": {"default": rate}}], scheme)
        norms = {**DISTILL[0], "what": ["scales", "norms"]}
        found[f"{name} best + distill, norms"] = ([*steps, norms], scheme)
        found[f"{name} best + distill, 600 steps"] = ([*steps, {**DISTILL[0], "steps": 600}], scheme)
    return found


if __name__ == "__main__":
    defaults.main(__doc__, rows() | finished())
