"""Recipes as data: numbers as people write them, and effort."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.recipe import load_recipe, recipe_names


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
