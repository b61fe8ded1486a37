"""Recipe: a scheme and an ordered list of steps, as YAML. A published method is a recipe in ``nybble/recipes/``.

name: llm-fp4
summary: what it does, in a line
source: paper, year, arXiv number
scheme: W4A16_E2M1                  # a preset's name or a mapping; --scheme and --weights override it
convolutions: int8 plane            # inputs of convolutions where they can't have the scheme's; none: float
steps:                              # train* transform* solver reconstruction* correction* train*; any may be missing
  - train: restorative-lora         # of the whole model: in front of all else or, as distill, behind it
  - transform: smooth
  - solver: llm-fp4                 # left out: rtn
    rounds: 3                       # an option of the step
    quick: {grid: 12}               # options that --effort quick changes
  - reconstruction: mse
    weights: adaround               # a learned part, or {adaround: {option: value}}
    window: 2
  - correction: low-rank
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from nybble.core.errors import NybbleError, SchemeError, UsageError, did_you_mean, within
from nybble.core.registry import PluginWarning, Registry
from nybble.quantizer import Quantizer
from nybble.recipes import REGISTRY, check_recipe_name, recipe_for
from nybble.scheme import Scheme, parse_scheme

ROOMS = {
    "train": ("nybble.training.steps", "training step"),
    "transform": ("nybble.transforms", "transform"),
    "solver": ("nybble.solvers", "solver"),
    "reconstruction": ("nybble.reconstruction.losses", "reconstruction loss"),
    "correction": ("nybble.corrections", "correction"),
}
"""Kinds of steps, in the order in which they make sense: the folder of the parts, and what one is called."""
KINDS = tuple(ROOMS)
FLOAT = "none"
"""What stands for no quantizer."""
_WHY = {
    ("solver", "transform"): "the transform would rewrite weights that are codes by then",
    ("reconstruction", "transform"): "the transform would rewrite weights whose rounding was learned",
    ("correction", "transform"): "the transform would rewrite weights that are codes by then",
    ("reconstruction", "solver"): "the solver would throw away what the reconstruction learned",
    ("correction", "solver"): "the solver would throw away what was corrected",
    ("correction", "reconstruction"): "the reconstruction would change the codes whose loss was corrected",
    ("solver", "solver"): "the second would throw away the codes of the first",
}


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
    """A named method: steps over a scheme.

    Attributes:
        convolutions: a quantizer line, or ``none`` for float: what inputs of convolutions get where they can't have the
            scheme's. Empty: that is an error.
    """

    name: str
    scheme: Scheme
    steps: tuple[Step, ...]
    summary: str = ""
    source: str = ""
    convolutions: str = ""

    @property
    def solver(self) -> Step:
        """The step that quantizes."""
        return next(step for step in self.steps if step.kind == "solver")

    def with_scheme(self, scheme: Scheme) -> Recipe:
        """The same steps over another scheme."""
        return replace(self, scheme=scheme)

    def with_effort(self, effort: str) -> Recipe:
        """The recipe as ``quick`` or ``full`` work; they are the same where no step has a quick way.

        Raises:
            UsageError: another word.
        """
        if effort not in ("quick", "full"):
            raise UsageError(f"effort {effort!r} is neither quick nor full.")
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
            **({"convolutions": self.convolutions} if self.convolutions else {}),
            "steps": steps,
        }


def check_names(recipe: Recipe) -> None:
    """Refuse steps that name no part, without importing any, which takes torch and seconds.

    Raises:
        UsageError: the message has the closest name.
    """
    for step in recipe.steps:
        Registry(*ROOMS[step.kind]).check(step.name)


def recipe_names() -> list[str]:
    """Names of the recipes that nybble carries, and of those that other packages offer."""
    return REGISTRY.names()


def listed_recipes() -> list[Recipe]:
    """All of them; what another package offers and is no recipe is left out, with a PluginWarning."""
    found = []
    for name in REGISTRY.all():
        try:
            found.append(load_recipe(name))
        except NybbleError as error:
            if name in REGISTRY.own():
                raise
            warnings.warn(f"the recipe {name!r} of another package is left out: {error}", PluginWarning, stacklevel=2)
    return found


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a YAML file when ``name`` ends in .yaml or .yml.

    Raises:
        UsageError: unknown name (with the closest one), or another package's that can't be read.
        SchemeError: the file is not a recipe.
    """
    if name.endswith((".yaml", ".yml")):
        return parse_recipe(read_yaml(name, "recipe"), name)
    name = recipe_for(name)
    check_recipe_name(name)
    found = REGISTRY.get(name)
    return parse_recipe(parse_yaml(found, name) if isinstance(found, str) else found, name)


def parse_recipe(data: Any, where: str = "recipe") -> Recipe:
    """A recipe from YAML's mapping (module docstring).

    Raises:
        SchemeError: unknown keys or step kinds, or something missing.
    """
    if not isinstance(data, Mapping):
        raise SchemeError(f"{where}: a recipe is a mapping with scheme and steps; got {type(data).__name__}.")
    known = ("name", "summary", "source", "scheme", "convolutions", "steps")
    for key in data:
        if key not in known:
            raise SchemeError(f"{where}: a recipe has no key {key!r}.{did_you_mean(str(key), known)}")
    if not data.get("scheme"):
        raise SchemeError(
            f"{where}: the recipe lacks a scheme: a preset's name, or a mapping of what to quantize and how."
        )
    listed = [] if data.get("steps") is None else data["steps"]
    if not isinstance(listed, list):
        raise SchemeError(f"{where}: steps is a list of mappings; got {listed!r}.")
    steps = tuple(_step(step, where) for step in listed)
    check_order(steps, where)
    if not any(step.kind == "solver" for step in steps):
        first = _behind_transforms(steps)
        steps = (*steps[:first], Step(kind="solver", name="rtn", options={}), *steps[first:])
    with within(where):
        scheme = parse_scheme(data["scheme"])
        convolutions = _convolutions(data.get("convolutions"))
    return Recipe(
        name=str(data.get("name", where)),
        scheme=scheme,
        steps=steps,
        summary=str(data.get("summary", "")),
        source=str(data.get("source", "")),
        convolutions=convolutions,
    )


def _convolutions(line: Any) -> str:
    if line is None or line == FLOAT:
        return line or ""
    if not isinstance(line, str):
        raise SchemeError(f"convolutions is a quantizer line such as 'int8 plane', or none; got {line!r}.")
    return str(Quantizer(line))


def check_order(steps: Sequence[Step], where: str = "recipe") -> None:
    """Raise SchemeError, naming two steps and the reason, where one can't come after another."""
    _check_trainings(steps, where)
    for i, after in enumerate(steps):
        for before in steps[:i]:
            why = _WHY.get((before.kind, after.kind))
            if why is not None:
                keep = "; keep one solver" if before.kind == after.kind else ""
                raise SchemeError(
                    f"{where}: {after.kind} {after.name!r} can't come after {before.kind} {before.name!r}: {why}. "
                    f"The order is {' -> '.join((*KINDS, 'train'))}{keep}."
                )


def trained(recipe: Recipe) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """The steps that train the whole model: in front of the solver, and behind everything."""
    at = next(i for i, step in enumerate(recipe.steps) if step.kind == "solver")
    before, after = recipe.steps[:at], recipe.steps[at:]
    return tuple(s for s in before if s.kind == "train"), tuple(s for s in after if s.kind == "train")


def _behind_transforms(steps: Sequence[Step]) -> int:
    """Where a solver that nobody named stands: behind trainings in front, and transforms."""
    at = 0
    for kind in KINDS[:2]:
        while at < len(steps) and steps[at].kind == kind:
            at += 1
    return at


def _check_trainings(steps: Sequence[Step], where: str) -> None:
    """Raise SchemeError for a training with other steps on both sides."""
    for i, step in enumerate(steps):
        before = next((s for s in reversed(steps[:i]) if s.kind != "train"), None)
        after = next((s for s in steps[i:] if s.kind != "train"), None)
        if step.kind == "train" and before is not None and after is not None:
            raise SchemeError(
                f"{where}: train {step.name!r} can't stand between {before.kind} {before.name!r} and {after.kind} "
                f"{after.name!r}: it trains the whole model, before any block is touched or when all are done. Put it "
                "first or last."
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
        return parse_yaml(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise SchemeError(f"{path} can't be read: {error}") from error


def parse_yaml(text: str, where: str) -> Any:
    """What YAML's text holds, with 1.2's floats.

    Raises:
        SchemeError: it isn't YAML.
    """
    import yaml

    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError as error:
        raise SchemeError(f"{where} is not valid YAML: {error}") from error


@cache
def _loader() -> Any:
    """PyYAML's safe one, which is of YAML 1.1, with 1.2's floats: to the former ``1e-3`` and ``1.0e30`` are text."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader
