"""Recipe: a scheme and an ordered list of steps, as YAML. A published method is a recipe in ``nybble/recipes/``.

name: llm-fp4
summary: what it does, in a line
source: paper, year, arXiv number
scheme: W4A16_E2M1                  # a preset's name or a mapping; --scheme and --weights override it
steps:                              # transforms in order, then one solver
  - transform: smooth
  - solver: llm-fp4
    rounds: 3                       # an option of the step
    quick: {grid: 12}               # options that --effort quick changes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from nybble.core.errors import SchemeError, UsageError, did_you_mean, within
from nybble.scheme import Scheme, parse_scheme

KINDS = ("transform", "solver")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: its kind, the part's key, the part's options, and those that ``--effort quick`` changes."""

    kind: str
    name: str
    options: Mapping[str, Any]
    quick: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As YAML holds it."""
        return {self.kind: self.name, **self.options, **({"quick": dict(self.quick)} if self.quick else {})}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named method: steps over a scheme."""

    name: str
    scheme: Scheme
    steps: tuple[Step, ...]
    summary: str = ""
    source: str = ""

    @property
    def solver(self) -> Step:
        """The step that quantizes."""
        return self.steps[-1]

    @property
    def transforms(self) -> tuple[Step, ...]:
        """The steps before it."""
        return self.steps[:-1]

    def with_scheme(self, scheme: Scheme) -> Recipe:
        """The same steps over another scheme."""
        return replace(self, scheme=scheme)

    def with_effort(self, effort: str) -> Recipe:
        """The recipe as ``quick`` or ``full`` work.

        Raises:
            UsageError: another word, or quick where no step has a quick way.
        """
        if effort not in ("quick", "full"):
            raise UsageError(f"effort {effort!r} is neither quick nor full.")
        if effort == "quick" and not any(step.quick for step in self.steps):
            raise UsageError(f"recipe {self.name!r} searches nothing, so it has no quick way; leave --effort out.")
        changes = [step.quick if effort == "quick" else {} for step in self.steps]
        steps = [replace(s, options={**s.options, **c}, quick={}) for s, c in zip(self.steps, changes, strict=True)]
        return replace(self, steps=tuple(steps))

    def to_dict(self) -> dict[str, Any]:
        """As YAML holds it; :func:`parse_recipe` reads it back."""
        steps = [step.to_dict() for step in self.steps]
        return {
            "name": self.name,
            "summary": self.summary,
            "source": self.source,
            "scheme": self.scheme.to_dict(),
            "steps": steps,
        }


def recipe_names() -> list[str]:
    """Names of the recipes that nybble carries."""
    folder = resources.files("nybble.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a YAML file when ``name`` ends in .yaml or .yml.

    Raises:
        UsageError: unknown name (with the closest one). SchemeError: the file is not a recipe.
    """
    if name.endswith((".yaml", ".yml")):
        return parse_recipe(read_yaml(name, "recipe"), name)
    if name not in recipe_names():
        raise UsageError(f"unknown recipe {name!r}.{did_you_mean(name, recipe_names())} `nybble recipes` lists them.")
    text = resources.files("nybble.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return parse_recipe(_yaml(text, name), name)


def parse_recipe(data: Any, where: str = "recipe") -> Recipe:
    """A recipe from YAML's mapping (module docstring).

    Raises:
        SchemeError: unknown keys or step kinds, or something missing.
    """
    if not isinstance(data, Mapping):
        raise SchemeError(f"{where}: a recipe is a mapping with scheme and steps; got {type(data).__name__}.")
    known = ("name", "summary", "source", "scheme", "steps")
    for key in data:
        if key not in known:
            raise SchemeError(f"{where}: a recipe has no key {key!r}.{did_you_mean(str(key), known)}")
    missing = [key for key in ("scheme", "steps") if not data.get(key)]
    if missing:
        raise SchemeError(f"{where}: the recipe lacks {' and '.join(missing)}.")
    if not isinstance(data["steps"], list):
        raise SchemeError(f"{where}: steps is a list of mappings; got {data['steps']!r}.")
    steps = tuple(_step(step, where) for step in data["steps"])
    kinds = [step.kind for step in steps]
    if kinds.count("solver") != 1 or kinds[-1] != "solver":
        raise SchemeError(f"{where}: steps are transforms, then one solver; got {', '.join(kinds)}.")
    with within(where):
        scheme = parse_scheme(data["scheme"])
    return Recipe(
        name=str(data.get("name", where)),
        scheme=scheme,
        steps=steps,
        summary=str(data.get("summary", "")),
        source=str(data.get("source", "")),
    )


def _step(data: Any, where: str) -> Step:
    kinds = [kind for kind in KINDS if isinstance(data, Mapping) and kind in data]
    if len(kinds) != 1:
        raise SchemeError(f"{where}: a step names exactly one of {', '.join(KINDS)}; got {data!r}.")
    options = {str(k): v for k, v in data.items() if k not in (kinds[0], "quick")}
    quick = data.get("quick", {})
    if not isinstance(quick, Mapping):
        raise SchemeError(f"{where}: quick is a mapping of options; got {quick!r}.")
    return Step(kind=kinds[0], name=str(data[kinds[0]]), options=options, quick=quick)


def read_yaml(path: str, what: str) -> Any:
    """What a YAML file holds.

    Raises:
        UsageError: no such file. SchemeError: it can't be read, or isn't YAML.
    """
    if not Path(path).is_file():
        raise UsageError(f"no {what} file {path}.")
    try:
        return _yaml(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise SchemeError(f"{path} can't be read: {error}") from error


def _yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SchemeError(f"{where} is not valid YAML: {error}") from error
