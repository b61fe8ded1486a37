"""From a recipe to the steps of its walk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nybble.core.errors import SchemeError, within
from nybble.corrections import make_correction
from nybble.models.adapter import Adapter
from nybble.recipe import Recipe, Step, trained
from nybble.reconstruction import make_reconstruction
from nybble.solvers import make_solver
from nybble.training.steps import Finish, Preparation, make_train_step
from nybble.transforms import make_transform
from nybble.walk.steps import BlockStep
from nybble.walk.steps.correction import CorrectionStep
from nybble.walk.steps.reconstruction import ReconstructionStep
from nybble.walk.steps.solver import SolverStep
from nybble.walk.steps.transform import TransformStep


def make_steps(recipe: Recipe, adapter: Adapter) -> tuple[tuple[BlockStep, ...], frozenset[str]]:
    """The steps of a recipe's walk in order, and the streams that they read; training is over before a walk begins.

    Transforms and corrections look at the float path where there is one, else at the quantized.

    Raises:
        UsageError, SchemeError: an unknown part or option; windows of different sizes.
    """
    solver = make_solver(recipe.solver.name, recipe.solver.options)
    learned = [
        ReconstructionStep(step.name, make_reconstruction(step.name, step.options), solver)
        for step in recipe.steps
        if step.kind == "reconstruction"
    ]
    _check_windows(recipe, learned)
    paths = solver.paths.union(*(step.paths for step in learned))
    path = "float" if "float" in paths else "quantized"
    found: list[BlockStep] = []
    left = iter(learned)
    later = any(step.kind in ("reconstruction", "correction") for step in recipe.steps)
    for step in recipe.steps:
        if step.kind == "transform":
            found.append(TransformStep(step.name, make_transform(step.name, step.options), adapter, path))
        elif step.kind == "solver":
            found.append(SolverStep(step.name, solver, later, recipe.scheme.together))
        elif step.kind == "reconstruction":
            found.append(next(left))
        elif step.kind == "correction":
            found.append(CorrectionStep(step.name, make_correction(step.name, step.options), path))
    return tuple(found), paths


def make_preparations(recipe: Recipe) -> list[Preparation]:
    """The training steps in front of a recipe's others that are not turned off.

    Raises:
        UsageError, SchemeError: an unknown step or option; one that comes last.
    """
    said = "works on the quantized model; put it last, behind the solver (name one: rtn)."
    return _trainings(recipe, trained(recipe)[0], Preparation, said)


def make_finishes(recipe: Recipe) -> list[Finish]:
    """The training steps behind all others that are not turned off.

    Raises:
        UsageError, SchemeError: an unknown step or option; one that comes first.
    """
    said = "makes other float weights, which the other steps quantize; put it first."
    return _trainings(recipe, trained(recipe)[1], Finish, said)


def _trainings(recipe: Recipe, steps: Sequence[Step], place: type, said: str) -> list[Any]:
    found = []
    for step in steps:
        made = make_train_step(step.name, step.options)
        if not isinstance(made, place):
            raise SchemeError(f"recipe {recipe.name}: train {step.name!r} {said}")
        found.append(made)
    return [step for step in found if not step.idle]


def check_quick(recipe: Recipe) -> None:
    """Make the parts of every step that has a quick way as quick makes them, so that its options are known to be right.

    Raises:
        UsageError, SchemeError: an unknown option, or a value that the part refuses.
    """
    for step in recipe.steps:
        if step.quick:
            with within(f"quick of {step.name}"):
                _MAKE[step.kind](step.name, {**step.options, **step.quick})


_MAKE: dict[str, Callable[[str, Mapping[str, Any]], Any]] = {
    "train": make_train_step,
    "transform": make_transform,
    "solver": make_solver,
    "reconstruction": make_reconstruction,
    "correction": make_correction,
}


def _check_windows(recipe: Recipe, learned: Sequence[ReconstructionStep]) -> None:
    numbers = [number for number, step in enumerate(recipe.steps, 1) if step.kind == "reconstruction"]
    sizes = {(step.window, step.overlap): number for number, step in zip(numbers, learned, strict=True)}
    if len(sizes) > 1:
        found = ", ".join(
            f"step {number} has window {window} with overlap {overlap}" for (window, overlap), number in sizes.items()
        )
        raise SchemeError(f"reconstructions with different windows: {found}; give all of a recipe the same.")
