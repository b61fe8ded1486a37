"""``nybble recipes [NAME]``: the named methods, one of them, or which goes with which format and granularity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli._output import print_json, print_table
from nybble.recipes import REGISTRY, check_recipe_name

if TYPE_CHECKING:
    from nybble.recipe import Recipe


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
    """List the named methods, show one, or the table of legal combinations."""
    if name is not None:
        check_recipe_name(name)
    from nybble.recipe import load_recipe

    if matrix:
        _matrix(name, json)
    elif name is not None:
        _show(load_recipe(name), json)
    else:
        recipes = [load_recipe(each) for each in REGISTRY.all()]
        if json:
            print_json({"recipes": [r.to_dict() for r in recipes]})
        else:
            print_table(
                "recipes",
                ("name", "needs", "what it does", "source"),
                [[r.name, _needs(r), r.summary, r.source] for r in recipes],
            )


def _needs(recipe: Recipe) -> str:
    from nybble.solvers import make_solver

    solver = make_solver(recipe.solver.name, recipe.solver.options)
    rules = recipe.scheme.rules
    found = set().union(*(solver.needs(rule.inputs) for rule in rules))
    if any(rule.inputs is not None and rule.inputs.static for rule in rules) and not solver.chooses_inputs:
        found.add("input ranges")
    return ", ".join(sorted(need.replace("_", " ") for need in found)) or "weights only"


def _show(recipe: Recipe, json: bool) -> None:
    if json:
        print_json(recipe.to_dict())
        return
    import yaml

    print(yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True, width=120).rstrip())


def _matrix(name: str | None, json: bool) -> None:
    from nybble.pipelines.matrix import legal_combinations

    rows = legal_combinations() if name is None else legal_combinations([name])
    if json:
        print_json({"combinations": rows})
        return
    bad = [r for r in rows if r["reason"]]
    print(f"{len(rows)} combinations of recipe, format and granularity; {len(rows) - len(bad)} are legal")
    print_table(
        "impossible ones",
        ("recipe", "format", "granularity", "why"),
        [[r["recipe"], r["format"], r["granularity"], r["reason"]] for r in bad],
    )
