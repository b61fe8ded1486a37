"""Every number in the README and in docs/ comes from a committed result, what there is from the registries."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.tiny import tiny_model

from nybble.export import REGISTRY as TARGETS
from nybble.matmul_format import MatmulFormat
from nybble.models.adapter import adapter_for
from nybble.quantizer import Quantizer
from nybble.recipe import parse_recipe, recipe_names
from nybble.scales import REGISTRY as SCALES
from nybble.scheme import PRESETS, parse_scheme
from nybble.solvers import REGISTRY as SOLVERS
from nybble.two_sets import TWO_SETS
from nybble.walk.steps.make import check_quick, make_steps

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", ["tables.py", "quality/table.py"])
def test_tables_are_what_the_results_say(script: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_examples_of_the_grammar_are_right() -> None:
    examples = {name: re.findall(r"```yaml\n(.*?)```", page(name), re.DOTALL) for name in ("schemes", "recipes")}
    schemes = [parse_scheme(yaml.safe_load(text)) for text in examples["schemes"]]
    assert [len(scheme.rules) for scheme in schemes] == [1, 3, 2, 1] and all(schemes[i].kv for i in (1, 3))
    assert schemes[2].rules[0].matmuls != MatmulFormat.of(Quantizer("int8 tensor static"))
    (recipe,) = (parse_recipe(yaml.safe_load(text)) for text in examples["recipes"])
    steps, paths = make_steps(recipe, adapter_for(tiny_model()))
    assert [step.kind for step in steps] == ["transform", "solver", "reconstruction", "correction"]
    assert paths == {"float", "quantized"} and (steps[2].window, steps[2].overlap) == (2, 1)
    check_quick(recipe)
    lines = re.findall(r"^\| `([^`]+)` \|", page("lines").partition("## Words")[0], re.MULTILINE)
    assert len(lines) == 5 and all(Quantizer(line) for line in lines)


def test_the_grammar_has_every_part_and_what_every_option_means() -> None:
    """Rows as they stand on the pages: the check of the tables says that the pages are what the registries say."""
    recipes = page("recipes")
    assert [name for name in recipe_names() if f"\n| `{name}` | " not in recipes] == []
    assert [name for name in SOLVERS.names() if f"\n**`{name}`**: " not in recipes] == []
    assert [name for name in (*PRESETS, *TWO_SETS) if f"\n| `{name}` | " not in page("schemes")] == []
    assert [name for name in SCALES.names() if f"\n| `{name}` | " not in page("lines")] == []
    assert [name for name in TARGETS.names() if f"\n| `{name}` | " not in page("targets")] == []
    assert "| `activation_order` | true or false | " in recipes
    assert "| `grid` | whole number | `100` | clip candidates |" in recipes
    options = [line for line in recipes.splitlines() if line.startswith("| `") and line.count(" | ") == 3]
    assert len(options) > 30
    assert [line for line in options if line.endswith("|  |")] == []  # an option that its class's docstring leaves out
