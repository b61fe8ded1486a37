"""What ``--target`` and ``--form`` of ``nybble quantize`` mean; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nybble.checkpoint.marked import COMPRESSED, NATIVE
from nybble.core.errors import UsageError, did_you_mean
from nybble.export import REGISTRY, get_target, is_target
from nybble.recipes import BEST, recipe_for, targets

AUTO = "auto"
FORMS = (AUTO, COMPRESSED, NATIVE)
"""Of the files: compressed-tensors', which others load without nybble; nybble's own, which holds everything; or the
first where it says all of the result."""


def check_form_name(form: str) -> None:
    """Raise UsageError unless there is such a form."""
    if form not in FORMS:
        raise UsageError(f"unknown form {form!r}.{did_you_mean(str(form), FORMS)}")


def split_targets(target: str | Sequence[str] | None) -> tuple[str | None, list[str]]:
    """What ``best`` is to come to, and who is to load the result: names of the two never meet.

    Args:
        target: one name, several, or none: of a best recipe's target (``w4a16``), of export targets
            (``compressed-tensors``, ``dense:float16``).

    Raises:
        UsageError: a name of neither, with the closest; two of the first kind.

    >>> split_targets(["W4A16", "dense:float16"])
    ('W4A16', ['dense:float16'])
    """
    given = [target] if isinstance(target, str) else list(target or ())
    files = [name for name in given if is_target(name)]
    aims = [name for name in given if name not in files]
    for name in aims:
        if name.lower() not in targets():
            known = [*targets(), *REGISTRY.names()]
            raise UsageError(f"unknown target {name!r}.{did_you_mean(name.lower(), known)}")
    if len(aims) > 1:
        raise UsageError(f"two targets for the recipe best: {', '.join(aims)}. Keep one.")
    return (aims[0] if aims else None), files


CHOSEN = ("scheme", "weights", "activations")
"""Changes that say what layers are to become; where one is given, a target chooses nothing by itself."""


@dataclass(frozen=True, kw_only=True)
class Meant:
    """What a recipe and targets come to together.

    Attributes:
        recipe: as it was given; of ``best`` the family's member.
        files: names of export targets, with their options.
        weights: a quantizer line in place of the recipe's weights; None leaves the scheme to the recipe.
    """

    recipe: Any
    files: tuple[str, ...]
    weights: str | None = None


def meant(recipe: Any, changes: Mapping[str, Any]) -> Meant:
    """What is asked for; where neither a recipe nor a scheme is named, what the first export target usually gets.

    Args:
        recipe: a name, or what else a recipe may be given as.
        changes: arguments of :func:`nybble.pipelines.request.build_recipe`, of which ``target`` and :data:`CHOSEN` are
            looked at.

    Raises:
        UsageError: unknown targets, or one that doesn't go with the recipe.
    """
    aim, files = split_targets(changes.get("target"))
    if aim is not None:
        name = recipe if isinstance(recipe, str) else type(recipe).__name__
        return Meant(recipe=recipe_for(name, aim), files=tuple(files))
    if recipe != BEST or not files or any(changes.get(name) is not None for name in CHOSEN):
        return Meant(recipe=recipe, files=tuple(files))
    usual = get_target(files[0]).usual
    first = files[0] if ":" in files[0] or not usual.option else f"{files[0]}:{usual.option}"
    return Meant(recipe=recipe_for(BEST, usual.best), files=(first, *files[1:]), weights=usual.weights or None)
