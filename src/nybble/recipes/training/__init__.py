"""The named recipes of ``nybble train``: a YAML file each, and those of other packages (``nybble.recipes.training``).

Nothing is parsed here: :func:`nybble.training.recipe.load_training_recipe` does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nybble.core.errors import UsageError
from nybble.recipes import REGISTRY as POST_TRAINING
from nybble.recipes import Recipes

SELF = "self"
"""The SRC that stands for texts that the model makes itself."""
REGISTRY = Recipes("nybble.recipes.training", "training recipe", lambda part: isinstance(part, str | Mapping))


def check_training_recipe(name: str) -> None:
    """Refuse a name that there isn't, without reading any recipe.

    Raises:
        UsageError: with the closest name; or a recipe that ``nybble quantize`` runs; a file that isn't there.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UsageError(f"no recipe file {name}.")
        return
    if name not in REGISTRY and name in POST_TRAINING:
        raise UsageError(f"recipe {name!r} doesn't train by itself: nybble quantize MODEL OUT --recipe {name}.")
    REGISTRY.check(name)
