from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nybble.core.errors import UsageError
from nybble.core.registry import Registry


def room(module: str, name: str = "REGISTRY") -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module(module), name)


GROUPS: dict[str, Callable[[], Any]] = {
    name: room(f"nybble.{name}")
    for name in (
        "optim", "scales", "reconstruction", "rounding", "transforms", "solvers", "corrections", "packing",
        "granularity", "formats", "qtensor", "learned", "recipes",
    )
} | {
    "adapters": room("nybble.models.adapter"),
    "kinds of data": room("nybble.data.kinds", "KINDS"),
    "sources": room("nybble.data.text", "SOURCES"),
    "judges": room("nybble.eval.judges", "JUDGES"),
    "metrics": room("nybble.eval.metrics", "METRICS"),
}  # fmt: skip


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    folder = tmp_path / "shop_of_parts"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "power_of_two.py").write_text("PART = 2")
    (folder / "absmax.py").write_text("PART = 1")
    (folder / "broken.py").write_text("raise RuntimeError('imported')")
    (folder / "_shared.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("shop_of_parts")]:
        monkeypatch.delitem(sys.modules, name)
    return Registry("shop_of_parts", "scale rule")


def test_names_are_the_modules_and_nothing_is_imported(parts: Registry) -> None:
    assert parts.names() == ["absmax", "broken", "power-of-two"]
    assert "shop_of_parts.absmax" not in sys.modules


@pytest.mark.parametrize("name", ["power-of-two", "power_of_two"])
def test_get_imports_only_what_is_asked_for(parts: Registry, name: str) -> None:
    assert parts.get(name) == 2
    assert "shop_of_parts.absmax" not in sys.modules


def test_all_imports_every_part(parts: Registry) -> None:
    with pytest.raises(RuntimeError, match="imported"):
        parts.all()


def test_an_unknown_name_is_answered_with_the_closest(parts: Registry) -> None:
    with pytest.raises(UsageError, match=r"unknown scale rule 'abs-max'\. Did you mean 'absmax'\?"):
        parts.get("abs-max")


def test_other_packages_add_parts_by_entry_point(parts: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = EntryPoint("golden", "math:pi", "shop_of_parts")
    found = SimpleNamespace(select=lambda group: [theirs] if group == "shop_of_parts" else [])
    monkeypatch.setattr("nybble.core.registry.plugins", lambda: found)
    assert "golden" in parts.names()
    assert parts.get("golden") == pytest.approx(3.14159265)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("math", "the module math has no PART"),
        ("math:pi", "it is a float, which is no scale rule"),
        ("collections:OrderedDict", "it is the class OrderedDict, which is no scale rule"),
        ("nosuch_module", "ModuleNotFoundError: No module named 'nosuch_module'"),
    ],
)
def test_what_is_no_such_part_is_named(parts: Registry, monkeypatch: pytest.MonkeyPatch, value: str, says: str) -> None:
    theirs = EntryPoint("golden", value, "shop_of_parts")
    monkeypatch.setattr("nybble.core.registry.plugins", lambda: SimpleNamespace(select=lambda group: [theirs]))
    strict = Registry("shop_of_parts", "scale rule", lambda part: isinstance(part, int))
    with pytest.raises(UsageError, match=f"'golden' of the package {value} can't be imported .*{says}"):
        strict.get("golden")


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_every_room_refuses_another_rooms_part(group: str) -> None:
    """Each knows its own parts, and a class or a number of somebody else's from them."""
    registry = GROUPS[group]()
    own = list(registry.all().values())
    assert own and all(registry.fits(part) for part in own)
    assert not registry.fits(3.5) and not registry.fits(dict)
