"""A folder of modules as a registry: one part, one file, no list to edit.

The module's name is the part's key (``-`` in the key is ``_`` in the file name); it defines ``PART``. Only what
is asked for is imported. Other packages add parts through entry points of the group ``nybble.<folder>``; one that can't
be imported is named in a warning and left out, so that it breaks nothing but itself.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

from nybble.core.errors import NybbleError, UsageError, did_you_mean
from nybble.core.options import build


class PluginWarning(UserWarning):
    """A part that another package offers was left out."""


@cache
def plugins() -> Any:
    """What installed packages offer, read once: where there are many, going through them takes a tenth of a second."""
    return importlib.metadata.entry_points()


class Registry:
    """The parts found in one package folder.

    Args:
        package: dotted name of the folder, ``nybble.scales``.
        kind: what a part is called in messages, ``scale rule``.
        fits: whether something that another package offers is such a part; by default anything is.
    """

    def __init__(self, package: str, kind: str, fits: Callable[[Any], bool] = lambda part: True) -> None:
        self.package = package
        self.kind = kind
        self.fits = fits

    @cached_property
    def _sources(self) -> dict[str, str | EntryPoint]:
        found: dict[str, str | EntryPoint] = {**self.own()}
        for entry in plugins().select(group=self.package):
            name = entry.name.replace("_", "-")
            if name in found:  # a file must not depend on which packages are installed
                self._leave_out(entry, "there is one of that name already")
            else:
                found[name] = entry
        return found

    def own(self) -> dict[str, str]:
        """Key -> module, of the parts in the folder; neither they nor the folder are imported."""
        top, *below = self.package.split(".")
        if self.package in sys.modules:
            places = [*sys.modules[self.package].__path__]
        else:
            places = [str(Path(place, *below)) for place in importlib.import_module(top).__path__]
        return {
            m.name.replace("_", "-"): f"{self.package}.{m.name}"
            for m in pkgutil.iter_modules(places)
            if not m.name.startswith("_") and not m.ispkg  # a folder in it is a registry of its own
        }

    def read(self, source: str) -> Any:
        """The part that the folder has in a module of this name."""
        return importlib.import_module(source).PART

    def taken(self, name: str, found: Any) -> Any:
        """The part in what an entry point gave: it, or the ``PART`` of a module.

        Raises:
            UsageError: it has none, or something else.
        """
        if isinstance(found, ModuleType):
            if not hasattr(found, "PART"):
                raise UsageError(f"the module {found.__name__} has no PART.")
            found = found.PART
        if not self.fits(found):
            what = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
            raise UsageError(f"it is {what}, which is no {self.kind}. See a file of {self.package} for what is.")
        return found

    @cached_property
    def _broken(self) -> set[str]:
        """Parts of other packages that can't be imported, as far as anybody asked."""
        return set()

    def names(self) -> list[str]:
        """All keys, sorted, but for those known to be broken; nothing is imported."""
        return sorted(self._sources.keys() - self._broken)

    def __contains__(self, name: str) -> bool:
        """Whether there is such a part, broken or not; nothing is imported."""
        return name.replace("_", "-") in self._sources

    def check(self, name: str) -> None:
        """Refuse a name that no part has; nothing is imported.

        Raises:
            UsageError: the message has the closest name.
        """
        if name not in self:
            raise UsageError(f"unknown {self.kind} {name!r}.{did_you_mean(name, self.names())}")

    def get(self, name: str) -> Any:
        """Return the part called ``name``, importing its module.

        Raises:
            UsageError: no such part (the message has the closest name), or another package's that can't be imported.
        """
        self.check(name)
        source = self._sources[name.replace("_", "-")]
        if isinstance(source, str):
            return self.read(source)
        try:
            return self.taken(name, source.load())
        except Exception as error:
            why = str(error) if isinstance(error, NybbleError) else f"{type(error).__name__}: {error}"
            raise UsageError(
                f"the {self.kind} {name!r} of the package {_owner(source)} can't be imported ({why}). "
                "Repair that package, or remove it."
            ) from error

    def make(self, name: str, options: Mapping[str, Any]) -> Any:
        """An object of the part called ``name``, a dataclass whose fields are its options.

        Raises:
            UsageError: no such part. SchemeError: unknown option, or a value of the wrong type.
        """
        return build(self.get(name), options, f"{self.kind} {name!r}")

    def key_of(self, part: object) -> str:
        """The key of the part that ``part``, an object made from it, belongs to."""
        module = type(part).__module__
        found = module.rpartition(".")[2].replace("_", "-")
        if module == f"{self.package}.{module.rpartition('.')[2]}":
            return found
        return next((name for name in self.names() if self.get(name) is type(part)), found)

    def all(self) -> dict[str, Any]:
        """Every part by key; imports all of them (contract tests and listings).

        What another package offers and can't be imported is left out, with a PluginWarning the first time.
        """
        found = {}
        for name in self.names():
            source = self._sources[name]
            try:
                found[name] = self.get(name)
            except UsageError as error:
                if isinstance(source, str):
                    raise
                self._broken.add(name)
                self._leave_out(source, f"{type(error.__cause__).__name__}: {error.__cause__}")
        return found

    def _leave_out(self, entry: EntryPoint, why: str) -> None:
        warnings.warn(
            f"the {self.kind} {entry.name!r} of the package {_owner(entry)} is left out: {why}",
            PluginWarning,
            stacklevel=3,
        )


def _owner(entry: EntryPoint) -> str:
    """The package that an entry point is of, with what it points to."""
    return f"{entry.dist.name} ({entry.value})" if entry.dist else entry.value
