"""``nybble recipes [NAME]``: the named methods, one of them, or which goes with which format and granularity."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli._output import print_json, print_table
from nybble.recipes import BEST, REGISTRY, check_recipe_name, recipe_for, targets
from nybble.recipes.search import REGISTRY as SEARCH
from nybble.recipes.training import REGISTRY as TRAINING

if TYPE_CHECKING:
    from nybble.recipe import Recipe
    from nybble.search.recipe import SearchRecipe
    from nybble.training.recipe import TrainingRecipe


def command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A recipe, or a YAML file.")] = None,
    matrix: Annotated[
        bool,
        typer.Option(
            "--matrix", help="Recipes (or the one) x formats x granularities, with reasons where one is impossible."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """List the named methods (of nybble quantize, train and search), show one, or the table of legal combinations."""
    if name is not None and (matrix or (name not in TRAINING and name not in SEARCH)):
        check_recipe_name(name)
    from nybble.recipe import listed_recipes, load_recipe
    from nybble.training.recipe import listed_training_recipes, load_training_recipe

    if matrix:
        _matrix(name, json)
    elif name is not None:
        taker = _command(name)
        if taker == "search":
            from nybble.search.recipe import load_search_recipe  # torch comes with what it is made of

            _show(load_search_recipe(name), json)
        else:
            _show(load_training_recipe(name) if taker == "train" else load_recipe(name), json)
    else:
        from nybble.search.recipe import listed_search_recipes

        _list(listed_recipes(), listed_training_recipes(), listed_search_recipes(), json)


def _command(name: str) -> str:
    """Which command takes a recipe; a file says it by its keys."""
    if not name.endswith((".yaml", ".yml")):
        return "quantize" if name in REGISTRY else "train" if name in TRAINING else "search"
    from nybble.recipe import read_yaml

    found = read_yaml(name, "recipe")
    keys = found if isinstance(found, Mapping) else {}
    return "train" if "method" in keys else "search" if {"sensitivity", "architecture"} & keys.keys() else "quantize"


def _list(
    recipes: Sequence[Recipe], training: Sequence[TrainingRecipe], searches: Sequence[SearchRecipe], json: bool
) -> None:
    """All of them, and first the one that is a name for others: what is taken where no recipe is named."""
    usual, members = recipe_for(BEST), {target: recipe_for(BEST, target) for target in targets()}
    best = next(recipe for recipe in recipes if recipe.name == usual)
    if json:
        first = {**best.to_dict(), "name": BEST, "same_as": usual, "targets": members}
        print_json(
            {
                "recipes": [first, *(recipe.to_dict() for recipe in recipes)],
                "training": [recipe.to_dict() for recipe in training],
                "search": [recipe.to_dict() for recipe in searches],
            }
        )
        return
    others = ", ".join(target for target, name in members.items() if name != usual)
    what = f"{usual}, which `nybble quantize` takes where no recipe is named; with --target {others}: that one's."
    rows = [[r.name, _needs(r), r.summary, r.source] for r in recipes]
    print_table(
        "recipes",
        ("name", "needs", "what it does", "source"),
        [[BEST, _needs(best), what, "chosen by measurement (docs/log.md)"], *rows],
    )
    print_table(
        "trained by nybble train",
        ("name", "trains on", "what it does", "source"),
        [[r.name, r.data or "--data SRC", r.summary, r.source] for r in training],
    )
    print_table(
        "methods of nybble search",
        ("name", "chooses", "what it does", "source"),
        [
            [r.name, "an architecture" if "architecture" in r.parts else "formats", r.summary, r.source]
            for r in searches
        ],
    )


def _needs(recipe: Recipe) -> str:
    from nybble.solvers import make_solver

    solver = make_solver(recipe.solver.name, recipe.solver.options)
    rules = recipe.scheme.rules
    found = set().union(*(solver.needs(rule.inputs) for rule in rules))
    if any(rule.inputs is not None and rule.inputs.static for rule in rules) and not solver.chooses_inputs:
        found.add("input ranges")
    return ", ".join(sorted(need.replace("_", " ") for need in found)) or "weights only"


def _show(recipe: Recipe | TrainingRecipe | SearchRecipe, json: bool) -> None:
    if json:
        print_json(recipe.to_dict())
        return
    import yaml

    print(yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True, width=120).rstrip())


def _matrix(name: str | None, json: bool) -> None:
    from nybble.core.progress import Bars
    from nybble.pipelines.matrix import legal_combinations

    rows = legal_combinations(None if name is None else [name], progress=Bars())
    if json:
        print_json({"combinations": rows})
        return
    bad = [r for r in rows if r["reason"]]
    print(f"{len(rows)} combinations of recipe, format and granularity; {len(rows) - len(bad)} are legal")
    every = {key: sorted({r[key] for r in rows}) for key in ("granularity", "format", "recipe")}
    print_table(
        "impossible ones (--json lists each)",
        ("granularities", "formats", "recipes", "why"),
        [
            [*(listed(names, every[key]) for key, names in zip(every, group[:3], strict=True)), group[3]]
            for group in grouped(bad)
        ],
    )


def grouped(rows: list[dict[str, Any]]) -> list[tuple[Sequence[str], Sequence[str], Sequence[str], str]]:
    """Granularities, formats and recipes that share a reason; in the reason the first two are only called that."""
    formats: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        why = re.sub(rf"(?<![\w.]){re.escape(row['format'])}(?!\w)", "FORMAT", row["reason"])
        why = why.replace(f"FORMAT {row['granularity']}", "FORMAT GRANULARITY")
        formats.setdefault((row["granularity"], row["recipe"], why), []).append(row["format"])
    recipes: dict[tuple[str, tuple[str, ...], str], list[str]] = {}
    for (granularity, recipe, why), names in formats.items():
        recipes.setdefault((granularity, tuple(names), why), []).append(recipe)
    found: dict[tuple[tuple[str, ...], tuple[str, ...], str], list[str]] = {}
    for (granularity, taken, why), who in recipes.items():
        found.setdefault((taken, tuple(who), why), []).append(granularity)
    return [(at, taken, who, why) for (taken, who, why), at in found.items()]


def listed(names: Sequence[str], every: Sequence[str]) -> str:
    """A few names, and how many more; or that it is all of them."""
    if len(names) == len(every):
        return "all"
    more = len(names) - 6
    return ", ".join(names[:6]) + (f" and {more} more" if more > 0 else "")
