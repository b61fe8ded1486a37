"""Search recipes: how layers are measured, and how formats are chosen; or how an architecture is found.

name: hawq
summary: what it does, in a line
source: paper, year, arXiv number
sensitivity: {hessian-trace: {probes: 50}}   # of nybble.search.sensitivities, a name or {name: {option: value}}
loop: ilp                                    # of nybble.search.loops

or of a search in training, whose losses are those of the network:

loop: {policy: {entropy: 0.05}}              # what the callback policy has as its options
training: {options: {losses: {task: 1}}, settings: {lr: 1.0e-3}}     # of the method qat, and of the loop

or of an architecture:

architecture: {vit-slim: {mlp: 5.0e-5}}      # of nybble.search.architectures
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

from nybble.core.errors import SchemeError, UsageError, did_you_mean, within
from nybble.core.options import build
from nybble.recipe import parse_yaml, read_yaml
from nybble.recipes.search import REGISTRY, check_search_recipe
from nybble.search.architectures import Architecture
from nybble.search.loops import Loop
from nybble.search.sensitivities import Sensitivity

FORMATS, ARCHITECTURE = ("sensitivity", "loop"), ("architecture",)
"""Keys of the parts that a recipe is made of: of one kind, or the other."""
WORDS = ("name", "summary", "source")


@dataclass(frozen=True, kw_only=True)
class SearchRecipe:
    """What both kinds have; see the module."""

    name: str
    summary: str = ""
    source: str = ""

    @property
    def parts(self) -> dict[str, Any]:
        """What it is made of, by key."""
        found = {key: vars(self).get(key) for key in (*FORMATS, *ARCHITECTURE)}
        return {key: part for key, part in found.items() if part is not None}

    def to_dict(self) -> dict[str, Any]:
        """As YAML holds it, with every option; :func:`parse_search_recipe` reads it back."""
        made = {key: {part.registry.key_of(part): asdict(part)} for key, part in self.parts.items()}
        return {word: getattr(self, word) for word in WORDS} | made


@dataclass(frozen=True, kw_only=True)
class FormatRecipe(SearchRecipe):
    """Which format each layer gets; with ``training``, while the network trains."""

    loop: Loop
    sensitivity: Sensitivity | None = None
    training: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As of both kinds, with what the training takes."""
        return super().to_dict() | ({} if self.training is None else {"training": dict(self.training)})


@dataclass(frozen=True, kw_only=True)
class ArchitectureRecipe(SearchRecipe):
    """Which architecture a network gets."""

    architecture: Architecture

    def changed(self, options: Mapping[str, Any]) -> ArchitectureRecipe:
        """With options over the recipe's; ``{"retrain.steps": 10}`` changes one of those that are options in turn.

        Raises:
            SchemeError: no such option, or a value that it can't have.
        """
        registry = self.architecture.registry
        key, given = registry.key_of(self.architecture), asdict(self.architecture)
        for name, value in options.items():
            place: Any = given
            *path, last = name.split(".")
            for word in path:
                place = place.get(word) if isinstance(place, dict) else None
            if not isinstance(place, dict) or (path and last not in place):
                hint = did_you_mean(name, _dotted(given))
                raise SchemeError(f"{registry.kind} {key!r} has no option {name!r}.{hint}")
            place[last] = deepcopy(value)  # a later option may reach within it
        where = f"{registry.kind} {key!r}"
        return replace(self, architecture=build(type(self.architecture), given, where))


def _dotted(options: Mapping[str, Any], before: str = "") -> list[str]:
    """Names of options and of those within, as ``retrain.steps``."""
    found = []
    for name, value in options.items():
        found += [before + name, *(_dotted(value, f"{before}{name}.") if isinstance(value, dict) else ())]
    return found


def format_recipe(name: str) -> FormatRecipe:
    """A recipe that chooses formats; errors as of :func:`load_search_recipe`.

    Raises:
        UsageError: it searches an architecture.
    """
    found = load_search_recipe(name)
    if not isinstance(found, FormatRecipe):
        raise UsageError(
            f"method {name!r} searches an architecture: nybble.pipelines.search_architecture, or the command, runs it."
        )
    return found


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
    found = "architecture" in data
    kind, keys = (
        (ArchitectureRecipe, (*WORDS, *ARCHITECTURE)) if found else (FormatRecipe, (*WORDS, *FORMATS, "training"))
    )
    for key in data:
        if key not in keys:
            raise SchemeError(f"{where}: a search recipe has no key {key!r}.{did_you_mean(str(key), keys)}")
    for key in ARCHITECTURE if found else ("loop",) if "training" in data else FORMATS:
        if not data.get(key):
            raise SchemeError(f"{where}: the search recipe lacks a {key}.")
    _check_training(data, where)
    with within(where):
        made: SearchRecipe = build(kind, {"name": where, **data}, "search recipe")
    return made


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
