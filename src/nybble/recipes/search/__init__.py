"""The named searches of ``nybble search``: a YAML file each, and those of other packages (``nybble.recipes.search``).

Nothing is parsed here: :func:`nybble.search.recipe.load_search_recipe` does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nybble.core.errors import UsageError
from nybble.recipes import Recipes

REGISTRY = Recipes("nybble.recipes.search", "search recipe", lambda part: isinstance(part, str | Mapping))


def check_search_recipe(name: str) -> None:
    """Refuse a name that there isn't, without reading any recipe; a file that isn't there.

    Raises:
        UsageError: with the closest name.
    """
    if not name.endswith((".yaml", ".yml")):
        REGISTRY.check(name)
    elif not Path(name).is_file():
        raise UsageError(f"no recipe file {name}.")
