"""Recipes as data: numbers as people write them, and effort."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nybble.corrections import make_correction
from nybble.quantizer import Quantizer
from nybble.recipe import load_recipe, recipe_names
from nybble.reconstruction import make_reconstruction
from nybble.solvers import make_solver
from nybble.training.steps import make_train_step
from nybble.transforms import make_transform


@pytest.mark.parametrize("written", ["1e-3", "1.0e-3", "1E-3", ".1e-2", "10e-4", "+1e-3", "0.001"])
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, written: str) -> None:
    """YAML 1.2's; PyYAML is of 1.1, where a number has a dot and its exponent a sign, and takes others for text."""
    path = tmp_path / "made.yaml"
    steps = f"[{{solver: rtn}}, {{reconstruction: mse, weights: lsq, rates: {{scales: {written}}}, steps: 3}}]"
    path.write_text(f"scheme: {{weights: int4 group=16}}\nsteps: {steps}\n")
    options = load_recipe(str(path)).steps[1].options
    assert options["rates"]["scales"] == 1e-3
    assert isinstance(options["steps"], int)


@pytest.mark.parametrize("text", ["e3", "1e", "1e3m", "int4 1e3", "0x1e3"])
def test_what_is_no_such_number_is_what_it_was(tmp_path: Path, text: str) -> None:
    path = tmp_path / "made.yaml"
    path.write_text(f"name: {text}\nscheme: {{weights: int4 group=16}}\nsteps: [{{solver: rtn}}]\n")
    assert load_recipe(str(path)).name == (str(0x1E3) if text.startswith("0x") else text)


def test_any_recipe_goes_quickly() -> None:
    """Where it has nothing to spare it is the same; a script need not know which."""
    for name in recipe_names():
        full = load_recipe(name)
        quick = full.with_effort("quick")
        assert (quick.steps == full.with_effort("full").steps) == (not any(step.quick for step in full.steps))


# What the papers (or their code) set, by recipe and step; of what is learned, options of the part under its name.
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "adaround": {"mse": {"weights.strength": 0.01, "weights.beta_start": 20, "weights.beta_end": 2,
                         "weights.warmup": 0.2}},
    "awq": {"awq": {"grid": 20, "duo": False}},
    "cbq": {"cfp": {"coarse": 1.5, "fine": 1.0}, "rtn": {"scale": "cfp"},
            "two-target": {"error": "l2-kl", "window": 2, "overlap": 1, "accumulated": 1, "local": 1,
                           "weights.rank": 5, "weights.beta_start": 20, "weights.beta_end": 2, "weights.warmup": 0}},
    "efficientqat-ap": {"mse": {"optimizer": "adamw", "decay": 0, "final": 1 / 20, "schedule": "cosine",
                                "rates": {"weights": 2e-5, "scales": 1e-4}}},
    "flexround": {"mse": {"mix": 0.5, "mix_by": "element", "schedule": "cosine", "final": 0,
                          "rates": {"rounding": 3e-3}}},
    "hqq": {"hqq": {"lp_norm": 0.7, "beta": 10, "iterations": 20}},
    "omniquant": {"mse": {"rates": {"clip": 1e-2, "transform": 5e-3}, "weights.start": 4, "block.alpha": 0.5}},
    "ptq1.61": {"restorative-lora": {"rank": 64, "alpha": 16, "dropout": 0.1, "rate": 1e-4, "warmup": 0.05},
                "outlier-columns": {"share": 0.2, "count": "down", "by": "largest"},
                "two-target": {"error": "mse-cosine", "rates": {"scales": 5e-4, "factors": 1e-3}}},
    "signround": {"mse": {"optimizer": "sign", "steps": 200, "schedule": "linear", "keep": "best",
                          "rates": {"rounding": 1 / 200, "clip": 1 / 200}}},
    "smoothquant": {"smooth": {"alpha": 0.5}},
    "zeroquant-fp": {"low-rank": {"rank": 8}},
}  # fmt: skip
MAKE = {
    "transform": make_transform, "solver": make_solver, "reconstruction": make_reconstruction, "train": make_train_step,
    "correction": make_correction,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_methods_have_their_papers_settings(name: str) -> None:
    made = {step.name: MAKE[step.kind](step.name, step.options) for step in load_recipe(name).steps}
    for step, wanted in PUBLISHED[name].items():
        for path, value in wanted.items():
            found: Any = made[step]
            for word in path.split("."):
                found = getattr(found, word)
            assert found == (pytest.approx(value) if isinstance(value, float) else value), path


def test_methods_have_their_papers_formats() -> None:
    lines = {
        "zeroquant-fp": ("float4_e2m1fn group=64 scale=pow2-ratio", "float8_e4m3fn token"),
        "omniquant": ("int4 channel symmetric=false", "int4 token symmetric=false"),
        "minifloat": ("float4_e2m1fn channel", "float8_e3m4_finite scale=percentile(p=99.999) static"),
        "efficientqat-ap": ("int2 group=64 symmetric=false", None),
        "decoupleq": ("int2 group=64 symmetric=false", None),
    }
    for name, (weights, inputs) in lines.items():
        (rule,) = load_recipe(name).scheme.rules
        assert (rule.weights, rule.inputs) == (Quantizer(weights), None if inputs is None else Quantizer(inputs))
