from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from nybble.core.errors import UsageError
from nybble.core.registry import Registry


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
