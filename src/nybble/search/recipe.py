"""Search recipes: how layers are measured, and how formats are chosen.

name: hawq
summary: what it does, in a line
source: paper, year, arXiv number
sensitivity: {hessian-trace: {probes: 50}}   # of nybble.search.sensitivities, a name or {name: {option: value}}
loop: ilp                                    # of nybble.search.loops

or of a search in training, whose losses are those of the network:

loop: {policy: {entropy: 0.05}}              # what the callback policy has as its options
training: {options: {losses: {task: 1}}, settings: {lr: 1.0e-3}}     # of the method qat, and of the loop
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nybble.core.errors import SchemeError, did_you_mean, within
from nybble.core.options import build
from nybble.recipe import parse_yaml, read_yaml
from nybble.recipes.search import REGISTRY, check_search_recipe
from nybble.search.loops import Loop
from nybble.search.sensitivities import Sensitivity

KEYS = ("name", "summary", "source", "sensitivity", "loop", "training")


@dataclass(frozen=True, kw_only=True)
class SearchRecipe:
    """See the module."""

    name: str
    loop: Loop
    sensitivity: Sensitivity | None = None
    training: Mapping[str, Any] | None = None
    summary: str = ""
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As YAML holds it, with every option; :func:`parse_search_recipe` reads it back."""
        parts: dict[str, Any] = {"sensitivity": self.sensitivity, "loop": self.loop}
        made = {key: {p.registry.key_of(p): dict(vars(p))} for key, p in parts.items() if p is not None}
        training = {} if self.training is None else {"training": dict(self.training)}
        return {"name": self.name, "summary": self.summary, "source": self.source, **made, **training}


def load_search_recipe(name: str) -> SearchRecipe:
    """A recipe by name, or from a YAML file when ``name`` ends in .yaml or .yml.

    Raises:
        UsageError: unknown name (with the closest one). SchemeError: it is no search recipe.
    """
    check_search_recipe(name)
    if name.endswith((".yaml", ".yml")):
        return parse_search_recipe(read_yaml(name, "recipe"), name)
    found = REGISTRY.get(name)
    return parse_search_recipe(parse_yaml(found, name) if isinstance(found, str) else found, name)


def parse_search_recipe(data: Any, where: str = "recipe") -> SearchRecipe:
    """A recipe from YAML's mapping (module docstring).

    Raises:
        SchemeError: unknown keys, something missing, a wrong option. UsageError: no such part.
    """
    if not isinstance(data, Mapping):
        raise SchemeError(f"{where}: a search recipe is a mapping with sensitivity and loop; got {data!r}.")
    for key in data:
        if key not in KEYS:
            raise SchemeError(f"{where}: a search recipe has no key {key!r}.{did_you_mean(str(key), KEYS)}")
    for key in ("loop",) if "training" in data else ("sensitivity", "loop"):
        if not data.get(key):
            raise SchemeError(f"{where}: the search recipe lacks a {key}.")
    _check_training(data, where)
    with within(where):
        return build(SearchRecipe, {"name": where, **data}, "search recipe")


def _check_training(data: Mapping[str, Any], where: str) -> None:
    """A policy trains, and takes the losses of the training."""
    training = data.get("training")
    if training is None and "training" not in data:
        return
    if data.get("sensitivity"):
        raise SchemeError(f"{where}: a search in training measures no sensitivity; leave one of both out.")
    parts = training if isinstance(training, Mapping) else {"": None}
    for key, given in parts.items():
        if key not in ("options", "settings") or not isinstance(given, Mapping):
            raise SchemeError(f"{where}: training has mappings of options and settings; got {training!r}.")


def listed_search_recipes() -> list[SearchRecipe]:
    """All that nybble carries, and those of other packages."""
    return [load_search_recipe(name) for name in REGISTRY.names()]
