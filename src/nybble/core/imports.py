"""Importing later: names of a package when they are asked for, and an action once another package is imported."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any


def lazily(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__``: names that are imported when they are first asked for.

    Args:
        package: its dotted name.
        names: name -> the module that has it; of a module of the package's own, its own name.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(names[name])
        return module if names[name] == f"{package}.{name}" else getattr(module, name)

    return get


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call ``action`` right after module ``name`` was imported; now, if it already is."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Waiting(name, action))


def callable_too(name: str, owner: str) -> None:
    """Let the imported module ``name`` be called, as the function of the same last name in the module ``owner``.

    A package ``p.x`` hides a function ``p.x``, once anything imports it; so it is both.
    """
    function = name.rpartition(".")[2]

    class Callable(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(owner), function)(*args, **kwargs)

    sys.modules[name].__class__ = Callable


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds nothing itself: wraps the loader that the other finders find, then steps aside."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Then(spec.loader, self.action)
        return spec


class _Then(importlib.abc.Loader):
    """A loader that calls ``action`` after the module ran."""

    def __init__(self, loader: importlib.abc.Loader, action: Callable[[], None]) -> None:
        self.loader, self.action = loader, action

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.action()
