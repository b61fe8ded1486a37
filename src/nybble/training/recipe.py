"""Training recipes: a scheme, a method with its options, and what the loop is told where the user says nothing.

name: llm-qat
summary: what it does, in a line
source: paper, year, arXiv number
method: qat                         # of nybble.training.methods
scheme: W4A8                        # a preset's name or a mapping; --scheme, --weights ... override it
options: {losses: {logits: 1}}      # of the method; --set overrides them
settings: {lr: 2.0e-5}              # of nybble.training.settings; options of the command line override them
data: self                          # a SRC, where none is given; left out: one has to be
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from nybble.core.errors import SchemeError, UsageError, did_you_mean, within
from nybble.core.registry import Registry
from nybble.recipe import parse_yaml, read_yaml
from nybble.recipes.training import REGISTRY, check_training_recipe
from nybble.scheme import Scheme, parse_scheme

METHOD = ("nybble.training.methods", "training method")
KEYS = ("name", "summary", "source", "method", "scheme", "options", "settings", "data")


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """See the module; ``settings`` are as YAML has them."""

    name: str
    method: str
    scheme: Scheme
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""
    source: str = ""
    data: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As YAML holds it; :func:`parse_training_recipe` reads it back."""
        found = {key: getattr(self, key) for key in KEYS if getattr(self, key)}
        return found | {"scheme": self.scheme.to_dict()}

    def settings_with(self, given: Mapping[str, Any]) -> Any:
        """The loop's :class:`~nybble.training.settings.TrainSettings`; of ``given``, None leaves the recipe's.

        Raises:
            UsageError: a setting that there isn't, or a value that it can't have.
        """
        from nybble.training.settings import TrainSettings

        known = [each.name for each in fields(TrainSettings)]
        for key in (*self.settings, *given):
            if key not in known:
                raise UsageError(f"recipe {self.name}: settings has no {key!r}.{did_you_mean(str(key), known)}")
        return TrainSettings(**{**self.settings, **{key: value for key, value in given.items() if value is not None}})


def load_training_recipe(name: str) -> TrainingRecipe:
    """A recipe by name, or from a YAML file when ``name`` ends in .yaml or .yml.

    Raises:
        UsageError: unknown name (with the closest one), or another package's that can't be read.
        SchemeError: the file is no training recipe.
    """
    check_training_recipe(name)
    if name.endswith((".yaml", ".yml")):
        return parse_training_recipe(read_yaml(name, "recipe"), name)
    found = REGISTRY.get(name)
    return parse_training_recipe(parse_yaml(found, name) if isinstance(found, str) else found, name)


def parse_training_recipe(data: Any, where: str = "recipe") -> TrainingRecipe:
    """A recipe from YAML's mapping (module docstring).

    Raises:
        SchemeError: unknown keys, or something missing. UsageError: no such method.
    """
    if not isinstance(data, Mapping):
        raise SchemeError(f"{where}: a training recipe is a mapping with method and scheme; got {data!r}.")
    for key in data:
        if key not in KEYS:
            hint = " Its steps are for nybble quantize." if key == "steps" else did_you_mean(str(key), KEYS)
            raise SchemeError(f"{where}: a training recipe has no key {key!r}.{hint}")
    for key in ("method", "scheme"):
        if not data.get(key):
            raise SchemeError(f"{where}: the training recipe lacks a {key}.")
    for key in ("options", "settings"):
        if not isinstance(data.get(key, {}), Mapping):
            raise SchemeError(f"{where}: {key} is a mapping; got {data[key]!r}.")
    Registry(*METHOD).check(str(data["method"]))
    with within(where):
        scheme = parse_scheme(data["scheme"])
    words = {key: str(data.get(key, "")) for key in ("summary", "source", "data", "method")}
    return TrainingRecipe(
        name=str(data.get("name", where)), scheme=scheme, options=dict(data.get("options", {})),
        settings=dict(data.get("settings", {})), **words,
    )  # fmt: skip


def listed_training_recipes() -> list[TrainingRecipe]:
    """All that nybble carries, and those of other packages."""
    return [load_training_recipe(name) for name in REGISTRY.names()]
