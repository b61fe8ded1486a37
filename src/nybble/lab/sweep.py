"""A sweep in YAML: axes, whose product is run.

    name: bits-and-formats
    kind: quantize
    base: {model: demo:smollm2, samples: 16}     # options that all runs share
    grids:                                       # each a product of its axes; together they are the sweep
      - recipe: [rtn, gptq]
        bits: [3, 4, 8]                          # no option of the kind: an axis that a template uses
        weights: "int{bits} group={group}"
        group: [32, 64]
      - recipe: none                             # a single value is an axis of one
    exclude:
      - {recipe: gptq, bits: 8}                  # axis to value, pattern (int4*) or list of these

Runs that can't be, and say so before anything is opened, are listed with the reason and left out.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from nybble.core.errors import SchemeError, UsageError, did_you_mean, within
from nybble.lab.contents import fingerprint
from nybble.lab.kinds import REGISTRY, RunKind
from nybble.lab.spec import RunSpec, describe
from nybble.recipe import read_yaml

_KEYS = ("name", "kind", "base", "grids", "exclude")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class Member:
    """A run of a sweep.

    Attributes:
        spec: what is run. labels: values of the axes that aren't options. reason: why it can't be run; or nothing.
    """

    spec: RunSpec
    labels: Mapping[str, Any]
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a YAML file says.

    Attributes:
        name: of the sweep. kind: of its runs; a grid may say another. base: options that all runs share.
        grids: axis -> value or values. exclude: axis -> what is left out, all axes of a mapping together.
    """

    name: str
    kind: str
    base: Mapping[str, Any]
    grids: tuple[Mapping[str, Any], ...]
    exclude: tuple[Mapping[str, Any], ...] = ()

    def expand(self) -> list[Member]:
        """All runs, in the order of the file; what two grids have in common is there once.

        Raises:
            UsageError: an unknown axis, a template without its axis, an exclusion of an axis that there isn't, values
                of the wrong type, or nothing left. FileError: a file that isn't there.
        """
        self._check_exclusions()
        found: dict[str, Member] = {}
        read = cache(fingerprint)  # once a path, not once a run
        for number, grid in enumerate(self.grids, 1):
            with within(f"sweep {self.name}, grid {number}"):
                for member in self._members(grid, read):
                    found.setdefault(member.spec.key, member)
        if not found:
            raise UsageError(f"sweep {self.name}: nothing is left to run; exclude less.")
        return list(found.values())

    def to_dict(self) -> dict[str, Any]:
        """As YAML has it."""
        return dataclasses.asdict(self)

    def _check_exclusions(self) -> None:
        """Refuse an exclusion of an axis that no grid has: it would leave out nothing, and not say so."""
        known = {name: None for grid in (self.base, *self.grids) for name in grid if name != "kind"}
        for number, rule in enumerate(self.exclude, 1):
            for name in rule:
                if name not in known:
                    raise UsageError(
                        f"sweep {self.name}, exclusion {number}: no grid has an axis {name!r}."
                        f"{did_you_mean(str(name), known)}"
                    )

    def _members(self, grid: Mapping[str, Any], read: Callable[[str], str | None]) -> Iterator[Member]:
        values = {**self.base, **grid}
        kind = str(values.pop("kind", self.kind))
        part: type[RunKind] = REGISTRY.get(kind)
        options = {field.name for field in dataclasses.fields(part)}
        axes = {name: _values(name, value) for name, value in values.items()}
        used = _check_axes(axes, options, kind)
        excluded = [_Exclusion(rule, axes) for rule in self.exclude]
        for chosen in itertools.product(*axes.values()):
            point = dict(zip(axes, chosen, strict=True))
            if any(rule.takes(point) for rule in excluded):
                continue
            filled = {name: _filled(value, point) for name, value in point.items()} if used else point
            if any(rule.takes(filled) for rule in excluded):
                continue
            made: RunKind = REGISTRY.make(kind, {name: filled[name] for name in axes if name in options})
            yield Member(
                spec=describe(made, kind, read), reason=_reason(made),
                labels={name: value for name, value in point.items() if name not in options},
            )  # fmt: skip


def load_sweep(path: Path | str) -> Sweep:
    """Read a YAML file.

    Raises:
        FileError: it can't be read. UsageError: it is no sweep.
    """
    with within(str(path)):
        return parse_sweep(read_yaml(str(path), "sweep"))


def parse_sweep(data: Any) -> Sweep:
    """What a mapping says.

    Raises:
        SchemeError: an unknown or missing key, or a value of the wrong kind.
    """
    if not isinstance(data, Mapping):
        raise SchemeError(f"a sweep is a mapping with name, kind and grids; got {data!r}.")
    for key in data:
        if key not in _KEYS:
            raise SchemeError(f"a sweep has no {key!r}.{did_you_mean(str(key), _KEYS)}")
    name, kind = data.get("name"), data.get("kind", "quantize")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SchemeError(f"a sweep has a name of letters, digits, dots, dashes and underscores; got {name!r}.")
    base, grids = data.get("base") or {}, data.get("grids") or [{}]
    exclude = data.get("exclude") or []
    if not isinstance(base, Mapping):
        raise SchemeError(f"base is a mapping of options; got {base!r}.")
    for key, rows in (("grids", grids), ("exclude", exclude)):
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
            raise SchemeError(f"{key} are a list of mappings; got {rows!r}.")
    if any(not rule for rule in exclude):
        raise SchemeError("an exclusion without an axis would leave everything out; name axes, or remove it.")
    return Sweep(name=name, kind=str(kind), base=base, grids=tuple(grids), exclude=tuple(exclude))


class _Exclusion:
    """``{recipe: gptq, bits: [2, 8]}``: what it names on every axis is left out."""

    def __init__(self, rule: Mapping[str, Any], axes: Mapping[str, Any]) -> None:
        self._here = all(name in axes for name in rule)  # an axis of another grid
        self._rule = {name: value if isinstance(value, list) else [value] for name, value in rule.items()}

    def takes(self, point: Mapping[str, Any]) -> bool:
        """Whether a point is left out."""
        return self._here and all(
            any(_same(point[name], wanted) for wanted in values) for name, values in self._rule.items()
        )


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(value, str) and isinstance(wanted, str):
        return value == wanted or fnmatchcase(value, wanted)
    return type(value) is type(wanted) and bool(value == wanted)


def _values(name: str, value: Any) -> list[Any]:
    """An axis's values; ``{value: [...]}`` is a single value that is a list."""
    if isinstance(value, Mapping) and set(value) == {"value"}:
        return [value["value"]]
    found = value if isinstance(value, list) else [value]
    if not found:
        raise UsageError(f"axis {name!r} has no values.")
    return found


def _check_axes(axes: Mapping[str, list[Any]], options: set[str], kind: str) -> set[str]:
    """Refuse axes that nothing knows; the names that templates use."""
    used = {
        name
        for axis, values in axes.items() if axis in options
        for value in values if isinstance(value, str)
        for name in _FIELD.findall(value)
    }  # fmt: skip
    for name in sorted(used - axes.keys()):
        raise UsageError(f"a template uses {{{name}}}, and there is no axis of that name.{did_you_mean(name, axes)}")
    for name in axes:
        if name not in options and name not in used:
            raise UsageError(
                f"unknown axis {name!r}: it is no option of a run of kind {kind!r}, and no template uses it."
                f"{did_you_mean(name, options)}"
            )
    return used


def _filled(value: Any, point: Mapping[str, Any]) -> Any:
    return _FIELD.sub(lambda found: str(point[found[1]]), value) if isinstance(value, str) else value


def _reason(made: RunKind) -> str:
    try:
        made.check()
    except UsageError as error:
        return str(error)
    return ""
