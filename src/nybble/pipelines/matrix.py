"""Which recipe takes which format at which granularity: its learned parts asked, its solver tried on a small weight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from nybble.core.errors import NybbleError
from nybble.core.progress import Progress, Silent, task
from nybble.formats import format_names
from nybble.granularity import REGISTRY
from nybble.learned import Part
from nybble.quantizer import Quantizer
from nybble.recipe import load_recipe, recipe_names
from nybble.reconstruction import make_reconstruction
from nybble.solvers import Solver, Stats, Weight, make_solver

GRANULARITIES: list[str] = [part.example for part in REGISTRY.all().values()]


def legal_combinations(
    recipes: Sequence[str] | None = None, formats: Sequence[str] | None = None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Rows of recipe, format, granularity (its example) and reason (empty where it works).

    Args:
        recipes: names or files; None for all named ones.
        formats: names; None for all listed ones.
        progress: told after each recipe and format.
    """
    recipes, formats = (recipe_names() if recipes is None else recipes), formats or format_names()
    rows, trials = [], Trials()
    with task(progress or Silent(), len(recipes) * len(formats), "recipes x formats") as bar:
        for recipe_name in recipes:
            recipe = load_recipe(recipe_name)
            solver = make_solver(recipe.solver.name, recipe.solver.options)
            engines = [make_reconstruction(s.name, s.options) for s in recipe.steps if s.kind == "reconstruction"]
            parts = [engine.weights for engine in engines if engine.weights is not None]
            for name in formats:
                for granularity in GRANULARITIES:
                    reason = trials.reason(solver, parts, name, granularity)
                    rows.append({"recipe": recipe_name, "format": name, "granularity": granularity, "reason": reason})
                bar.advance(note=recipe_name)
    return rows


@cache
def quantizer_of(name: str, granularity: str) -> Quantizer:
    """A format at a granularity; of one without negative values, with what lets it hold weights."""
    quantizer = Quantizer(f"{name} {granularity}")
    if quantizer.format.signed:
        return quantizer
    more = {"symmetric": False} if quantizer.format.is_integer else {"scale": "minmax(offset=true)"}
    return quantizer.replace(**more)


class Trials:
    """Solvers tried on a small weight: many recipes have the same one, which is asked once."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._matrix = torch.randn(8, 32, generator=generator, dtype=torch.float32)
        inputs = torch.randn(64, 32, generator=generator, dtype=torch.float32)
        self._stats = Stats(second_moment=inputs.T @ inputs / 64, inputs=inputs)
        self._known: dict[tuple[str, Quantizer], str] = {}

    def reason(self, solver: Solver, parts: Sequence[Part], name: str, granularity: str) -> str:
        """Why a format at a granularity can't be; empty where it can.

        Args:
            solver: of the recipe.
            parts: what it learns weights with.
            name: of the format.
            granularity: a spelling that fits a matrix [8, 32].
        """
        try:
            solver.quantizer_for(Quantizer(f"{name} {granularity}"))
            quantizer = quantizer_of(name, granularity)
            chosen = solver.quantizer_for(quantizer)
            for part in parts:
                part.check(chosen)
        except NybbleError as error:
            return str(error)
        trial = solver.trial()
        key = (repr(trial), quantizer)
        if key not in self._known:
            self._known[key] = self._solved(trial, quantizer)
        return self._known[key]

    def _solved(self, solver: Solver, quantizer: Quantizer) -> str:
        try:
            solver.solve([Weight(name="weight", matrix=self._matrix, quantizer=quantizer)], self._stats)
        except NybbleError as error:
            return str(error)
        return ""
