"""Which recipe takes which format at which granularity, found by trying each on a small weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nybble.core.errors import NybbleError
from nybble.formats import format_names
from nybble.granularity import REGISTRY
from nybble.quantizer import Quantizer
from nybble.recipe import load_recipe, recipe_names
from nybble.solvers import Stats, Weight, make_solver

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
        step = load_recipe(recipe_name).solver
        solver = make_solver(step.name, step.options).trial()
        for name in format_names() if formats is None else formats:
            for granularity in GRANULARITIES:
                rows.append(
                    {
                        "recipe": recipe_name,
                        "format": name,
                        "granularity": granularity,
                        "reason": _try(solver, name, granularity, matrix, stats),
                    }
                )
    return rows


def _try(solver: Any, name: str, granularity: str, matrix: torch.Tensor, stats: Stats) -> str:
    try:
        quantizer = Quantizer(f"{name} {granularity}")
        solver.quantizer_for(quantizer)
        if not quantizer.format.signed:
            quantizer = (
                quantizer.replace(symmetric=False)
                if quantizer.format.is_integer
                else quantizer.replace(scale="minmax(offset=true)")
            )
        solver.solve([Weight(name="weight", matrix=matrix, quantizer=quantizer)], stats)
    except NybbleError as error:
        return str(error)
    return ""
