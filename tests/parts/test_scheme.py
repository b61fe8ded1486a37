"""Schemes and recipes: which rule takes which module, what YAML means, and that both survive a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nybble.core.errors import SchemeError, UsageError
from nybble.corrections import make_correction
from nybble.pipelines.request import build_recipe
from nybble.quantizer import Quantizer
from nybble.recipe import load_recipe, parse_recipe, recipe_names
from nybble.reconstruction import make_reconstruction
from nybble.scheme import PRESETS, Rule, Scheme, parse_scheme, preset_scheme
from nybble.solvers import make_solver
from nybble.transforms import make_transform

MODULES = {
    "model.layers.0.q": ("Linear",),
    "model.layers.0.down": ("Linear",),
    "model.layers.1.q": ("Conv1D", "Linear"),
    "model.layers.1.experts.up": ("MixtralExperts", "Experts", "Linear"),
    "lm_head": ("Linear",),
}
INT4, INT8, FP8 = Quantizer("int4"), Quantizer("int8"), Quantizer("float8_e4m3fn token")


def test_the_first_rule_that_matches_decides() -> None:
    rules = (
        Rule(targets=("re:.*down", "model.layers.0.q"), weights=INT8),
        Rule(targets=("Conv1D",), inputs=FP8),
        Rule(weights=INT4),
    )
    found = Scheme(rules=rules).match(MODULES)
    assert found.rules == {
        "model.layers.0.q": rules[0], "model.layers.0.down": rules[0], "model.layers.1.q": rules[1],
        "model.layers.1.experts.up": rules[2],
    }  # fmt: skip
    assert found.counts == {"re:.*down": 1, "model.layers.0.q": 1, "Conv1D": 1, "Linear": 1, "lm_head": 1}
    assert found.ignored == ("lm_head",)


def test_a_pattern_is_for_the_whole_name() -> None:
    with pytest.raises(SchemeError, match="'re:down' matches no module"):
        Scheme(rules=(Rule(targets=("re:down",), weights=INT4),)).match(MODULES)
    with pytest.raises(SchemeError, match="'q' matches no module"):
        Scheme(rules=(Rule(targets=("q",), weights=INT4),)).match(MODULES)


def test_ignore_wins_and_must_match() -> None:
    rule = Rule(weights=INT4)
    found = Scheme(rules=(rule,), ignore=("lm_head", "Experts", "re:.*0.*")).match(MODULES)
    assert list(found.rules) == ["model.layers.1.q"]
    assert found.counts == {"Linear": 1, "lm_head": 1, "Experts": 1, "re:.*0.*": 2}
    with pytest.raises(SchemeError, match=r"ignore pattern 'lm_haed' matches no module\. Did you mean 'lm_head'"):
        Scheme(rules=(rule,), ignore=("lm_haed",)).match(MODULES)
    without_head = {name: classes for name, classes in MODULES.items() if name != "lm_head"}
    assert len(Scheme(rules=(rule,)).match(without_head).rules) == 4  # the default ignore needn't match
    with pytest.raises(SchemeError, match="'Linear' matches no module that is left to it"):
        Scheme(rules=(rule,), ignore=("Linear",)).match(MODULES)


@pytest.mark.parametrize("name", [*PRESETS, "W4A4_E2M1", "W4A8_E2M1_E4M3", "W8A16_E4M3", "W3A8_INT"])
def test_presets_survive_yaml(name: str) -> None:
    scheme = preset_scheme(name)
    again = parse_scheme(yaml.safe_load(yaml.safe_dump(scheme.to_dict())))
    assert again == scheme == parse_scheme(name) and scheme.name == name
    rule = scheme.rules[0]
    assert rule.weights is not None and rule.weights.format.bits == int(name[1]) if name[0] == "W" else True
    assert (rule.inputs is None) == (name.endswith("A16") or "A16_" in name)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_survive_yaml(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    assert recipe.name == name and recipe.summary and recipe.source
    made: dict[str, Any] = {
        "transform": make_transform, "solver": make_solver, "reconstruction": make_reconstruction,
        "correction": make_correction,
    }  # fmt: skip
    for step in recipe.steps:
        if step.kind in made:
            made[step.kind](step.name, {**step.options, **step.quick})


def test_options_of_the_quick_way_are_known_before_it_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("scheme: {weights: int4}\nsteps: [{solver: gptq, quick: {damping: 0.1}}]\n")
    assert build_recipe(str(path), effort="quick").solver.options == {"damping": 0.1}
    path.write_text("scheme: {weights: int4}\nsteps: [{solver: gptq, quick: {dampling: 0.1}}]\n")
    with pytest.raises(UsageError, match=r"quick of gptq: .*dampling.*damping"):
        build_recipe(str(path))


def test_schemes_of_yaml() -> None:
    one = parse_scheme({"weights": "int4 group=32", "inputs": "float8_e4m3fn token", "ignore": []})
    assert one == Scheme(rules=(Rule(weights=Quantizer("int4 group=32"), inputs=FP8),), ignore=())
    two = parse_scheme({"rules": [{"targets": ["re:.*down"], "weights": "int8"}, {"weights": "int4"}]})
    assert [rule.weights for rule in two.rules] == [INT8, INT4]
    assert parse_scheme({"preset": "W4A16", "ignore": ["x"]}).ignore == ("x",)
    with pytest.raises(SchemeError, match=r"a scheme with rules has no key 'weights'"):
        parse_scheme({"rules": [], "weights": "int4"})
    with pytest.raises(SchemeError, match="without rules quantizes nothing"):
        parse_scheme({"rules": []})


def test_changes_from_the_command_line(tmp_path: Path) -> None:
    def rule(**options: Any) -> Rule:
        return build_recipe("minmax-fp", **options).scheme.rules[0]

    assert rule() == Rule(weights=Quantizer("e2m1 channel"), inputs=Quantizer("e2m1 tensor static"))
    assert rule(weights="int4") == Rule(weights=INT4)  # the scheme's activations belong to its own weights
    assert rule(activations="float8_e4m3fn token") == Rule(weights=Quantizer("e2m1 channel"), inputs=FP8)
    assert rule(weights="int4", activations="float8_e4m3fn token") == Rule(weights=INT4, inputs=FP8)
    assert rule(activations="none") == Rule(weights=Quantizer("e2m1 channel"))
    assert rule(weights="none", activations="float8_e4m3fn token") == Rule(inputs=FP8)
    assert build_recipe("gptq", ignore=("x", "y")).scheme.ignore == ("lm_head", "x", "y")
    (tmp_path / "s.yml").write_text("weights: int4\n")
    assert rule(scheme=str(tmp_path / "s.yml")) == Rule(weights=INT4)
    (tmp_path / "r.yml").write_text("scheme: W4A16\nsteps: [{solver: gptq, block: 64}]\n")
    recipe = build_recipe(str(tmp_path / "r.yml"), weights="int4")
    assert recipe.steps[0].to_dict() == {"solver": "gptq", "block": 64} and recipe.scheme.rules == (Rule(weights=INT4),)
    with pytest.raises(UsageError, match="nothing is left to quantize"):
        build_recipe("gptq", weights="none")


def test_recipes_of_yaml() -> None:
    """Without a name it has the file's; a step is of one kind."""
    steps = [{"solver": "gptq"}]
    assert parse_recipe({"scheme": "W4A16", "steps": steps}, "mine.yaml").name == "mine.yaml"
    assert parse_recipe({"name": "own", "scheme": "W4A16", "steps": steps}, "mine.yaml").name == "own"
    for step in ({"solver": "gptq", "correction": "bias"}, {"slover": "gptq"}, "gptq"):
        with pytest.raises(SchemeError, match=r"mine\.yaml: a step names exactly one of train, transform, solver, "):
            parse_recipe({"scheme": "W4A16", "steps": [step]}, "mine.yaml")


def test_effort_changes_the_options_that_quick_names() -> None:
    step = {"solver": "llm-fp4", "rounds": 2, "grid": 90, "quick": {"grid": 12, "fine": 6}}
    recipe = parse_recipe({"name": "x", "scheme": "W4A16", "steps": [step, {"correction": "bias"}]})
    quick, full = recipe.with_effort("quick"), recipe.with_effort("full")
    assert quick.solver.options == {"rounds": 2, "grid": 12, "fine": 6}
    assert full.solver.options == {"rounds": 2, "grid": 90}
    assert not quick.solver.quick and not full.solver.quick  # what a manifest says is what was done
    assert quick.steps[1] == full.steps[1] == recipe.steps[1]
    with pytest.raises(UsageError, match="effort 'fast' is neither quick nor full"):
        recipe.with_effort("fast")
    assert load_recipe("rtn").with_effort("quick") == load_recipe("rtn")
