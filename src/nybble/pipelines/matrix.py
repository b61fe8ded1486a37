"""Which recipe takes which format at which granularity: its learned parts asked, its solver tried on a small weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nybble.core.errors import NybbleError
from nybble.formats import format_names
from nybble.granularity import REGISTRY
from nybble.learned import Part
from nybble.quantizer import Quantizer
from nybble.recipe import load_recipe, recipe_names
from nybble.reconstruction import make_reconstruction
from nybble.solvers import Solver, Stats, Weight, make_solver

GRANULARITIES: list[str] = [part.example for part in REGISTRY.all().values()]


def legal_combinations(
    recipes: Sequence[str] | None = None, formats: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Rows of recipe, format, granularity (its example) and reason (empty where it works).

    Args:
        recipes: names or files; None for all named ones.
        formats: names; None for all listed ones.
    """
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(8, 32, generator=generator, dtype=torch.float32)
    inputs = torch.randn(64, 32, generator=generator, dtype=torch.float32)
    stats = Stats(second_moment=inputs.T @ inputs / 64, inputs=inputs)
    rows = []
    for recipe_name in recipe_names() if recipes is None else recipes:
        recipe = load_recipe(recipe_name)
        solver = make_solver(recipe.solver.name, recipe.solver.options).trial()
        engines = [make_reconstruction(s.name, s.options) for s in recipe.steps if s.kind == "reconstruction"]
        parts = [engine.weights for engine in engines if engine.weights is not None]
        for name in format_names() if formats is None else formats:
            for granularity in GRANULARITIES:
                rows.append(
                    {
                        "recipe": recipe_name,
                        "format": name,
                        "granularity": granularity,
                        "reason": _try(solver, parts, name, granularity, matrix, stats),
                    }
                )
    return rows


def quantizer_of(name: str, granularity: str) -> Quantizer:
    """A format at a granularity; of one without negative values, with what lets it hold weights."""
    quantizer = Quantizer(f"{name} {granularity}")
    if quantizer.format.signed:
        return quantizer
    more = {"symmetric": False} if quantizer.format.is_integer else {"scale": "minmax(offset=true)"}
    return quantizer.replace(**more)


def _try(solver: Solver, parts: Sequence[Part], name: str, granularity: str, matrix: torch.Tensor, stats: Stats) -> str:
    try:
        solver.quantizer_for(Quantizer(f"{name} {granularity}"))
        quantizer = quantizer_of(name, granularity)
        for part in parts:
            part.check(solver.quantizer_for(quantizer))
        solver.solve([Weight(name="weight", matrix=matrix, quantizer=quantizer)], stats)
    except NybbleError as error:
        return str(error)
    return ""
