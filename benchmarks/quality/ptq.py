"""Post-training methods at the settings that people ask for, alone and composed, judged on two language models.

    python benchmarks/quality/ptq.py --record benchmarks/results/ptq.json [--device cuda] [--smollm2 FILE.gguf]
        [--rows WORD ...] [--models smollm2 trained ladder-llama-10m ...] [--ladder FOLDER] [--seconds N] [--missing]

Learned rotations beside fixed ones, by the seed of their signs and samples (results/rotations.json, on CPUs):

    python benchmarks/quality/ptq.py --rows "INT4 W4A4 quarot" "INT4 W4A4 spinquant" --without both weights next stream
        400 head --models ladder-llama-3m ladder-llama-10m --seed 0 (and 1) --record benchmarks/results/rotations.json

Rotations that stay in the model beside those that are folded (results/online_rotations.json, on CPUs):

    python benchmarks/quality/ptq.py --rows Online --models ladder-llama-3m ladder-llama-10m --samples 32
        --record benchmarks/results/online_rotations.json

PTQ1.61's preprocessing on and off in few steps (results/ptq161.json, on a CPU):

    python benchmarks/quality/ptq.py --rows "PTQ1.61 short" --models ladder-neox-3m --samples 32 --seq-len 128
        --record benchmarks/results/ptq161.json

CBQ beside rounding to nearest, in short windows of text (results/cbq.json, on a CPU):

    python benchmarks/quality/ptq.py --rows CBQ --without windows "no CFP" target alone --models ladder-llama-3m
        --samples 32 --seq-len 64 --record benchmarks/results/cbq.json

The models, calibration and held-out texts are those of defaults.py. Learned parts run for the steps that a row names,
the same for all of one setting, so that what differs is the part.
"""

from __future__ import annotations

from typing import Any

import defaults

from nybble.recipe import load_recipe

Steps = list[dict[str, Any]]
GPTQ: Steps = [{"solver": "gptq"}]
BOTH: Steps = [{"solver": "gptq", "inputs": "both"}]
REFINE: Steps = [{"correction": "refine-scales"}]
DISTILL: Steps = [{"train": "distill", "rates": {"default": 3e-3}}]
NEXT: Steps = [step for step in load_recipe("efficientqat").to_dict()["steps"] if "train" in step]
"""EfficientQAT's second phase, as its recipe has it."""
PARTS: dict[str, dict[str, Any]] = {
    "clip": {"rates": {"default": 0.01}, "schedule": "constant"},
    "adaround": {"rates": {"rounding": 0.05}, "schedule": "constant"},
    "flexround": {"rates": {"rounding": 0.003}},
    "sign-round": {
        "optimizer": "sign", "schedule": "linear", "rates": {"rounding": 0.005, "clip": 0.005}, "keep": "best",
    },
    "frozen-codes": {"rates": {"scales": 1e-4}},
    "block-ap": {"optimizer": "adamw", "final": 0.05, "rates": {"weights": 2e-5, "scales": 1e-4}},
    "lora-rounding": {"rates": {"rounding": 1e-3, "scales": 1e-4}},
    "outer-scales": {"rates": {"outer": 1e-3}, "keep": "best", "every": 40},
}  # fmt: skip


def learned(part: str, steps: int, before: str = "rtn", **options: Any) -> Steps:
    """A learned part behind a solver."""
    found = {"reconstruction": "mse", "weights": part, "steps": steps, **PARTS[part], **options}
    return [{"solver": before}, found]


def decoupled(steps: int) -> dict[str, Steps]:
    """decoupleQ: one stage and both, at several rates; also keeping zero points, as large in a file as GPTQ's."""
    first: Steps = [{"solver": "decoupleq"}]
    whole: Steps = [{"solver": "decoupleq", "offsets": False}]
    found = {"decoupleq, one stage": first, "decoupleq, one stage, zero points": whole}
    found["decoupleq, one stage, beam 4"] = [{"solver": "decoupleq", "beam": 4}]
    for rate in (1e-5, 1e-4, 5e-4):
        rates = {"scales": rate, "norms": rate}
        step = {"reconstruction": "mse", "weights": "frozen-codes", "norms": True, "steps": steps, "rates": rates}
        found[f"decoupleq, both, {rate:g}"] = [*first, step]
        if rate == 1e-4:
            found["decoupleq, both, zero points"] = [*whole, step]
            found["decoupleq, both, no norms"] = learned("frozen-codes", steps, "decoupleq")
    return found


def guided(groups: int, **options: Any) -> Steps:
    """GPTQ with second moments that gradients of the loss weigh."""
    return [{"solver": "gptq", "guided": groups, **options}]


def distilled() -> defaults.Rows:
    """Gradients of the end loss in front, distillation into the scales behind, and both."""
    found: defaults.Rows = {}
    for bits, steps in ((4, 200), (3, 200), (2, 400)):
        scheme = {"weights": f"int{bits} group=64 symmetric=false"}
        signed = learned("sign-round", steps, "gptq")[1:]
        candidates = {
            "gptq guided": guided(4), "gptq guided, one group": guided(1), "gptq guided both": guided(4, inputs="both"),
            "decoupleq guided": [{"solver": "decoupleq", "guided": 4}], "gptq, distilled": GPTQ + DISTILL,
            "gptq guided, distilled": guided(4) + DISTILL,
            "gptq guided, sign-round, scales distilled": guided(4) + signed + DISTILL,
            "gptq, distilled on 256 logits": [*GPTQ, {**DISTILL[0], "top_k": 256}],
            "gptq, distilled, rates 1e-3": [*GPTQ, {**DISTILL[0], "rates": {"default": 0.001}}],
            "gptq, distilled, rates 1e-2": [*GPTQ, {**DISTILL[0], "rates": {"default": 0.01}}],
            "gptq, scales and norms distilled": [*GPTQ, {**DISTILL[0], "what": ["scales", "norms"]}],
            "gptq, next token": [*GPTQ, {**DISTILL[0], "loss": "nll"}],
            "block-ap, next token": learned("block-ap", steps) + NEXT,
            "block-ap, distilled": learned("block-ap", steps) + DISTILL,
        }  # fmt: skip
        found |= {f"INT{bits} g64 {name}": (each, scheme) for name, each in candidates.items()}
    smooth: Steps = [{"transform": "smooth", "alpha": 0.6}]
    found["NVFP4 smooth, gptq, distilled"] = (smooth + GPTQ + DISTILL, {"weights": "nvfp4", "inputs": "nvfp4"})
    return found | small_files()


def small_files() -> defaults.Rows:
    """Four-bit weights alone at 4.25 and at 4.5 bits, of several formats."""
    lines = {
        4.25: ("int4_full group=64", "nf4 group=64", "int4 group=96 symmetric=false", "float4_e2m1fn group=64"),
        4.5: ("float4_e2m1fn group=32", "nf4 group=32", "int4 group=48 symmetric=false"),
    }
    signed = learned("sign-round", 200)
    ways: dict[str, Steps] = {
        "gptq": GPTQ, "sign-round": signed,
        "gptq guided, sign-round, scales distilled": guided(4) + signed[1:] + DISTILL,
    }  # fmt: skip
    return {
        f"W4A16 {bits} bits, {line}: {name}": (steps, {"weights": line})
        for bits, some in lines.items() for line in some for name, steps in ways.items()
    }  # fmt: skip


def rows() -> defaults.Rows:
    """Steps and scheme by name."""
    found: defaults.Rows = {}
    for bits, steps in ((4, 200), (3, 200), (2, 400)):
        scheme = {"weights": f"int{bits} group=64 symmetric=false"}
        weighed: Steps = [{"solver": "rtn", "scale": "mse(low=0.55,grid=10)", "weighted": True}]
        plain = {
            "rtn": [{"solver": "rtn"}], "hqq": [{"solver": "hqq"}], "awq": [{"transform": "awq"}, *weighed],
            "gptq": GPTQ, "gptq both": BOTH, "gptq both, refined": BOTH + REFINE,
            "awq, gptq both": [{"transform": "awq"}, *BOTH],
            "rotated, gptq both": [{"transform": "rotate"}, {"transform": "hadamard"}, *BOTH],
        }  # fmt: skip
        parts = {part: learned(part, steps) for part in PARTS if part not in ("frozen-codes", "outer-scales")}
        parts["gptq, block-ap"] = learned("block-ap", steps, "gptq")
        parts["sign-round, two blocks"] = learned("sign-round", steps, window=2)
        parts["gptq, frozen-codes"] = learned("frozen-codes", steps, "gptq")
        parts |= decoupled(steps)
        found |= {f"INT{bits} g64 {name}": (each, scheme) for name, each in (plain | parts).items()}
    for line in ("nvfp4", "nvfp4-46", "nvfp4-search"):
        scheme = {"weights": line, "inputs": "nvfp4"}
        smooth: Steps = [{"transform": "smooth", "alpha": 0.6}]
        found[f"NVFP4 {line} rtn"] = ([{"solver": "rtn"}], scheme)
        found[f"NVFP4 {line} smooth, gptq"] = (smooth + GPTQ, scheme)
        found[f"NVFP4 {line} smooth, gptq both, refined"] = (smooth + BOTH + REFINE, scheme)
        found[f"NVFP4 {line} smooth, sign-round"] = (smooth + learned("sign-round", 200), scheme)
    mx = {"weights": "mxfp4", "inputs": defaults.MX.format("even")}
    smooth = [{"transform": "smooth", "alpha": 0.6}]
    found["MXFP4 smooth, gptq"] = (smooth + GPTQ, mx)
    found["MXFP4 smooth, gptq both"] = (smooth + BOTH, mx)
    found["MXFP4 hadamard of 32, gptq both"] = ([{"transform": "hadamard", "block": 32}, *BOTH], mx)
    found["MXFP4 smooth, sign-round"] = (smooth + learned("sign-round", 200), mx)
    e2m1 = {"weights": "float4_e2m1fn group=32"}
    found["E2M1 g32 gptq"] = (GPTQ, e2m1)
    found["E2M1 g32 gptq both, refined"] = (BOTH + REFINE, e2m1)
    found["E2M1 g32 sign-round"] = (learned("sign-round", 200), e2m1)
    w4a4 = {"weights": "int4 channel", "inputs": "int4 token"}
    found["INT4 W4A4 gptq"] = (GPTQ, w4a4)
    found["INT4 W4A4 smooth, gptq"] = (smooth + GPTQ, w4a4)
    found["INT4 W4A4 quarot"] = ([{"transform": "rotate"}, {"transform": "hadamard"}, *GPTQ], w4a4)
    found["INT4 W4A4 quarot, both"] = ([{"transform": "rotate"}, {"transform": "hadamard"}, *BOTH], w4a4)
    return found | rotation_rows() | online_rows() | outer_rows() | omniquant_rows() | cbq() | binary() | distilled()


def rotation_rows() -> defaults.Rows:
    """Rotations, fixed and learned: of the whole stream for integers, in blocks of 32 for MX."""
    found: defaults.Rows = {}
    w4a4 = {"weights": "int4 channel", "inputs": "int4 token"}
    spin: dict[str, Any] = {"transform": "learned-rotation"}
    for name, options in {
        "": {"rounds": "activations"}, ", weights rounded too": {}, ", next token": {"loss": "next-token"},
        ", stream alone": {"heads": False}, ", 400 steps": {"rounds": "activations", "steps": 400},
    }.items():  # fmt: skip
        found[f"INT4 W4A4 spinquant{name}"] = ([{**spin, **options}, *GPTQ], w4a4)
    inside = {"reconstruction": "mse", "block": "head-rotation", "steps": 200, "rates": {"rotation": 0.005},
              "keep": "best", "every": 40}  # fmt: skip
    found["INT4 W4A4 rotate, gptq, head-rotation by window"] = ([{"transform": "rotate"}, *GPTQ, inside], w4a4)
    mx = {"weights": "mxfp4", "inputs": defaults.MX.format("even")}
    rotations: dict[str, Steps] = {
        "no rotation": [],
        "hadamard of 32 whole": [{"transform": "rotate", "block": 32}, {"transform": "hadamard", "block": 32}],
        "learned rotation of 32": [{**spin, "block": 32, "head_block": 32}],
    }
    smooth: Steps = [{"transform": "smooth", "alpha": 0.6}]
    for name, steps in rotations.items():
        found[f"MXFP4 blocks: {name}, rtn"] = ([*steps, {"solver": "rtn"}], mx)
        found[f"MXFP4 blocks: {name}, gptq"] = (steps + GPTQ, mx)
        found[f"MXFP4 blocks: {name}, smooth, gptq"] = (steps + smooth + GPTQ, mx)
        found[f"MXFP4 blocks: {name}, sign-round"] = (steps + learned("sign-round", 200), mx)
    return found


def online_rows() -> defaults.Rows:
    """Rotations folded into weights, and inputs rotated at run time: behind the MLP's product, or of all layers."""
    found: defaults.Rows = {}
    online: dict[str, Any] = {"transform": "online-rotation"}
    ends, every = {**online, "layers": "re:.*(down|o)_proj"}, {**online, "layers": "all"}
    folded: Steps = [{"transform": "rotate"}, {"transform": "hadamard"}]
    spin: Steps = [{"transform": "learned-rotation", "rounds": "activations"}]
    ways: dict[str, Steps] = {
        "no rotation": [], "folded": folded, "folded, online in the MLP": [*folded, online],
        "folded, online in the MLP and behind attention": [*folded, ends], "online in the MLP": [online],
        "online everywhere": [every], "online everywhere, of 128": [{**every, "block": 128}],
        "learned, folded": spin, "learned, folded, online in the MLP": [*spin, online],
    }  # fmt: skip
    w4a4 = {"weights": "int4 channel", "inputs": "int4 token"}
    found |= {f"Online, INT4 W4A4: {name}": (steps + BOTH, w4a4) for name, steps in ways.items()}
    blocks: dict[str, tuple[dict[str, str], tuple[int, ...]]] = {
        "MXFP4": ({"weights": "mxfp4", "inputs": defaults.MX.format("even")}, (32, 128)),
        "NVFP4": ({"weights": "nvfp4", "inputs": "nvfp4"}, (16, 32, 128)),
    }
    for line, (scheme, sizes) in blocks.items():
        small = sizes[0]
        ways = {
            "no rotation": [], "smooth": [{"transform": "smooth", "alpha": 0.6}],
            f"folded of {small}": [{"transform": name, "block": small} for name in ("rotate", "hadamard")],
        }  # fmt: skip
        ways |= {f"online everywhere, of {size}": [{**every, "block": size}] for size in sizes}
        ways[f"online everywhere, of {small}, with signs"] = [{**every, "block": small, "signs": True}]
        found |= {f"Online, {line} W4A4: {name}": (steps + BOTH, scheme) for name, steps in ways.items()}
    return found


def outer_rows() -> defaults.Rows:
    """The scale above NVFP4's scales learned: alone, with those, behind GPTQ's codes."""
    scheme, found = {"weights": "nvfp4", "inputs": "nvfp4"}, dict[str, Any]()
    ways: dict[str, tuple[str, dict[str, str]]] = {
        "rtn": ("rtn", {}), "scales too": ("rtn", {"inner": "learned"}),
        "gptq": ("gptq", {"codes": "fixed"}), "gptq, scales too": ("gptq", {"codes": "fixed", "inner": "learned"}),
    }  # fmt: skip
    for name, (solver, options) in ways.items():
        found[f"NVFP4 outer {name}"] = (learned("outer-scales", 200, solver, weights={"outer-scales": options}), scheme)
    frozen = learned("frozen-codes", 200, "gptq")
    found["NVFP4 outer, none: gptq"] = (GPTQ, scheme)
    found["NVFP4 outer, none: gptq, frozen-codes"] = (frozen, scheme)
    return found


def omniquant(steps: int, **options: Any) -> Steps:
    """LWC and LET together, as the recipe has them."""
    rates = {"clip": 0.01, "transform": 0.005}
    found = {"reconstruction": "mse", "block": "let", "weights": "clip", "rates": rates, "steps": steps}
    return [{"solver": "rtn"}, {**found, "keep": "best", "every": 40, **options}]


def omniquant_rows() -> defaults.Rows:
    """OmniQuant at its paper's settings, with what it is made of beside it: LWC alone, SmoothQuant, to nearest."""
    found: defaults.Rows = {}
    for bits in (4, 6):
        scheme = {"weights": f"int{bits} channel symmetric=false", "inputs": f"int{bits} token symmetric=false"}
        found |= {
            f"OmniQuant W{bits}A{bits} rtn": ([{"solver": "rtn"}], scheme),
            f"OmniQuant W{bits}A{bits} smooth": ([{"transform": "smooth"}, {"solver": "rtn"}], scheme),
            f"OmniQuant W{bits}A{bits} lwc": (learned("clip", 320), scheme),
            f"OmniQuant W{bits}A{bits}": (omniquant(320), scheme),
            f"OmniQuant W{bits}A{bits} constant rates": (omniquant(320, schedule="constant"), scheme),
        }
    lines = {"W4A16 g64": "int4 group=64", "W4A16 g96": "int4 group=96"}
    lines |= {f"W{bits}A16": f"int{bits} channel" for bits in (3, 2)}
    for name, line in lines.items():
        scheme, steps = {"weights": f"{line} symmetric=false"}, 640 if "W2" in name else 320
        found |= {
            f"OmniQuant {name} rtn": ([{"solver": "rtn"}], scheme),
            f"OmniQuant {name}": (omniquant(steps), scheme),
            f"OmniQuant {name} let everywhere": (omniquant(steps, block={"let": {"where": "all"}}), scheme),
        }
    return found


def cbq() -> defaults.Rows:
    """CBQ at its paper's settings, whole and with each of its parts off in turn; as many steps a window for all."""
    cfp, nearest = {"transform": "cfp"}, {"solver": "rtn", "scale": "cfp"}
    learn: dict[str, Any] = {
        "reconstruction": "two-target", "error": "l2-kl", "weights": "lora-rounding", "window": 2, "overlap": 1,
        "rates": {"rounding": 1e-3, "scales": 1e-4}, "steps": 300,
    }  # fmt: skip
    one_target = {name: value for name, value in learn.items() if name != "error"} | {"reconstruction": "l2-kl"}
    ways: dict[str, Steps] = {
        "rtn": [{"solver": "rtn"}], "whole": [cfp, nearest, learn],
        "windows of one": [cfp, nearest, {**learn, "window": 1, "overlap": 0}],
        "no CFP": [{"solver": "rtn"}, learn], "one target": [cfp, nearest, one_target],
        "scales alone": [cfp, nearest, {**learn, "rates": {"rounding": 0.0, "scales": 1e-4}}],
    }  # fmt: skip
    schemes = {
        "W4A4": {"weights": "int4 channel symmetric=false", "inputs": "int4 token symmetric=false"},
        "W4A8": {"weights": "int4 channel symmetric=false", "inputs": "int8 token"},
        "W2A16": {"weights": "int2 group=64 symmetric=false"},
    }
    return {f"CBQ {name} {way}": (steps, scheme) for name, scheme in schemes.items() for way, steps in ways.items()}


def binary() -> defaults.Rows:
    """PTQ1.61 and what it must be better than: binary weights, and columns of the largest inputs in more bits."""
    eight = "(uint8 tensor scale=minmax(offset=true))"
    lines = {
        "": ("scale_format=float16 offset_format=float16", "float16", "float16"),
        ", scales in 8 bits": (f"scale_format={eight} offset_format={eight}", eight, eight[1:-1]),
    }
    found: defaults.Rows = {}
    for name, (words, scales, factors) in lines.items():
        scheme = {"weights": f"binary channel scale=mean(offset=true) {words}"}
        mask = {
            "solver": "outlier-columns", "share": 0.2, "count": "down", "by": "largest",
            "keep": f"int4 channel symmetric=false scale_format={scales}",
        }  # fmt: skip
        learn = {
            "reconstruction": "two-target", "error": "mse-cosine", "optimizer": "adamw", "steps": 1000,
            "weights": {"binarization-scales": {"factors": factors}}, "rates": {"scales": 5e-4, "factors": 1e-3},
        }  # fmt: skip
        fast = {**learn, "rates": {"scales": 2e-3, "factors": 1e-2}}
        train = {"train": "restorative-lora", "steps": 1000, "rate": 3e-4}
        found[f"PTQ1.61 mask alone{name}"] = ([mask], scheme)
        found[f"PTQ1.61 without preprocessing{name}"] = ([mask, learn], scheme)
        found[f"PTQ1.61 without preprocessing, larger rates{name}"] = ([mask, fast], scheme)
        found[f"PTQ1.61 with preprocessing{name}"] = ([train, mask, fast], scheme)
        if not name:
            found["binary rtn"] = ([{"solver": "rtn"}], scheme)
            found["binary, 5% outlier columns"] = ([{"solver": "outlier-columns", "share": 0.05}], scheme)
            whole = {**mask, "span": "whole"}
            found["PTQ1.61 without preprocessing, range of the whole row"] = ([whole, fast], scheme)
            energy = {**mask, "by": "inputs"}
            found["PTQ1.61 without preprocessing, mask by energy"] = ([energy, fast], scheme)
            short, lora = {**fast, "steps": 150}, {**train, "steps": 300}
            found["PTQ1.61 short, without preprocessing"] = ([mask, short], scheme)
            found["PTQ1.61 short, with preprocessing"] = ([lora, mask, short], scheme)
            found["PTQ1.61 short, with preprocessing, lower rate"] = ([{**lora, "rate": 1e-4}, mask, short], scheme)
    return found


if __name__ == "__main__":
    defaults.main(__doc__, rows())
