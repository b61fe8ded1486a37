"""A folder of modules as a registry: one part, one file, no list to edit.

The module's name is the part's key (``-`` in the key is ``_`` in the file name); it defines ``PART``. Only what
is asked for is imported. Other packages add parts through entry points of the group ``nybble.<folder>``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from nybble.core.errors import UsageError, did_you_mean
from nybble.core.options import build


class Registry:
    """The parts found in one package folder.

    Args:
        package: dotted name of the folder, ``nybble.scales``.
        kind: what a part is called in messages, ``scale rule``.
    """

    def __init__(self, package: str, kind: str) -> None:
        self.package = package
        self.kind = kind

    @cached_property
    def _sources(self) -> dict[str, str | importlib.metadata.EntryPoint]:
        folder = importlib.import_module(self.package)
        found: dict[str, str | importlib.metadata.EntryPoint] = {
            m.name.replace("_", "-"): f"{self.package}.{m.name}"
            for m in pkgutil.iter_modules(folder.__path__)
            if not m.name.startswith("_")
        }
        for entry in importlib.metadata.entry_points(group=self.package):
            found[entry.name] = entry
        return found

    def names(self) -> list[str]:
        """All keys, sorted; nothing is imported."""
        return sorted(self._sources)

    def get(self, name: str) -> Any:
        """Return the part called ``name``, importing its module.

        Raises:
            UsageError: no such part; the message has the closest name.
        """
        source = self._sources.get(name.replace("_", "-"))
        if source is None:
            raise UsageError(f"unknown {self.kind} {name!r}.{did_you_mean(name, self.names())}")
        if isinstance(source, importlib.metadata.EntryPoint):
            return source.load()
        return importlib.import_module(source).PART

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
        """Every part by key; imports all of them (contract tests and listings)."""
        return {name: self.get(name) for name in self.names()}
