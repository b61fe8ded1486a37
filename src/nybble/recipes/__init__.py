"""The named recipes: a YAML file each, and those of other packages (entry points of the group ``nybble.recipes``).

An entry point names a package with a file NAME.yaml in it, or something in a module: YAML's mapping, or its text.
Nothing is parsed here: :func:`nybble.recipe.load_recipe` does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

from nybble.core.errors import UsageError, did_you_mean
from nybble.core.registry import Registry


class Recipes(Registry):
    """Whose parts are YAML's text or mapping."""

    def own(self) -> dict[str, str]:
        """Key -> file name."""
        files = [entry.name for entry in resources.files(self.package).iterdir() if entry.name.endswith(".yaml")]
        return {name.removesuffix(".yaml"): name for name in files}

    def read(self, source: str) -> str:
        """A file's text."""
        return resources.files(self.package).joinpath(source).read_text(encoding="utf-8")

    def taken(self, name: str, found: Any) -> Any:
        """A mapping or text as it is; of a package, its file NAME.yaml."""
        if isinstance(found, ModuleType):
            if not hasattr(found, "__path__"):
                raise UsageError(
                    f"{found.__name__} is a module; name a package with {name}.yaml in it, or MODULE:NAME."
                )
            files = [resources.files(found).joinpath(f"{word}.yaml") for word in spellings(name)]
            return next((file for file in files if file.is_file()), files[0]).read_text(encoding="utf-8")
        return super().taken(name, found)


def spellings(name: str) -> tuple[str, str, str]:
    """A name as it is, and with dashes or underscores throughout: which of them doesn't matter."""
    return name, name.replace("_", "-"), name.replace("-", "_")


REGISTRY = Recipes("nybble.recipes", "recipe", lambda part: isinstance(part, str | Mapping))


BEST, USUAL = "best", "w4a16"
"""``best`` is a family of recipes, ``best-TARGET``; the target that is meant where none is named."""


def targets() -> list[str]:
    """What there is a best recipe for."""
    return [name.removeprefix(f"{BEST}-") for name in REGISTRY.names() if name.startswith(f"{BEST}-")]


def recipe_for(name: str, target: str | None = None) -> str:
    """The recipe's own name: of ``best`` the one for a target, in any case (``NVFP4``).

    Raises:
        UsageError: an unknown target (with the closest one), or one for another recipe.
    """
    if target is not None and name != BEST:
        raise UsageError(f"target {target!r} goes with the recipe {BEST!r}; {name!r} has its own scheme (--scheme).")
    if name != BEST:
        return name
    found = (target or USUAL).lower()
    if found not in targets():
        raise UsageError(f"unknown target {target!r}.{did_you_mean(found, targets())}")
    return f"{BEST}-{found}"


def check_recipe_name(name: str) -> None:
    """Refuse a name that there isn't, without reading any recipe; a YAML file that isn't there.

    Raises:
        UsageError: with the closest name; or a recipe that ``nybble train`` runs.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UsageError(f"no recipe file {name}.")
    elif name not in REGISTRY:
        from nybble.recipes.training import REGISTRY as TRAINING  # which looks here for the same reason

        if name in TRAINING:
            raise UsageError(f"recipe {name!r} trains: nybble train {name} MODEL OUT.")
        names = REGISTRY.names()
        raise UsageError(f"unknown recipe {name!r}.{did_you_mean(name, names)} `nybble recipes` lists them.")
